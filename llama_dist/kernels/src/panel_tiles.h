// Products of many rows with panels by AMX, see panels.cpp: two tiles of rows by two panels at a time. What becomes of the sums
// is done row by row while the next ones are multiplied.
#pragma once

#include "gate.h"
#include "panel_rows.h"

namespace {

#if TILES

constexpr int64_t X_BLOCK = 1 << 20;  // bytes of rows of x that stay in the second cache
constexpr int64_t SHORT = 2048;       // numbers of two panels that stay near it while all rows go by

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
        for (; at < stop; at++, to += job->ldy) narrow(to, sums[at], sums[at + stride]);
    }
    void begin(int64_t first, int64_t rows) {
        at = 0, end = rows, m = first;
        const bool line = planes == 1 && panels == 2 && left() >= 2 * WIDTH && !job->y_f32 && !job->bias;
        to = line && job->end == End::PLANES ? (bf16 *)job->y + place() : nullptr;
    }

  private:
    // Where row `at` and panel n of y are, and how many columns there are from there on.
    int64_t place() const { return (m + at) * job->ldy + n * WIDTH; }
    int64_t left() const { return job->n - n * WIDTH; }

    void put(int64_t stop) {
        const bool lines = panels == 2 && left() >= 2 * WIDTH && !job->y_f32;
        for (; at < stop; at++)
            for (int64_t p = 0; p < planes; p++) {
                const Lanes *sum = sums + p * plane + at;
                const int64_t to = p * job->plane + place();
                Lanes v[2] = {sum[0], sum[panels == 2 ? stride : 0]};
                for (int64_t i = 0; job->bias && i < panels; i++)
                    v[i] = v[i] + job->numbers(job->bias, (n + i) * WIDTH, left() - i * WIDTH);
                if (lines) {
                    narrow((bf16 *)job->y + to, v[0], v[1]);
                    continue;
                }
                for (int64_t i = 0; i < panels; i++) {
                    const int64_t here = to + i * WIDTH, columns = left() - i * WIDTH;
                    if (job->y_f32)
                        store((float *)job->y + here, v[i], columns);
                    else
                        columns >= WIDTH ? narrow((bf16 *)job->y + here, v[i]) : store((bf16 *)job->y + here, v[i], columns);
                }
            }
    }
    void add_up(int64_t stop) {  // the tree's roots, the last ones first; rounded as a sum of planes is
        for (; at < stop; at++)
            for (int64_t i = 0; i < panels; i++) {
                const Lanes *sum = sums + i * stride + at;
                Lanes v = sum[(planes - 1) * plane];
                for (int64_t p = planes - 2; p >= 0; p--) v = sum[p * plane] + v;
                store((bf16 *)job->y + place() + i * WIDTH, v, left() - i * WIDTH);
            }
    }
    void gate(int64_t stop) {
        for (; at < stop; at++)
            for (int64_t i = 0; i < parts; i++) {
                const Lanes *sum = sums + i * part + at;
                const Lanes v = gated<bf16>(narrowed(sum[0]), narrowed(sum[stride]));
                store((bf16 *)job->y + place() + i * WIDTH, v, left() - i * WIDTH);
            }
    }
};

