// Attention by the instructions of dots.h: rows over the keys of a segment. Their scores, sums of these along the head, are all
// there before the first is weighed, so a segment's sums are never brought to another greatest score.
//
// Several tiles of rows share the values, which are laid out once for them. One tile's rows read keys and values once, by AMX:
// what is laid out of values is used while it is in the first cache; else as attention_few.h says. What is next is called into
// the second cache meanwhile.
#pragma once

#include "attention_few.h"

#if DOTS

namespace {

// What the work on a page's keys, on a row's scores of a pair of pages and on a key's values takes, relative to each other, for
// as many numbers of the head as AMX's sums hold at a time.
constexpr int BY_PAGE = 100, BY_ROW = 30, BY_KEY = 14;

// Pages [16][dim] that are read next, called into the second cache evenly while others are worked on, or at once. Several are
// called in side by side, which is faster than one after another: for AMX eight, else two (Zen 4, whose own prefetch goes on
// from there).
struct Stream {
    static constexpr int RUNS = DOTS == 1 ? 2 : 8;
    const bf16 *pages[2 * PAGES];
    const char *at[RUNS];
    int n = 0, each = 0, runs = 0, page = 0, lines, left = 0;  // pages, of each run, and lines left of those that are called in
    int work = 1, due = 0, total = 0;

    explicit Stream(int dim) : lines(PAGE * dim * int(sizeof(bf16)) / 64) {}
    void add(const bf16 *page) { pages[n++] = page; }
    void begin(int all) {
        each = (n + RUNS - 1) / RUNS, runs = each ? (n + each - 1) / each : 0, work = all, total = each * lines;
    }
    __attribute__((always_inline)) void call(int done) {
        for (due += done * total; due >= work; due -= work) line();
    }

