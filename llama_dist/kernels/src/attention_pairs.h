// Attention by the instructions of dots.h, of a segment's keys: scores become weights, values panels, and both become sums.
//
// Of 32 keys, two pages, a key of the first page and its like of the second are a pair. A weight is the sum of two bf16: for
// every 32 keys the first ones' products are added to the sum, then those of the second.
#pragma once

#include "attention_rows.h"
#include "pair_tiles.h"

#if DOTS

namespace {

constexpr int ACROSS = SEGMENT + WIDTH;  // floats from a row's scores to those of the next: no power of two
constexpr int PAGES = SEGMENT / PAGE;
constexpr int SUMS = 4;  // panels whose sums are made together: AMX holds as many
constexpr int PANEL = TOGETHER * WIDTH;

// call(pair, whole, seen) for the pairs of pages that hold keys from ... to - 1: whether all are among them, and which.
template <class Call> INLINE void pairs_seen(int from, int to, Call call) {
    auto up_to = [](int n) { return n < TOGETHER ? (1u << n) - 1 : ~0u; };
    int pair = from / TOGETHER;
    if (from % TOGETHER && from < to) {
        call(pair, std::false_type{}, up_to(to - pair * TOGETHER) & ~up_to(from % TOGETHER));
        pair++;
    }
#pragma GCC unroll 2
    for (; (pair + 1) * TOGETHER <= to; pair++) call(pair, std::true_type{}, ~0u);
    if (pair * TOGETHER < to) call(pair, std::false_type{}, up_to(to - pair * TOGETHER));
}

// A row's scores of `pairs` pairs of pages -> their weights, in their place: for each pair the first halves, then the second.
// The row sees keys from ... to - 1. The sum of the weights and the greatest score go to `state`.
template <class Meanwhile>
INLINE void weigh_pages(float *scores, int pairs, int from, int to, float unit, float *state, int chunks, Meanwhile meanwhile) {
    const __m512 none = _mm512_set1_ps(-INFINITY), units = _mm512_set1_ps(unit);
    const __m512i upper = _mm512_set1_epi32(int(0xffff0000u)), half = _mm512_set1_epi32(0x8000);
    __m512 most[2] = {none, none};
    pairs_seen(from, to, [&](int pair, auto whole, uint32_t seen) {
#pragma GCC unroll 2
        for (int i = 0; i < 2; i++) {
            const __m512 s = _mm512_loadu_ps(scores + pair * TOGETHER + i * WIDTH);
            most[i] = whole ? _mm512_max_ps(most[i], s)
                            : _mm512_mask_max_ps(most[i], __mmask16(seen >> i * WIDTH), most[i], s);
        }
    });
    const float greatest = _mm512_reduce_max_ps(_mm512_max_ps(most[0], most[1])) * unit;
    const __m512 highest = _mm512_set1_ps(greatest);
    __m512 total[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
    pairs_seen(from, to, [&](int pair, auto whole, uint32_t seen) {
        float *here = scores + pair * TOGETHER;
        __m512i firsts[2], seconds[2];
        meanwhile();
#pragma GCC unroll 2
        for (int i = 0; i < 2; i++) {
            __m512 x = _mm512_fmsub_ps(_mm512_loadu_ps(here + i * WIDTH), units, highest);
            if (!whole) x = _mm512_mask_mov_ps(none, __mmask16(seen >> i * WIDTH), x);
            const __m512 weight = power_of_two(x);
            total[i] = _mm512_add_ps(total[i], weight);
            firsts[i] = _mm512_and_si512(_mm512_add_epi32(_mm512_castps_si512(weight), half), upper);  // the nearest bf16
            const __m512 rest = _mm512_sub_ps(weight, _mm512_castsi512_ps(firsts[i]));
            seconds[i] = _mm512_add_epi32(_mm512_castps_si512(rest), half);
        }
        _mm512_storeu_si512(here, _mm512_or_si512(_mm512_srli_epi32(firsts[0], 16), firsts[1]));
        _mm512_storeu_si512(here + WIDTH,
                            _mm512_or_si512(_mm512_srli_epi32(seconds[0], 16), _mm512_and_si512(seconds[1], upper)));
    });
    store(total_of(state, chunks), {_mm512_add_ps(total[0], total[1])});
    most_of(state, chunks) = greatest;
    const int begin = std::min(from / TOGETHER, pairs), end = std::max((to + TOGETHER - 1) / TOGETHER, begin);
    for (int at = 0; at < begin * TOGETHER; at += WIDTH) store(scores + at, all(0.0f));
    for (int at = end * TOGETHER; at < pairs * TOGETHER; at += WIDTH) store(scores + at, all(0.0f));
}

// Numbers of the values [16][dim] of two pages as panels [panels][key of each page][16][2]; those of keys that are not seen are
// zeros. `panels` is even.
template <bool WHOLE, class Meanwhile>
INLINE void pair_values(const bf16 *a, const bf16 *b, uint32_t seen, int dim, int panels, bf16 *to, Meanwhile meanwhile) {
    const __m512i first = _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11), second = _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15);
    for (int key = 0; key < PAGE; key++, a += dim, b += dim, to += 2 * WIDTH) {
        auto line = [&](const bf16 *p, int bit) {
            return WHOLE || seen >> bit & 1 ? _mm512_loadu_si512(p) : _mm512_setzero_si512();
        };
        meanwhile();
        for (int p = 0; p < panels; p += 2) {
            const __m512i x = line(a + p * WIDTH, key), y = line(b + p * WIDTH, key + PAGE);
            const __m512i low = _mm512_unpacklo_epi16(x, y), high = _mm512_unpackhi_epi16(x, y);  // four quarters each
            _mm512_storeu_si512(to + p * PANEL, _mm512_permutex2var_epi64(low, first, high));
            _mm512_storeu_si512(to + (p + 1) * PANEL, _mm512_permutex2var_epi64(low, second, high));
        }
    }
}

