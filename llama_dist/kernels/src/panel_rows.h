// The rows and the sums of products with panels, see panels.cpp.
#pragma once

#include <type_traits>

#include "dots.h"
#include "roots.h"
#include "team.h"

namespace {

constexpr int64_t GROUP = 32;      // a unit is filled up to whole groups with zeros
constexpr int64_t FEW_PAIRED = 2;    // rows for which AMX is not faster, and others go by panel_few.h
constexpr int64_t FEW_BY_TILES = DOTS == 1 ? 6 : 16;  // rows that are not multiplied as in panel_tiles.h
template <class W>
constexpr bool MULTIPLIED = DOTS && std::is_same_v<W, bf16>;  // by the instructions of dots.h

// What becomes of the sums: they are y as they are, a plane for each root of the tree or one for all units; or their tree is
// added up, in x's type; or y is gated: the panels that are `up` further hold what the gate's silu is multiplied by.
enum class End { PLANES, TOTAL, GATED };

// What one call computes, the same for all its threads.
struct Job {
    bool is_bf16;  // x, and bias
    const void *x;
    int64_t ldx;
    team::Packed w;
    const void *bias;
    void *y;
    int64_t ldy, plane;
    bool y_f32;
    int64_t m, n, first;  // first < 0: one sum over all units
    End end = End::PLANES;
    int64_t up = 0;

    Lanes numbers(const void *p, int64_t at, int64_t left) const {
        return is_bf16 ? load((const bf16 *)p + at, left) : load((const float *)p + at, left);
    }
    int64_t unit_numbers() const { return (w.unit + GROUP - 1) / GROUP * GROUP; }
    int64_t numbers_a_row() const { return w.n_units * unit_numbers(); }
    int64_t panel() const { return w.block_groups * GROUP * WIDTH; }
};

// Rows m ... m + rows - 1 of x as they are multiplied, each unit filled up with zeros: floats, or what dots.h takes. Sums have
// room for `room` rows. AMX takes tiles from x itself, by pairs, as far as its rows fill them and begin with lines of the cache.
struct Wide {
    std::vector<Line> lines;
    int64_t m = -1, rows = 0, room = 0;
    int64_t height = 0, direct = 0;  // rows of a tile, where they lie in tiles; how many tiles are x's own

    template <class W> void take(const Job &job, int64_t from, int64_t to, bool tiles_too) {
        m = from, rows = room = to - from, height = direct = 0;
#if DOTS
        if (tiles_too) {
            const bool whole_lines = (int64_t(job.x) | job.ldx * int64_t(sizeof(bf16))) % 64 == 0 && job.w.unit % GROUP == 0;
            // AVX-512 is faster with what it takes together side by side.
            direct = TILES && whole_lines ? rows / (2 * HEIGHT) * 2 : 0;
            const int64_t tiles = (rows + HEIGHT - 1) / HEIGHT;
            height = direct ? HEIGHT : (rows + tiles - 1) / tiles, room = tiles * height;
        }
#endif
        const int64_t kept = direct * height, packed = m + kept;
        const int64_t needed = ((room - kept) * job.numbers_a_row() + WIDTH - 1) / WIDTH;
        if (int64_t(lines.size()) < needed) lines.resize(needed);
        if (height)
            in_tiles(job, packed);
        else if (MULTIPLIED<W>)
            in_pairs(job);
        else
            widened(job);
    }

    template <class T> const T *as() const { return (const T *)lines.data(); }
#if DOTS
    // Tile t, and one after it, from number `at` of each row on.
    Tiles tiles(const Job &job, int64_t t, int64_t at) const {
        const int64_t ldx = job.numbers_a_row();
        if (t < direct) {
            const bf16 *x = (const bf16 *)job.x + (m + t * height) * job.ldx + at;
            return {x, x + height * job.ldx, job.ldx * int64_t(sizeof(bf16)), GROUP};
        }
        const bf16 *x = as<bf16>() + ((t - direct) * ldx + at) * height;
        return {x, x + height * ldx, 64, height * GROUP};
    }
#endif

  private:
    void widened(const Job &job) {
        const int64_t each = job.unit_numbers();
        float *out = (float *)lines.data();
        for (int64_t i = m; i < m + rows; i++)
            for (int64_t u = 0; u < job.w.n_units; u++, out += each) {
                const int64_t x = i * job.ldx + u * job.w.unit;
                for (int64_t at = 0; at < each; at += WIDTH)
                    store(out + at, at < job.w.unit ? job.numbers(job.x, x + at, job.w.unit - at) : all(0.0f));
            }
    }
    void in_pairs(const Job &job) {
#if DOTS
        const int64_t each = job.unit_numbers();
        uint32_t *out = (uint32_t *)lines.data();
        for (int64_t i = m; i < m + rows; i++)
            for (int64_t u = 0; u < job.w.n_units; u++, out += each / 2 * CHAINS)
                pair_up((const bf16 *)job.x + i * job.ldx + u * job.w.unit, job.w.unit, each, out);
#endif
    }
    void in_tiles(const Job &job, int64_t packed) {
        const int64_t each = job.unit_numbers();
        bf16 *out = (bf16 *)lines.data();
        for (int64_t first = packed; first < m + room; first += height)
            for (int64_t u = 0; u < job.w.n_units; u++)
                for (int64_t at = 0; at < each; at += GROUP)
                    for (int64_t i = first; i < first + height; i++, out += GROUP) {
                        const int64_t n = i < m + rows ? std::min(GROUP, job.w.unit - at) : 0;
                        if (n < GROUP) std::fill_n(out, GROUP, bf16{});
                        const bf16 *x = (const bf16 *)job.x + i * job.ldx + u * job.w.unit + at;
                        n == GROUP ? memcpy(out, x, GROUP * sizeof *x) : memcpy(out, x, n * sizeof *x);
                    }
    }
};

template <class W, class To> INLINE void put(To *to, Lanes v, int64_t left) {
#if DOTS
    if constexpr (MULTIPLIED<W> && sizeof(To) == 2)
        if (left >= WIDTH) return narrow(to, v);
#endif
    store(to, v, left);
}

// Sums [panel][room] of the rows of `x` -> a plane of y, from panel n on.
template <class W, int P, class To>
void put_rows(const Job &job, const Wide &x, int64_t n, int64_t apart, const Lanes *sums, To *y) {
    for (int64_t i = 0; i < x.rows; i++)
        for (int p = 0; p < P; p++) {
            const int64_t at = (n + p * apart) * WIDTH, left = job.n - at;
            Lanes v = sums[p * x.room + i];
            if (job.bias) v = v + job.numbers(job.bias, at, left);
            put<W>(y + (x.m + i) * job.ldy + at, v, left);
        }
}

// The sum over all units, or those of the tree's roots -> y.
template <class W, int P> void put_roots(const Job &job, const Wide &x, int64_t n, int64_t apart, Roots &roots) {
    for (int plane = 0; plane < (job.first < 0 ? 1 : roots.size); plane++) {
        const int64_t at = plane * job.plane;
        if (job.y_f32 || !job.is_bf16)
            put_rows<W, P>(job, x, n, apart, roots.plane(plane), (float *)job.y + at);
        else
            put_rows<W, P>(job, x, n, apart, roots.plane(plane), (bf16 *)job.y + at);
    }
}

}  // namespace
