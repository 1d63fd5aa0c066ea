// Attention by the instructions of dots.h: rows over the keys of a segment. Their scores, AMX's sums along the head, are all
// there before the first is weighed, so a segment's sums are never brought to another greatest score.
//
// Several tiles of rows share the values, which are laid out once for them. One tile's rows read keys and values once, as they
// come from memory: they are called into the cache a little before, in the order in which they are read, and what is laid out
// of values is used while it is in the first cache.
#pragma once

#include "attention_pairs.h"

#if DOTS == 2

namespace {

constexpr int LEAD = 4;  // pages that are called in before they are read
constexpr int SOME = 2;  // lines at a time later on: with each page of keys more than a page is called in

// Pages [16][dim] in the order in which they are read, called into the second cache line by line between other work: more at a
// time than memory gives would stop it.
struct Stream {
    const bf16 *pages[2 * PAGES + LEAD];
    const char *at = nullptr;
    int n = 0, next = 0, left = 0, lines;  // lines left of a page before the next one

    explicit Stream(int dim) : lines(PAGE * dim * int(sizeof(bf16)) / 64) {}
    __attribute__((always_inline)) void call(int some) {
        for (; some > 0; some--, left--, at += 64) {
            if (!left) {
                if (next == n) return;
                at = (const char *)pages[next++], left = lines;
            }
            __builtin_prefetch(at, 0, 2);
        }
    }
};

// scores [height][pages][16] of q [height][dim], dim a multiple of 32, and pages begin ... end - 1.
INLINE void score_pages(const bf16 *q, int height, const bf16 *const *keys, int begin, int end, int dim, float *scores) {
#if TILES
    if (has_tiles()) {
        for (int p = begin; p < end; p += 4) tile_by_panels(q, keys + p, end - p, dim, scores + p * PAGE, ACROSS);
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

// The scores of row `row` for `pairs` pairs of pages from key `base` of a segment on -> their weights.
template <class Meanwhile>
INLINE void weigh_row(const Plan &plan, const Seen &seen, int row, int origin, int base, int pairs, float *scores, float *state,
                      Meanwhile meanwhile) {
    const int from = std::max(seen.begins[row] - origin - base, 0), to = std::min(seen.ends[row] - origin, SEGMENT) - base;
    weigh_pages(scores + base, pairs, from, to, plan.score_unit(), state, plan.chunks(), meanwhile);
}

// One tile's rows over keys first ... end - 1 of a segment, which begins at `origin`.
INLINE void attend_once(const Rows<bf16> &rows, const bf16 *q, const bf16 *const *keys, const bf16 *const *values, int first,
                        int end, const Seen &seen, int origin, float *scores, float *state) {
    const int dim = rows.plan.dim, n = rows.tile.rows, base = first / TOGETHER * TOGETHER, pages = (end - 1) / PAGE + 1;
    const long stride = rows.plan.stride();
    Stream stream(dim);
    for (int p = base / PAGE; p < pages; p++) stream.pages[stream.n++] = keys[p];
    stream.next = std::min(LEAD, stream.n);  // as many were called in before
    for (int p = base / PAGE; p < pages; p++) stream.pages[stream.n++] = values[p];
    for (int p = 0; p < LEAD; p++) stream.pages[stream.n++] = rows.job.keys + rows.next_place(p);
    for (int p = base / PAGE; p < pages; p++) {
        stream.call(stream.lines * 3 / 2);
        score_pages(q, n, keys, p, p + 1, dim, scores);
    }
    const int pairs = (end - base + TOGETHER - 1) / TOGETHER;
    auto some = [&] { stream.call(SOME); };
    for (int i = 0; i < n; i++)
        weigh_row(rows.plan, seen, i, origin, base, pairs, scores + i * ACROSS, state + i * stride, some);
    alignas(64) bf16 panels[2][SUMS * PANEL];
    for (int at = 0; at < dim; at += SUMS * WIDTH) {
        const int many = std::min((dim - at) / WIDTH, SUMS);
        float *sums = state + at;
        auto add = [&](int pair) { add_values(scores + pair * TOGETHER, n, panels[pair % 2], many, sums, stride); };
        begin_sums(n, many, sums, stride);
        int before = -1;  // the pair that is laid out and not yet added: its lines are on their way to the cache
        pairs_seen(first, end, [&](int pair, auto whole, uint32_t set) {
            const bf16 *a = values[2 * pair] + at, *b = values[2 * pair + 1] + at;
            pair_values<whole>(a, b, set, dim, many, panels[pair % 2], some);
            if (before >= 0) add(before);
            before = pair;
        });
        add(before);
        end_sums(many, sums, stride);
    }
}

// A tile's rows over keys start ... stop - 1 of a segment, from nothing; q and state have room for whole tiles of AMX.
void attend_dots(const Rows<bf16> &rows, const bf16 *q, int start, int stop, const Seen &seen, float *state) {
    const Plan &plan = rows.plan;
    const int dim = plan.dim, n = rows.tile.rows, height = rows.height();
    const int origin = start / SEGMENT * SEGMENT, first = start - origin, last = stop - origin;
    const int pages = (last - 1) / PAGE + 1;
    const long stride = plan.stride();
    alignas(64) float scores[WIDTH * ACROSS];
    const bf16 *keys[PAGES], *values[PAGES];
    for (int p = first / TOGETHER * 2; p < (pages + 1) / 2 * 2; p++) {  // pairs
        const long here = rows.place(origin + std::min(p, pages - 1) * PAGE);
        keys[p] = rows.job.keys + here, values[p] = rows.job.values + here;
    }
    if (n <= height) return attend_once(rows, q, keys, values, first, last, seen, origin, scores, state);
    alignas(64) bf16 panels[SEGMENT * MAX_DIM];
    pairs_seen(first, last, [&](int pair, auto whole, uint32_t set) {
        const bf16 *a = values[2 * pair], *b = values[2 * pair + 1];
        pair_values<whole>(a, b, set, dim, dim / WIDTH, panels + pair * TOGETHER * dim, [] {});
    });
    for (int row = 0; row < n; row += height, q += height * dim, state += height * stride) {
        const int mine = std::min(height, n - row), end = std::min(seen.ends[row + mine - 1] - origin, SEGMENT);
        const int begin = std::max(seen.begins[row] - origin, 0) / TOGETHER, pairs = (end + TOGETHER - 1) / TOGETHER - begin;
        if (pairs <= 0) continue;
        const int base = begin * TOGETHER;
        score_pages(q, height, keys, 2 * begin, (end + PAGE - 1) / PAGE, dim, scores);
        for (int i = 0; i < mine; i++)
            weigh_row(plan, seen, row + i, origin, base, pairs, scores + i * ACROSS, state + i * stride, [] {});
        for (int i = mine; i < height; i++) std::fill_n(scores + i * ACROSS + base, pairs * TOGETHER, 0.0f);
        for (int at = 0; at < dim; at += SUMS * WIDTH) {
            const int many = std::min((dim - at) / WIDTH, SUMS);
            begin_sums(height, many, state + at, stride);
            for (int pair = begin; pair < begin + pairs; pair++)
                add_values(scores + pair * TOGETHER, height, panels + pair * TOGETHER * dim + at * TOGETHER, many, state + at,
                           stride);
            end_sums(many, state + at, stride);
        }
    }
}

}  // namespace

#endif
