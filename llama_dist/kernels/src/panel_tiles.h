// Products of many rows with panels by AMX, or by AVX-512's products of pairs, see panels.cpp: two tiles of rows by two panels at a
// time. What becomes of the sums is done by AMX row by row while the next ones are multiplied, by AVX-512 when these are there.
#pragma once

#include "gate.h"
#include "pair_tiles.h"
#include "panel_rows.h"

namespace {

#if BY_TILES

constexpr int64_t X_BLOCK = 1 << (TILES ? 20 : 19);  // bytes of rows of x that stay in the second cache
constexpr int64_t SHORT = 2048;       // numbers of two panels that stay near it while all rows go by
constexpr int64_t NEAR = 1024;        // numbers of four panels of which the next ones stay there too
constexpr int64_t FAR = 1024;         // numbers of panels that are longer, and of the next, that stay there
constexpr int64_t MANY = 32;          // rows for each thread, of which it takes its own
constexpr int64_t SLICE = 288;        // numbers of two tiles of rows and of two panels that the first cache holds

// Sums [plane][part][panel][stride] that are there, with what is still to be done: a part is what was multiplied at once.
struct Rest {
    const Job *job = nullptr;
    const Lanes *sums = nullptr;
    int64_t plane = 0, planes = 0, part = 0, parts = 0, panels = 0, stride = 0;
    int64_t m = 0, n = 0, at = 0, end = 0;  // row and panel of the first; rows that are done, and all
    bf16 *to = nullptr;                     // where row `at` goes if two panels become a line of y, as most do

    void some(int64_t rows) {
        const int64_t stop = std::min(end, at + rows);
        if (!to) {
            if (at < stop) job->end == End::GATED ? gate(stop) : job->end == End::TOTAL ? add_up(stop) : put(stop);
            return;
        }
        for (; at < stop; at++, to += job->ldy)
            for (int64_t i = 0; i < parts; i++) narrow(to + i * 2 * WIDTH, sums[i * part + at], sums[i * part + at + stride]);
    }
    void begin(int64_t first, int64_t rows) {
        at = 0, end = rows, m = first;
        const bool lines = planes == 1 && panels == 2 && left(0) >= parts * 2 * WIDTH && !job->y_f32 && !job->bias;
        to = lines && job->end == End::PLANES ? (bf16 *)job->y + place(0) : nullptr;
    }

  private:
    // Where row `at` and panel i of these are in y, and how many columns there are from there on.
    int64_t place(int64_t i) const { return (m + at) * job->ldy + (n + i) * WIDTH; }
    int64_t left(int64_t i) const { return job->n - (n + i) * WIDTH; }
    // call(i, sum) for each panel of row `at`.
    template <class Call> void each(Call call) const {
        const Lanes *from = sums + at;
        for (int64_t i = 0; i < parts * panels; i += panels, from += part) {
            call(i, from);
            if (panels == 2) call(i + 1, from + stride);
        }
    }

    void put(int64_t stop) {
        for (; at < stop; at++)
            each([&](int64_t i, const Lanes *sum) {
                const int64_t columns = left(i);
                int64_t to = place(i);
                for (int64_t p = 0; p < planes; p++, sum += plane, to += job->plane) {
                    Lanes v = *sum;
                    if (job->bias) v = v + job->numbers(job->bias, (n + i) * WIDTH, columns);
                    if (job->y_f32)
                        store((float *)job->y + to, v, columns);
                    else
                        columns >= WIDTH ? narrow((bf16 *)job->y + to, v) : store((bf16 *)job->y + to, v, columns);
                }
            });
    }
    void add_up(int64_t stop) {  // the tree's roots, the last ones first; rounded as a sum of planes is
        for (; at < stop; at++)
            each([&](int64_t i, const Lanes *sum) {
                Lanes v = sum[(planes - 1) * plane];
                for (int64_t p = planes - 2; p >= 0; p--) v = sum[p * plane] + v;
                store((bf16 *)job->y + place(i), v, left(i));
            });
    }
    void gate(int64_t stop) {
        for (; at < stop; at++)
            for (int64_t i = 0; i < parts; i++) {
                const Lanes *sum = sums + i * part + at;
                put_gated((bf16 *)job->y + place(i), narrowed(sum[0]), narrowed(sum[stride]), left(i));
            }
    }
};

// Numbers from `at` on, `bytes` of each of `n` panels, 1, 2 or 4, as runs side by side, which memory is read faster by than by
// one after another. A panel's runs begin at addresses that differ in their last twelve bits.
inline Coming side_by_side(const bf16 *const *at, int64_t n, int64_t bytes) {
    Coming coming;
    const int64_t each = Coming::MOST / n, lines = (bytes / 64 + each - 1) / each | 1;
    for (int64_t i = 0; i < Coming::MOST; i++) coming.at[i] = (const char *)at[i / each] + i % each * lines * 64;
    coming.runs = Coming::MOST, coming.bytes = lines * 64;
    return coming;
}

// What is called in evenly over some steps: runs of side_by_side, or nothing.
struct Called {
    Coming coming{};
    int64_t lines = 0, steps = 1, due = 0;