// Sums [height][panels][16], rows `stride` apart, of up to SUMS panels: from nothing on, then those of one pair of pages after
// another, of panels FIRST and the next, by weights as weigh_pages leaves them; at the end they are in their place.
INLINE void begin_sums(int height, int panels, float *sums, long stride) {
    if (has_tiles()) return clear_tiles();
    for (int row = 0; row < height; row++) std::fill_n(sums + row * stride, panels * WIDTH, 0.0f);
}
template <int FIRST> INLINE void add_values(const float *weights, int height, const bf16 *w, float *sums, long stride) {
    const bf16 *x = (const bf16 *)weights;
    if (has_tiles()) return add_halves<FIRST>(x, ACROSS * 4, w);
#if DOTS == 1
    const bf16 *const panels[] = {w, w + PANEL};
    return evenly(height, [&](auto with, int row) {
        float *here = sums + row * stride + FIRST * WIDTH;
        rows_by_panels<with, 2>(panels, x + row * 2 * ACROSS, ACROSS * 4, TOGETHER, here, stride, false, 2);
    });
#endif
    for (int row = 0; row < height; row++, x += 2 * ACROSS)
        for (int half = 0; half < 2; half++) {
            uint32_t words[TOGETHER];
            pair_up(x + half * TOGETHER, TOGETHER, TOGETHER, words);
            for (int p = 0; p < 2; p++) {
                float *here = sums + row * stride + (FIRST + p) * WIDTH;
                Lanes sum = load(here);
                by_pairs<1, 1, false>(w + p * PANEL, 0, words, 0, TOGETHER, &sum, 1);
                store(here, sum);
            }
        }
}
INLINE void end_sums(int panels, float *sums, long stride) {
    if (has_tiles()) store_tiles(panels, sums, stride);
}

}  // namespace

#endif
