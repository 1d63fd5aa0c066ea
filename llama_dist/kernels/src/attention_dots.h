// Attention by the instructions of dots.h: rows over the keys of a segment. Their scores are all there before the first is
// weighed, so a segment's sums are never brought to another greatest score.
//
// A score is AMX's sum along the head. Of 32 keys, two pages, a key of the first page and its like of the second are a pair. A
// weight is the sum of two bf16: for every 32 keys the first ones' products are added to the sum, then those of the second.
#pragma once

#include "attention_rows.h"
#include "dots.h"

#if DOTS == 2

namespace {

constexpr int ACROSS = SEGMENT + WIDTH;  // floats from a row's scores to those of the next: no power of two
constexpr int PAGES = SEGMENT / PAGE;

// Pages that are called into the second cache line by line, between other work: more at a time than memory gives would stop it.
struct Ahead {
    const bf16 *pages[2 * PAGES];
    int n = 0, line = 0, lines;  // of a page: which is next, and how many it has

    explicit Ahead(int dim) : lines(PAGE * dim * int(sizeof(bf16)) / 64) {}
    void call(int some) {
        for (; some > 0 && n; some--) {
            __builtin_prefetch((const char *)pages[n - 1] + line * 64, 0, 2);
            if (++line == lines) line = 0, n--;
        }
    }
};

// 2^x, within an ulp or two; the polynomial is for what x is above a whole number.
INLINE __m512 power_of_two(__m512 x) {
    const __m512 r = _mm512_reduce_ps(x, 1);
    __m512 p = _mm512_set1_ps(0x1.e974fap-10f);
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0x1.277856p-7f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0x1.c91ce6p-5f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0x1.ebdb56p-3f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0x1.62e4bap-1f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f));
    return _mm512_scalef_ps(p, x);
}

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
INLINE void weigh_pages(float *scores, int pairs, int from, int to, float unit, float *state, int chunks) {
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

// Values of keys from ... to - 1, rows of dim in pages, as panels [pair of pages][16 numbers][key of each page][16][2]; those of
// the other keys beside them are zeros.
INLINE void pair_values(const bf16 *const *pages, int from, int to, int dim, Ahead &ahead, bf16 *panels) {
    const __m512i first = _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11), second = _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15);
    for (int base = from / TOGETHER * TOGETHER; base < to; base += TOGETHER)
        for (int key = base; key < base + PAGE; key++) {
            ahead.call(ahead.lines / 8);  // half of them
            auto row = [&](int key) { return key >= from && key < to ? pages[key / PAGE] + key % PAGE * dim : nullptr; };
            const bf16 *a = row(key), *b = row(key + PAGE);
            bf16 *panel = panels + base * dim + (key - base) * 2 * WIDTH;
            for (int at = 0; at < dim; at += 2 * WIDTH, panel += 2 * TOGETHER * WIDTH) {
                const __m512i x = a ? _mm512_loadu_si512(a + at) : _mm512_setzero_si512();
                const __m512i y = b ? _mm512_loadu_si512(b + at) : _mm512_setzero_si512();
                const __m512i low = _mm512_unpacklo_epi16(x, y), high = _mm512_unpackhi_epi16(x, y);  // four quarters each
                _mm512_storeu_si512(panel, _mm512_permutex2var_epi64(low, first, high));
                _mm512_storeu_si512(panel + TOGETHER * WIDTH, _mm512_permutex2var_epi64(low, second, high));
            }
        }
}

// scores [height][pages][16] of q [height][dim], dim a multiple of 32, and pages begin ... end - 1.
INLINE void score_pages(const bf16 *q, int height, const bf16 *const *keys, int begin, int end, int dim, Ahead &ahead,
                        float *scores) {
#if TILES
    if (has_tiles()) {
        for (int p = begin; p < end; p += 4) {
            ahead.call(2 * ahead.lines);  // a quarter of them
            tile_by_panels(q, keys + p, end - p, dim, scores + p * PAGE, ACROSS);
        }
        return;
    }
#endif
    for (int row = 0; row < height; row++) {
        uint32_t words[MAX_DIM];
        pair_up(q + row * dim, dim, dim, words);
        for (int p = begin; p < end; p++) {
            Lanes sum = all(0.0f);
            by_pairs<1, 1, false>(keys[p], 0, words, 0, dim, &sum, 1);
            store(scores + row * ACROSS + p * PAGE, sum);
        }
    }
}

