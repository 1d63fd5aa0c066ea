// What a program is made of, laid out as kernels/program.py packs it.
#pragma once

#include <cstdint>

// One operation; what its numbers mean stands where they are packed.
struct Op {
    enum Kind : int64_t {
        NORM, ROPE, ATTEND, GATE, PLANES, PACKED, SHARED_SUM, SHARED_PLANES, EMBED, LIKELIEST, SHARED_LIKELIEST
    };
    int64_t kind, clock;
    int64_t v[14];
};

// What changes from call to call, and from pass to pass of one call (passes.cpp): n tokens in `spans` spans, and where they stand.
// A token's angles are row `angles[i]` of cos and sin. Where there is room for them, the seconds that each operation takes are
// added to `seconds`, at its clock.
struct Step {
    int64_t is_bf16, n, spans, max_pages, n_slots, vocab, n_angles;
    int64_t *tokens, *slots, *angles;
    const int *tables;
    int *starts;
    const int *lengths;
    const float *cos, *sin;
    double *seconds;
};

// Returns 0, or -(1 + the first token whose id, slot or angles are none), or 1 + the first span whose pages are not in the
// cache: then nothing is computed. `lost` becomes what a round among ranks ended with (shared.h).
extern "C" int llama_dist_program(const Op *ops, int64_t n_ops, const Step *step, int threads, int *lost);