    void begin(const Coming &from, int64_t over) { coming = from, lines = from.bytes / 64, steps = over, due = 0; }
    void step() {
        for (due += lines; due >= steps; due -= steps)
#pragma GCC unroll 8
            for (const char *&at : coming.at) __builtin_prefetch(at, 0, 2), at += 64;
    }
};

// The rows of `x` by `parts` times Q panels: neighbours from panel n on, or a gate's from there on and those they are multiplied
// by. Two tiles of rows go through all units at once, so that their sums stay in the first cache; or if the panels are long all
// rows go through a slice. Where there are several parts these take turns, by slices of a unit, so that short panels' slice of
// two tiles of x stays there too. The next panels are called in, or after these what is `coming`.
template <int Q>
void tiled(const Job &job, const Wide &x, int64_t n, int64_t parts, Coming *coming, Roots *roots, Rest &rest) {
    const bool whole = job.first < 0, gate = job.end == End::GATED;
    const int64_t unit = job.unit_numbers(), ldx = job.numbers_a_row(), panel = job.panel(), height = x.height;
    const int64_t apart = gate ? job.up * panel : panel, next = (gate ? 1 : Q) * panel, size = Q * parts;
    const bool far = ldx > SHORT;
    const int64_t tiles = x.room / height, pairs = (tiles + 1) / 2, together = far ? tiles : 2;
    const int64_t most = far ? FAR : parts > 1 ? SLICE : unit, slices = (unit + most - 1) / most;
    const int64_t slice = (unit / GROUP + slices - 1) / slices * GROUP;
    const bf16 *codes = (const bf16 *)job.w.codes + n * panel;
    const bool begins = !rest.job;  // it may be that nobody has called this in
    Called ahead;
    // Over as many steps as k numbers of these panels take, k numbers of the panels, or of the next ones, or what is coming.
    auto call = [&](int64_t from, int64_t k) {
        const bf16 *w[4];
        const int64_t there = from == ldx ? parts * next : from * WIDTH;
        for (int64_t i = 0; i < size; i++) w[i] = codes + i / Q * next + i % Q * apart + there;
        const bool ends = from == ldx && coming && coming->runs == Coming::MOST;
        ahead.begin(ends ? *coming : side_by_side(w, size, k * WIDTH * 2), parts * pairs * (k / GROUP));
        if (ends) *coming = {};
    };
    if (!far) call(ldx, ldx);
    for (int64_t first = 0; first < tiles; first += together) {
        const int64_t end = std::min(first + together, tiles), rows = (end - first) * height;
        const int64_t steps = parts * (ldx / GROUP) * ((end - first + 1) / 2);
        const int64_t some = (rest.end - rest.at + steps - 1) / steps;
        Roots &mine = roots[rest.sums == roots[0].room.data()];
        mine.start(size * rows);
        for (int64_t u = 0; u < job.w.n_units; u++) {
            Lanes *sums = whole && u ? mine.plane(0) : mine.next(false);
            for (int64_t at = u * unit, k; at < (u + 1) * unit; at += k) {
                k = std::min(slice, (u + 1) * unit - at);
                const bool fresh = at == (whole ? 0 : u * unit);
                if (far) call(at + k, k);
                for (int64_t t = first; t < end; t += 2)
                    for (int64_t part = 0; part < parts; part++) {
                        auto meanwhile = [&] {
                            ahead.step();
                            if (TILES) rest.some(some);  // beside AMX
                        };
                        const bf16 *w = codes + part * next + at * WIDTH;
                        Lanes *here = sums + part * Q * rows + (t - first) * height;
                        const Tiles both = x.tiles(job, t, at);
                        auto multiply = [&](auto with, auto lines_too) {
                            constexpr int R = decltype(with)::value;
                            constexpr bool CALL = decltype(lines_too)::value;
                            by_tiles_of_rows<R, Q, CALL>(w, apart, both, height, k, meanwhile, here, rows, fresh);
                        };
                        const std::integral_constant<int, 1> one;
                        const std::integral_constant<int, 2> two;
                        if (begins && t == 0)
                            t + 1 < end ? multiply(two, std::true_type{}) : multiply(one, std::true_type{});
                        else
                            t + 1 < end ? multiply(two, std::false_type{}) : multiply(one, std::false_type{});
                    }
            }
            if (!whole) mine.push(job.first + u);
        }
        rest.some(rest.end);
        rest = {&job, mine.plane(0), mine.each, whole ? 1 : mine.size, Q * rows, parts, Q, rows, 0, n};
        rest.begin(x.m + first * height, std::min(rows, x.rows - first * height));
    }
}

// How a product is dealt out: each thread takes its share of the panels, by all rows if there are panels for all threads; or by
// AVX-512, whose weights take little of the time if there are many rows, its share of the rows, by all panels. Thread t
// multiplies block b of the rows, from row(b) on, by panels begin(b) ... end(b) - 1.
struct Deal {
    int64_t m, panels, pairs, blocks, from, to;
    bool by_rows;