  private:
    void line() {
        if (!left) {
            if (page == each) return;
            for (int r = 0; r < runs; r++) at[r] = (const char *)pages[std::min(r * each + page, n - 1)];
            page++, left = lines;
        }
        for (int r = 0; r < runs; r++) __builtin_prefetch(at[r], 0, 2), at[r] += 64;
        left--;
    }
};

// scores [height][N pages][16] of q [height][dim], dim a multiple of 32, and the pages, rows ACROSS apart.
template <int N> INLINE void score_pages(const bf16 *q, int height, const bf16 *const *keys, int dim, float *scores) {
    if (has_tiles()) return tile_by_panels<N>(q, keys, dim, scores, ACROSS);
#if DOTS == 1
    return evenly(height, [&](auto with, int row) {
        rows_by_panels<with, N>(keys, q + row * dim, dim * 2, dim, scores + row * ACROSS, ACROSS, true);
    });
#endif
    for (int row = 0; row < height; row++) {
        uint32_t words[MAX_DIM];
        pair_up(q + row * dim, dim, dim, words);
        for (int p = 0; p < N; p++) {
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
                        int end, const Seen &seen, int origin, float *state) {
    alignas(64) float scores[WIDTH * ACROSS];
    const int dim = rows.plan.dim, n = rows.tile.rows, base = first / TOGETHER * TOGETHER, pages = (end - 1) / PAGE + 1;
    const long stride = rows.plan.stride();
    const int pairs = (end - base + TOGETHER - 1) / TOGETHER;
    if (rows.begins) {
        Stream own(dim);
        std::for_each(keys + base / PAGE, keys + pages, [&](const bf16 *page) { own.add(page); });
        std::for_each(values + base / PAGE, values + pages, [&](const bf16 *page) { own.add(page); });
        own.begin(1), own.call(1);  // at once
    }
    Stream stream(dim);
    rows.next_pages([&](const bf16 *keys, const bf16 *) { stream.add(keys); });
    rows.next_pages([&](const bf16 *, const bf16 *values) { stream.add(values); });
    const int times = (dim + SUMS * WIDTH - 1) / (SUMS * WIDTH), by_page = BY_PAGE * dim / (SUMS * WIDTH);
    stream.begin((pages - base / PAGE) * by_page + n * pairs * BY_ROW + (end - first) * BY_KEY * times);
#if DOTS == 1
    score_few(q, n, keys, base / PAGE, (pages + 1) / 2 * 2, dim, scores, [&](int pages) { stream.call(pages * by_page); });
#else
    for (int p = base / PAGE; p < pages; p++) {
        stream.call(by_page);
        score_pages<1>(q, n, keys + p, dim, scores + p * PAGE);
    }
#endif
    for (int i = 0; i < n; i++)
        weigh_row(rows.plan, seen, i, origin, base, pairs, scores + i * ACROSS, state + i * stride, [&] { stream.call(BY_ROW); });
#if DOTS == 1
    sum_few(scores, n, values, first, end, dim, state, stride, [&] { stream.call(2 * BY_KEY); });
#else
    alignas(64) bf16 panels[2][SUMS * PANEL];
    for (int at = 0; at < dim; at += SUMS * WIDTH) {
        const int many = std::min((dim - at) / WIDTH, SUMS);
        float *sums = state + at;
        auto add = [&](int pair) {
            add_values<0>(scores + pair * TOGETHER, n, panels[pair % 2], sums, stride);
            if (many > 2) add_values<2>(scores + pair * TOGETHER, n, panels[pair % 2] + 2 * PANEL, sums, stride);
        };
        begin_sums(n, many, sums, stride);
        int before = -1;  // the pair that is laid out and not yet added: its lines are on their way to the cache
        pairs_seen(first, end, [&](int pair, auto whole, uint32_t set) {
            const bf16 *a = values[2 * pair] + at, *b = values[2 * pair + 1] + at;
            pair_values<whole>(a, b, set, dim, many, panels[pair % 2], [&] { stream.call(2 * BY_KEY); });
            if (before >= 0) add(before);
            before = pair;
        });
        add(before);
        end_sums(many, sums, stride);
    }
#endif
}

// A tile of sixteen rows over pairs of pages of a segment: its first row, how many are asked for, its pairs from `begin` on.
struct Turn {
    int row, mine, begin, pairs;
    const bf16 *q;
    float *scores, *state;
};

// What is multiplied between the rows of a turn that are weighed, a part of it after each: the values of the turn before, two
// panels of a pair at a time, and the scores of the turn after. What comes next is called into the first cache while a row is
// weighed.
struct Beside {
    static constexpr int PART = 2 * PANEL, PAIRS = PAGES / 2;

    const Turn *before, *after;
    const bf16 *panels, *const *keys;  // [dim / 32][PAIRS][PART]; [pages]
    int height, dim;
    long stride;
    int n_adds, n_scores, added = 0, scored = 0;
    const char *values_ahead, *keys_ahead;

    Beside(const Turn *before, const Turn *after, const bf16 *panels, const bf16 *const *keys, int height, int dim, long stride)
        : before(before), after(after), panels(panels), keys(keys), height(height), dim(dim), stride(stride),
          n_adds(before ? before->pairs * (dim / TOGETHER) : 0), n_scores(after ? after->pairs : 0),
          values_ahead((const char *)panels), keys_ahead((const char *)panels) {
        look_ahead();
    }
    const bf16 *values() const {
        return panels + (added / before->pairs * PAIRS + before->begin + added % before->pairs) * PART;
    }
    void look_ahead() {
        if (added < n_adds) values_ahead = (const char *)values();
        if (scored < n_scores) keys_ahead = (const char *)keys[2 * (after->begin + scored)];
    }
    __attribute__((always_inline)) void call() {
        for (int line = 0; line < dim / WIDTH; line++, values_ahead += 64, keys_ahead += 64) {
            __builtin_prefetch(values_ahead);
            __builtin_prefetch(keys_ahead);
        }
    }
    void add() {
        const int at = added / before->pairs * TOGETHER, i = added % before->pairs;
        if (!i) begin_sums(height, 2, before->state + at, stride);
        add_values<0>(before->scores + (before->begin + i) * TOGETHER, height, values(), before->state + at, stride);
        if (i + 1 == before->pairs) end_sums(2, before->state + at, stride);
    }
    void score() {
        const int pair = after->begin + scored;
        score_pages<2>(after->q, height, keys + 2 * pair, dim, after->scores + pair * TOGETHER);
    }
    // After `done` rows of `all`.
    void go_on(int done, int all) {
        for (const int end = n_adds * done / all; added < end; added++) add();
        for (const int end = n_scores * done / all; scored < end; scored++) score();
        look_ahead();
    }
};

// A tile's rows over keys start ... stop - 1 of a segment, from nothing; q and state have room for whole tiles.
void attend_dots(const Rows<bf16> &rows, const bf16 *q, int start, int stop, const Seen &seen, float *state) {
    const Plan &plan = rows.plan;
    const int dim = plan.dim, n = rows.tile.rows, height = rows.height();
    const int origin = start / SEGMENT * SEGMENT, first = start - origin, last = stop - origin;
    const int pages = (last - 1) / PAGE + 1;
    const long stride = plan.stride();
    const bf16 *keys[PAGES], *values[PAGES];
    for (int p = first / TOGETHER * 2; p < (pages + 1) / 2 * 2; p++) {  // pairs
        const long here = rows.place(origin + std::min(p, pages - 1) * PAGE);
        keys[p] = rows.job.keys + here, values[p] = rows.job.values + here;
    }
    if (n <= height) return attend_once(rows, q, keys, values, first, last, seen, origin, state);
    alignas(64) bf16 panels[SEGMENT * MAX_DIM];
    pairs_seen(first, last, [&](int pair, auto whole, uint32_t set) {
        for (int at = 0; at < dim; at += TOGETHER)
            pair_values<whole>(values[2 * pair] + at, values[2 * pair + 1] + at, set, dim, 2,
                               panels + (at / TOGETHER * Beside::PAIRS + pair) * Beside::PART, [] {});
    });
    alignas(64) float scores[3][WIDTH * ACROSS];  // of as many turns at a time
    Turn turns[3];
    int n_turns = 0;
    auto from = [&](int row) -> const Turn * {  // the first turn from there on that sees keys here
        for (; row < n; row += height) {
            const int mine = std::min(height, n - row), end = std::min(seen.ends[row + mine - 1] - origin, SEGMENT);
            const int begin = std::max(seen.begins[row] - origin, 0) / TOGETHER, pairs = (end + TOGETHER - 1) / TOGETHER - begin;
            if (pairs <= 0) continue;
            const int i = n_turns++ % 3;
            turns[i] = {row, mine, begin, pairs, q + row * dim, scores[i], state + row * stride};
            return &turns[i];
        }
        return nullptr;
    };
    const Turn *before = nullptr, *now = nullptr, *after = from(0);
    while (before || now || after) {
        Beside beside(before, after, panels, keys, height, dim, stride);
        for (int i = 0; now && i < height; i++) {
            float *here = now->scores + i * ACROSS;
            if (i < now->mine)
                weigh_row(plan, seen, now->row + i, origin, now->begin * TOGETHER, now->pairs, here, now->state + i * stride,
                          [&] { beside.call(); });
            else
                std::fill_n(here + now->begin * TOGETHER, now->pairs * TOGETHER, 0.0f);
            beside.go_on(i + 1, height);
        }
        beside.go_on(1, 1);
        before = now, now = after;
        after = now ? from(now->row + height) : nullptr;
    }
}

}  // namespace

#endif