// sums [height][dim], rows `stride` apart: weights as weigh_pages leaves them by panels as pair_values does, of pairs begin ...
// end - 1.
INLINE void add_values(const float *weights, int height, const bf16 *panels, int begin, int end, int dim, float *sums,
                       long stride) {
    const bf16 *x = (const bf16 *)(weights + begin * TOGETHER);
    panels += begin * TOGETHER * dim;
#if TILES
    if (has_tiles()) {
        for (int at = 0; at < dim; at += 4 * WIDTH)
            halves_by_panels(x, ACROSS * 4, panels + at * TOGETHER, TOGETHER * dim, end - begin, (dim - at) / WIDTH, sums + at,
                             stride);
        return;
    }
#endif
    for (int row = 0; row < height; row++)
        for (int at = 0; at < dim; at += WIDTH) {
            Lanes sum = all(0.0f);
            for (int half = 0; half < 2 * (end - begin); half++) {
                uint32_t words[TOGETHER];
                pair_up(x + row * 2 * ACROSS + half * TOGETHER, TOGETHER, TOGETHER, words);
                by_pairs<1, 1, false>(panels + half / 2 * TOGETHER * dim + at * TOGETHER, 0, words, 0, TOGETHER, &sum, 1);
            }
            store(sums + row * stride + at, sum);
        }
}

// A tile's rows over keys start ... stop - 1 of a segment, from nothing; q and state have room for whole tiles of AMX.
void attend_dots(const Rows<bf16> &rows, const bf16 *q, int start, int stop, const Seen &seen, float *state) {
    const Job<bf16> &job = rows.job;
    const int chunks = job.chunks(), dim = job.dim, n = rows.tile.rows, height = rows.height();
    const int origin = start / SEGMENT * SEGMENT;
    const int first = (start - origin) / TOGETHER * 2, pages = (stop - origin - 1) / PAGE + 1;
    const long stride = job.stride();
    alignas(64) float scores[WIDTH * ACROSS];
    alignas(64) bf16 panels[SEGMENT * MAX_DIM];
    const bf16 *keys[PAGES], *values[PAGES];
    Ahead ahead(dim);
    for (int p = first; p < pages; p++) {
        const long here = rows.place(origin + p * PAGE);
        keys[p] = job.keys + here, values[p] = job.values + here;
        if (n <= height && rows.after) {
            const long later = rows.next_place(stop, p - first);
            ahead.pages[ahead.n++] = job.keys + later, ahead.pages[ahead.n++] = job.values + later;
        }
    }
    const int share = ahead.n * ahead.lines / 4 / n + 1;  // for a row
    bool paired = false;
    for (int row = 0; row < n; row += height, q += height * dim, state += height * stride) {
        const int mine = std::min(height, n - row), end = std::min(seen.ends[row + mine - 1] - origin, SEGMENT);
        const int begin = std::max(seen.begins[row] - origin, 0) / TOGETHER, pairs = (end + TOGETHER - 1) / TOGETHER - begin;
        if (pairs <= 0) continue;
        const int base = begin * TOGETHER;
        score_pages(q, height, keys, 2 * begin, (end + PAGE - 1) / PAGE, dim, ahead, scores);
        if (!paired) pair_values(values, start - origin, stop - origin, dim, ahead, panels);
        paired = true;
        for (int i = 0; i < mine; i++) {
            ahead.call(share);
            weigh_pages(scores + i * ACROSS + base, pairs, std::max(seen.begins[row + i] - origin - base, 0),
                        std::min(seen.ends[row + i] - origin, SEGMENT) - base, job.score_unit, state + i * stride, chunks);
        }
        for (int i = mine; i < height; i++) std::fill_n(scores + i * ACROSS + base, pairs * TOGETHER, 0.0f);
        add_values(scores, height, panels, begin, begin + pairs, dim, state, stride);
        ahead.call(ahead.n * ahead.lines);
    }
}

}  // namespace

#endif
