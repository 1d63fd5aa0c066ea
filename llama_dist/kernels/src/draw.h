// What is drawn of rows of logits, see draw.cpp.
#pragma once

#include <cstdint>

constexpr int64_t UNSURE = -1;  // in a token's place

// Drawn from `row`, logits; key is that of the noise. As kernels/draw.py packs it.
struct Draw {
    const void *row;
    int64_t is_bf16, top_k;
    uint64_t key;
    double temperature, top_p, min_p;
};

// Number `at` of what splitmix64 makes of a key (engine/sampler.py): a position's key of a seed's, a token's noise of that.
static inline uint64_t hash(uint64_t key, uint64_t at) {
    uint64_t x = key + (at + 1) * 0x9E3779B97F4A7C15u;
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9u;
    x = (x ^ x >> 27) * 0x94D049BB133111EBu;
    return x ^ x >> 31;
}

// found[i]: the token drawn of row i's n logits, or UNSURE.
extern "C" int llama_dist_draw(const Draw *draws, int64_t m, int64_t n, int64_t *found, int threads);