    Deal(const Job &job, int64_t t, int64_t threads) : m(job.m), by_rows(!TILES && m >= MANY * threads) {
        const int64_t fitting = X_BLOCK / int64_t(sizeof(bf16)) / job.numbers_a_row();
        const int64_t most = std::clamp<int64_t>(fitting, 4 * WIDTH, 32 * WIDTH) / (2 * WIDTH) * (2 * WIDTH);
        panels = (job.n + WIDTH - 1) / WIDTH, pairs = (panels + 1) / 2, blocks = (m + most - 1) / most;
        if (by_rows) blocks = (blocks + threads - 1) / threads * threads;
        const int64_t all = by_rows ? blocks : blocks * pairs;
        from = all * t / threads, to = all * (t + 1) / threads;
    }
    int64_t row(int64_t block) const {  // by AVX-512 a tile's rows that are missing take time: none are but the last one's
        return TILES ? m * block / blocks : std::min(m, (m + HEIGHT - 1) / HEIGHT * block / blocks * HEIGHT);
    }
    int64_t begin(int64_t block) const { return by_rows ? 0 : first(from, block); }
    int64_t end(int64_t block) const { return !by_rows ? first(to, block) : block >= from && block < to ? panels : 0; }

  private:
    int64_t first(int64_t at, int64_t block) const {
        return std::min(panels, 2 * ((std::max<int64_t>(0, at - block) + blocks - 1) / blocks));
    }
};

// How many panels are taken together, of `left`; a gate's, with as many of those they are multiplied by.
inline int64_t at_once(const Job &job, int64_t left) {
    if (job.end == End::GATED) return std::min<int64_t>(2, left);
    return left >= 4 && job.first < 0 && job.numbers_a_row() <= NEAR ? 4 : std::min<int64_t>(2, left);
}

// What is read first of what was dealt, from a block of rows on.
inline Coming first_of(const Job &job, const Deal &deal, int64_t block) {
    while (block < deal.blocks && deal.begin(block) == deal.end(block)) block++;
    if (block >= deal.blocks) return {};
    const int64_t n = deal.begin(block), count = at_once(job, deal.end(block) - n), panel = job.panel();
    const int64_t numbers = job.numbers_a_row();
    const bf16 *w[4];
    for (int64_t i = 0; i < count; i++) w[i] = (const bf16 *)job.w.codes + (n + i) * panel;
    const int64_t size = job.end == End::GATED ? 2 * count : count;
    for (int64_t i = count; i < size; i++) w[i] = w[i - count] + job.up * panel;
    return side_by_side(w, size, (numbers > SHORT ? FAR : numbers) * WIDTH * 2);
}

// Called by every thread of a team.
inline void by_tiles(const Job &job, int threads, Coming *coming) {
    static thread_local Wide x;
    static thread_local Roots roots[2];
#pragma omp for schedule(static, 1) nowait
    for (int64_t t = 0; t < threads; t++) {
        const Deal deal(job, t, threads);
        Rest rest;
        for (int64_t block = 0; block < deal.blocks; block++) {
            const int64_t end = deal.end(block);
            if (deal.begin(block) == end) continue;
            x.take<bf16>(job, deal.row(block), deal.row(block + 1), true);
            set_up_tiles(x.height);
            Coming more = first_of(job, deal, block + 1), *after = more.runs || !coming ? &more : coming;
            for (int64_t n = deal.begin(block), count; n < end; n += count) {
                count = at_once(job, end - n);
                Coming *here = n + count == end ? after : nullptr;
                if (job.end == End::GATED)
                    tiled<2>(job, x, n, count, here, roots, rest);
                else
                    count > 1 ? tiled<2>(job, x, n, count / 2, here, roots, rest) : tiled<1>(job, x, n, 1, here, roots, rest);
            }
        }
        rest.some(rest.end);
        let_tiles_go();
    }
}

#else

inline void by_tiles(const Job &, int, Coming *) {}

#endif

}  // namespace
