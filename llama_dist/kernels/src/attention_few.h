// A tile's few rows over a segment by AVX-512's products of pairs, values read from where they lie: two keys' numbers are
// brought side by side in registers, once for up to six rows, which attention_pairs.h does in memory for more. The bits are
// alike.
#pragma once

#include "attention_pairs.h"

#if DOTS == 1

namespace {

constexpr int TOGETHER_FEW = 6;  // rows at a time: with four panels as many sums as there are registers for

// scores [n][16 end], from number 16 first on, of q [n][dim] and pages first ... end - 1 of the keys, both even; rows are ACROSS
// apart. `meanwhile` is called with how many pages are next. Four at a time are more chains of products than two.
template <class Meanwhile>
INLINE void score_few(const bf16 *q, int n, const bf16 *const *keys, int first, int end, int dim, float *scores,
                      Meanwhile meanwhile) {
    auto score = [&](auto pages, int p) {
        meanwhile(int(pages));
        evenly<TOGETHER_FEW>(n, [&](auto rows, int row) {
            rows_by_panels<rows, pages>(keys + p, q + row * dim, dim * 2, dim, scores + row * ACROSS + p * PAGE, ACROSS, true);
        });
    };
    for (; first + 4 <= end; first += 4) score(std::integral_constant<int, 4>{}, first);
    if (first < end) score(std::integral_constant<int, 2>{}, first);
}

// M rows' sums of LINES * 32 numbers, from number `at` on, of the values of keys first ... end - 1: those of add_values. Rows
// of weights, as weigh_pages leaves them, are ACROSS apart, of sums `stride`; `meanwhile` is called with every pair of keys.
template <int M, int LINES, class Meanwhile>
INLINE void sum_lines(const float *weights, const bf16 *const *values, int at, int first, int end, int dim, float *sums,
                      long stride, Meanwhile meanwhile) {
    __m512 s[M][2 * LINES];
#pragma GCC unroll 6
    for (int i = 0; i < M; i++)
#pragma GCC unroll 4
        for (int p = 0; p < 2 * LINES; p++) s[i][p] = _mm512_setzero_ps();
    pairs_seen(first, end, [&](int pair, auto whole, uint32_t seen) __attribute__((always_inline)) {  // sums stay in registers
        const char *x = (const char *)(weights + pair * TOGETHER);
        for (int half = 0; half < 2; half++, x += TOGETHER * sizeof(bf16)) {
            const bf16 *a = values[2 * pair] + at, *b = values[2 * pair + 1] + at;
#pragma GCC unroll 2
            for (int key = 0; key < PAGE; key++, a += dim, b += dim) {
                if (!half) meanwhile();
                auto line = [&](const bf16 *from, int bit) {
                    return whole || seen >> bit & 1 ? _mm512_loadu_si512(from) : _mm512_setzero_si512();
                };
                __m512bh panels[2 * LINES];  // four quarters each of sixteen numbers
#pragma GCC unroll 2
                for (int l = 0; l < LINES; l++) {
                    const __m512i one = line(a + l * TOGETHER, key), other = line(b + l * TOGETHER, key + PAGE);
                    panels[2 * l] = (__m512bh)_mm512_unpacklo_epi16(one, other);
                    panels[2 * l + 1] = (__m512bh)_mm512_unpackhi_epi16(one, other);
                }
#pragma GCC unroll 6
                for (int i = 0; i < M; i++) {
                    int both;
                    memcpy(&both, x + i * ACROSS * sizeof(float) + key * sizeof both, sizeof both);
                    const __m512bh weight = (__m512bh)_mm512_set1_epi32(both);
#pragma GCC unroll 4
                    for (int p = 0; p < 2 * LINES; p++) s[i][p] = _mm512_dpbf16_ps(s[i][p], panels[p], weight);
                }
            }
        }
    });
    const __m512i firsts = _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11), seconds = _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15);
#pragma GCC unroll 6
    for (int i = 0; i < M; i++)
#pragma GCC unroll 2
        for (int l = 0; l < LINES; l++) {
            const __m512i low = _mm512_castps_si512(s[i][2 * l]), high = _mm512_castps_si512(s[i][2 * l + 1]);
            float *to = sums + i * stride + l * TOGETHER;
            _mm512_storeu_si512(to, _mm512_permutex2var_epi64(low, firsts, high));
            _mm512_storeu_si512(to + WIDTH, _mm512_permutex2var_epi64(low, seconds, high));
        }
}

// The same of n rows, up to sixteen, and all `dim` numbers, a multiple of 32; `meanwhile` is called for the first rows alone.
template <class Meanwhile>
INLINE void sum_few(const float *weights, int n, const bf16 *const *values, int first, int end, int dim, float *sums,
                    long stride, Meanwhile meanwhile) {
    evenly<TOGETHER_FEW>(n, [&](auto rows, int row) {
        auto run = [&](auto lines, int at) {
            sum_lines<rows, lines>(weights + row * ACROSS, values, at, first, end, dim, sums + row * stride + at, stride, [&] {
                if (!row) meanwhile();
            });
        };
        int at = 0;
        for (; at + 2 * TOGETHER <= dim; at += 2 * TOGETHER) run(std::integral_constant<int, 2>{}, at);
        if (at < dim) run(std::integral_constant<int, 1>{}, at);
    });
}

}  // namespace

#endif
