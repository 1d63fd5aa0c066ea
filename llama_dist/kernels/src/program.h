// What a program is made of, laid out as kernels/program.py packs it.
#pragma once

#include <cstdint>

// One operation; what its numbers mean stands where they are packed.
struct Op {
    enum Kind : int64_t { NORM, LINEAR, ROPE, ATTEND, GATE, PLANES, PACKED, SHARED_SUM, SHARED_PLANES };
    int64_t kind;
    int64_t v[15];
};

// What changes from call to call: n tokens in `spans` spans, and where they stand. Where there is room for them, the seconds
// that each kind of operation takes are added to `seconds`.
struct Step {
    int64_t is_bf16, n, spans, max_pages, n_slots;
    const int64_t *slots;
    const int *tables, *starts, *lengths;
    const float *cos, *sin;
    double *seconds;
};
