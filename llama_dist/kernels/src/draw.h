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

// found[i]: the token drawn of row i's n logits, or UNSURE.
extern "C" int llama_dist_draw(const Draw *draws, int64_t m, int64_t n, int64_t *found, int threads);
