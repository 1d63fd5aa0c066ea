// Tiles of up to eight rows by AVX-512's products of pairs: what AMX does with its own, for processors that have none.
#pragma once

#include <type_traits>

#include "dots.h"

namespace {

#if DOTS == 1

// M rows of x by P panels along k numbers, added to sums[panel * stride + row], or in their place where they are fresh. Rows are
// row_bytes apart, 32 numbers of each and the next ones `step`; `meanwhile` is called with every `each` times 32 numbers, counted
// from `due` on.
template <int M, int P, class Meanwhile>
INLINE void tile_of_rows(const bf16 *w, int64_t panel, const bf16 *x, int64_t row_bytes, int64_t step, int64_t k, int each,
                         int due, Meanwhile meanwhile, Lanes *sums, int64_t stride, bool fresh) {
    __m512 s[M][P];
#pragma GCC unroll 8
    for (int i = 0; i < M; i++)
#pragma GCC unroll 2
        for (int p = 0; p < P; p++) s[i][p] = fresh ? _mm512_setzero_ps() : sums[p * stride + i].v;
    for (int64_t at = 0; at < k; at += TOGETHER, x += step) {
#pragma GCC unroll 4
        for (int j = 0; j < TOGETHER / 2; j++, w += 2 * WIDTH)
#pragma GCC unroll 2
            for (int p = 0; p < P; p++) {
                const __m512bh weights = (__m512bh)_mm512_loadu_si512(w + p * panel);
#pragma GCC unroll 8
                for (int i = 0; i < M; i++) {
                    int pair;
                    memcpy(&pair, (const char *)x + i * row_bytes + 4 * j, sizeof pair);
                    s[i][p] = _mm512_dpbf16_ps(s[i][p], weights, (__m512bh)_mm512_set1_epi32(pair));
                }
            }
        if (++due == each) meanwhile(), due = 0;
    }
#pragma GCC unroll 8
    for (int i = 0; i < M; i++)
#pragma GCC unroll 2
        for (int p = 0; p < P; p++) sums[p * stride + i] = {s[i][p]};
}

// The same of R tiles, as by AMX; nothing more is called in.
template <int R, int P, bool, class Meanwhile>
INLINE void by_tiles_of_rows(const bf16 *w, int64_t panel, Tiles x, int64_t height, int64_t k, Meanwhile meanwhile, Lanes *sums,
                             int64_t stride, bool fresh) {
    for (int r = 0; r < R; r++) {
        const bf16 *rows = r ? x.second : x.first;
        auto run = [&](auto with) {
            tile_of_rows<decltype(with)::value, P>(w, panel, rows, x.row_bytes, x.step, k, R, r, meanwhile, sums + r * height,
                                                   stride, fresh);
        };
        switch (height) {  // of more than six rows, as even as can be
            case 5: run(std::integral_constant<int, 5>{}); break;
            case 6: run(std::integral_constant<int, 6>{}); break;
            case 7: run(std::integral_constant<int, 7>{}); break;
            default: run(std::integral_constant<int, 8>{}); break;
        }
    }
}

// call(M, row) for up to sixteen rows, in groups of M, as even as can be and at most MOST.
template <int MOST = HEIGHT, class Call> INLINE void evenly(int rows, Call call) {
    const int groups = (rows + MOST - 1) / MOST;
    for (int g = 0, row = 0, end; g < groups; g++, row = end) {
        end = rows * (g + 1) / groups;
        auto run = [&](auto with) {
            if constexpr (with <= MOST) call(with, row);
        };
        switch (end - row) {
            case 1: run(std::integral_constant<int, 1>{}); break;
            case 2: run(std::integral_constant<int, 2>{}); break;
            case 3: run(std::integral_constant<int, 3>{}); break;
            case 4: run(std::integral_constant<int, 4>{}); break;
            case 5: run(std::integral_constant<int, 5>{}); break;
            case 6: run(std::integral_constant<int, 6>{}); break;
            case 7: run(std::integral_constant<int, 7>{}); break;
            default: run(std::integral_constant<int, 8>{}); break;
        }
    }
}

// M rows of x, row_bytes apart, along k numbers by P panels: sums [M][P][16], rows `stride` apart, from nothing where they are
// fresh. `times` more k numbers of each row follow the first ones, for the same panels.
template <int M, int P>
INLINE void rows_by_panels(const bf16 *const *w, const bf16 *x, int64_t row_bytes, int k, float *sums, long stride, bool fresh,
                           int times = 1) {
    __m512 s[M][P];
#pragma GCC unroll 8
    for (int i = 0; i < M; i++)
#pragma GCC unroll 4
        for (int p = 0; p < P; p++) s[i][p] = fresh ? _mm512_setzero_ps() : _mm512_loadu_ps(sums + i * stride + p * WIDTH);
    for (int t = 0; t < times; t++, x += k)
#pragma GCC unroll 4
        for (int at = 0; at < k; at += 2)
#pragma GCC unroll 4
            for (int p = 0; p < P; p++) {
                const __m512bh panel = (__m512bh)_mm512_loadu_si512(w[p] + at * WIDTH);
#pragma GCC unroll 8
                for (int i = 0; i < M; i++) {
                    int pair;
                    memcpy(&pair, (const char *)(x + at) + i * row_bytes, sizeof pair);
                    s[i][p] = _mm512_dpbf16_ps(s[i][p], panel, (__m512bh)_mm512_set1_epi32(pair));
                }
            }
#pragma GCC unroll 8
    for (int i = 0; i < M; i++)
#pragma GCC unroll 4
        for (int p = 0; p < P; p++) _mm512_storeu_ps(sums + i * stride + p * WIDTH, s[i][p]);
}

#endif

}  // namespace