// The rows of `x` by `parts` times Q panels: neighbours from panel n on, or a gate's from there on and those they are multiplied
// by. Two tiles of rows go through all units at once, so that their sums stay in the first cache; or if the panels are long all
// rows go through a unit. What comes next is called in.
template <int Q> void tiled(const Job &job, const Wide &x, int64_t n, int64_t parts, Roots *roots, Rest &rest) {
    const bool whole = job.first < 0, gate = job.end == End::GATED;
    const int64_t unit = job.unit_numbers(), ldx = job.numbers_a_row(), panel = job.panel(), height = x.height;
    const int64_t apart = gate ? job.up * panel : panel, width = gate ? parts : Q;
    const int64_t tiles = x.room / height, pairs = (tiles + 1) / 2, together = ldx > SHORT ? tiles : 2;
    // For few rows memory is what counts: there the processor's own reading ahead, given a start, is ahead of all calling in.
    const bool few = pairs <= 2;
    const int64_t lines = few ? 0 : ((ldx > SHORT ? Q : width) * GROUP / 2 + pairs - 1) / pairs;
    const bf16 *codes = (const bf16 *)job.w.codes + n * panel;
    const char *ahead[2] = {(const char *)(codes + width * panel), (const char *)(codes + width * panel + apart)};
    for (int64_t first = 0; first < tiles; first += together) {
        const int64_t end = std::min(first + together, tiles), rows = (end - first) * height;
        const int64_t steps = parts * (ldx / GROUP) * ((end - first + 1) / 2), some = (rest.end - rest.at + steps - 1) / steps;
        Roots &mine = roots[rest.sums == roots[0].room.data()];
        mine.start(parts * Q * rows);
        for (int64_t u = 0; u < job.w.n_units; u++) {
            const bool fresh = !whole || !u;
            Lanes *sums = fresh ? mine.next(false) : mine.plane(0);
            for (int64_t part = 0; part < parts; part++) {
                const bf16 *w = codes + part * panel + u * unit * WIDTH;
                for (int64_t t = first; t < end; t += 2, sums += 2 * height) {
                    const char *&line = ahead[part];
                    if (together > 2 && lines) {  // a pair's share of the panels' next unit
                        const int64_t share = t / 2 * lines * unit * 2, in = unit * WIDTH * 2;
                        line = (const char *)(w + (u + 1 < job.w.n_units ? unit * WIDTH : width * panel) + share / in * apart);
                        line += share % in;
                    }
                    auto meanwhile = [&] {
                        for (int64_t i = 0; i < lines; i++, line += 64) __builtin_prefetch(line, 0, 2);
                        rest.some(some);
                    };
                    const Tiles both = x.tiles(job, t, u * unit);
                    auto multiply = [&](auto with, auto call) {
                        constexpr int R = decltype(with)::value;
                        by_tiles_of_rows<R, Q, decltype(call)::value>(w, apart, both, height, unit, meanwhile, sums, rows, fresh);
                    };
                    const std::integral_constant<int, 1> one;
                    const std::integral_constant<int, 2> two;
                    if (few && t == 0)
                        t + 1 < end ? multiply(two, std::true_type{}) : multiply(one, std::true_type{});
                    else
                        t + 1 < end ? multiply(two, std::false_type{}) : multiply(one, std::false_type{});
                }
                sums += Q * rows - (end - first + 1) / 2 * 2 * height;
            }
            if (!whole) mine.push(job.first + u);
        }
        rest.some(rest.end);
        rest = {&job, mine.plane(0), mine.each, whole ? 1 : mine.size, Q * rows, parts, Q, rows, 0, n};
        rest.begin(x.m + first * height, std::min(rows, x.rows - first * height));
    }
}

// Called by every thread of a team. Each takes its share of the panels, by all rows if there are panels for all threads.
inline void by_tiles(const Job &job, int threads) {
    const int64_t panels = (job.n + WIDTH - 1) / WIDTH, pairs = (panels + 1) / 2;
    const int64_t fitting = X_BLOCK / int64_t(sizeof(bf16)) / job.numbers_a_row();
    const int64_t most = std::clamp<int64_t>(fitting, 4 * WIDTH, 32 * WIDTH) / (2 * WIDTH) * (2 * WIDTH);
    const int64_t blocks = (job.m + most - 1) / most, all = blocks * pairs;
    static thread_local Wide x;
    static thread_local Roots roots[2];
#pragma omp for schedule(static, 1) nowait
    for (int64_t t = 0; t < threads; t++) {
        const int64_t begin = all * t / threads, end = all * (t + 1) / threads;
        Rest rest;
        for (int64_t block = 0; block < blocks; block++) {
            auto first = [=](int64_t at) { return std::min(pairs, (std::max<int64_t>(0, at - block) + blocks - 1) / blocks); };
            if (first(begin) == first(end)) continue;
            x.take<bf16>(job, job.m * block / blocks, job.m * (block + 1) / blocks);
            set_up_tiles(x.height);
            for (int64_t n = 2 * first(begin); n < std::min(panels, 2 * first(end)); n += 2) {
                if (job.end == End::GATED)
                    tiled<2>(job, x, n, std::min<int64_t>(2, panels - n), roots, rest);
                else
                    n + 1 < panels ? tiled<2>(job, x, n, 1, roots, rest) : tiled<1>(job, x, n, 1, roots, rest);
            }
        }
        rest.some(rest.end);
        let_tiles_go();
    }
}

#else

inline void by_tiles(const Job &, int) {}

#endif

}  // namespace
