// Products of many rows of bf16 with packed weights by AMX, to the bits of quantized.cpp.
//
// Rounded to multiples of its group's power of two a bf16 is a bf16 still, and so is a code less its zero. Products of these
// and their sums over a group are exact as floats, in any order. So a group goes through AMX's tiles, and what is left is to
// scale its sums and to add them up, group by group, which is done while the next groups are multiplied.
#pragma once

#include "dots.h"
#include "quantized_rows.h"
#include "roots.h"

#define PACKED_TILES (TILES && WHOLES == 2)

namespace {

#if PACKED_TILES

constexpr int64_t X_BLOCK = 1 << 20;  // bytes of rows of x that stay in the second cache
constexpr int64_t FEWEST = 9;         // rows for which tiles are faster
constexpr int BATCH = 4;              // groups that are multiplied at once
constexpr int TILE = GROUP * WIDTH;   // numbers of a tile of weights

// A tile's rows of weights are pairs of numbers along K: of each four of a group the first and the third, and the second and
// the fourth, the latter two 256 times what they are. x has the same order, and a 256th of the latter.
constexpr float SECOND = 256.0f;
constexpr int PARTS = 16;  // codes of four bits are taken times sixteen, as their zeros are

// The codes of a step as floats less their zeros: 2^23 in the place of the exponent, and taken off again with the zero.
INLINE void put_step(__m512i codes, __m512 zeros, __m512 zeros_of_second, int step, bf16 *to) {
    const __m512i exponent = _mm512_set1_epi32(0x4b000000), low = _mm512_set1_epi32(0xff), high = _mm512_set1_epi32(0xff00);
    const __m512i third = _mm512_srli_epi32(codes, 16);
    auto number = [&](__m512i from, __m512i mask, __m512 off) {
        const __m512i bits = _mm512_or_si512(_mm512_and_si512(from, mask), exponent);
        return _mm512_castps_si512(_mm512_sub_ps(_mm512_castsi512_ps(bits), off));
    };
    auto pair = [&](int row, __m512i a, __m512i b) {
        _mm512_store_si512(to + row * GROUP, _mm512_mask_blend_epi16(0xaaaaaaaa, _mm512_srli_epi32(a, 16), b));
    };
    pair(2 * step, number(codes, low, zeros), number(third, low, zeros));
    pair(2 * step + 1, number(codes, high, zeros_of_second), number(third, high, zeros_of_second));
}

// A group of a block of weights as a tile.
template <int BITS> INLINE void put_tile(const uint8_t *codes, const uint8_t *scales, bf16 *to) {
    const __m512 zeros = BITS == 4 ? lanes_of(scales + WIDTH).v : _mm512_set1_ps(Format<BITS>::ZERO);
    const __m512 off = _mm512_add_ps(zeros, _mm512_set1_ps(0x1p23f));
    const __m512 off_second = _mm512_fmadd_ps(zeros, _mm512_set1_ps(SECOND), _mm512_set1_ps(0x1p23f));
#pragma GCC unroll 4
    for (int step = 0; step < STEPS / 2; step++) {
        __m512i a, b;
        if (BITS == 4) {
            const __m512i both = _mm512_loadu_si512(codes + step * STEP_BYTES), high = _mm512_set1_epi8(int8_t(0xf0));
            a = _mm512_and_si512(_mm512_slli_epi16(both, 4), high), b = _mm512_and_si512(both, high);
        } else {
            read<BITS>(codes, step, a, b);
        }
        put_step(a, off, off_second, step, to);
        put_step(b, off, off_second, step + 4, to);
    }
}

// Rows of x, rounded, as tiles: [tile][group][height][32]. The last tile is filled up with zeros.
struct TileRows {
    std::vector<Line> lines;
    int64_t m, rows, height, tiles, groups;

    template <int BITS> void take(const Job &job, int64_t from, int64_t to) {
        m = from, rows = to - from, groups = job.groups();
        tiles = (rows + WIDTH - 1) / WIDTH, height = (rows + tiles - 1) / tiles;
        if (int64_t(lines.size()) < tiles * height * groups) lines.resize(tiles * height * groups);
        for (int64_t i = 0; i < tiles * height; i++) put_row<BITS>(job, i, &lines[i / height * groups * height + i % height]);
    }
    const bf16 *tile(int64_t t) const { return (const bf16 *)(lines.data() + t * groups * height); }

  private:
    template <int BITS> void put_row(const Job &job, int64_t i, Line *to) {
        const bf16 *x = (const bf16 *)job.x + (m + i) * job.ldx;
        for (int64_t u = 0; u < job.w.n_units; u++, x += job.w.unit)
            for (int64_t at = 0; at < job.unit_groups() * GROUP; at += GROUP, to += height)
                put_group<BITS>(x + at, i < rows ? std::min<int64_t>(GROUP, job.w.unit - at) : 0, to);
    }
    // As steps_of says, by adding what leaves no room for less than a step.
    template <int BITS> static inline __attribute__((always_inline)) void put_group(const bf16 *x, int64_t n, Line *to) {
        const __m512i numbers = n == GROUP ? _mm512_loadu_si512(x) : _mm512_maskz_loadu_epi16((__mmask32)((1ull << n) - 1), x);
        const __m512i sizes = _mm512_and_si512(numbers, _mm512_set1_epi16(0x7fff));
        const __m256i half = _mm256_max_epu16(_mm512_castsi512_si256(sizes), _mm512_extracti64x4_epi64(sizes, 1));
        const __m128i less = _mm_max_epu16(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
        const uint32_t size = 0xffffu & ~uint32_t(_mm_cvtsi128_si32(_mm_minpos_epu16(_mm_xor_si128(less, _mm_set1_epi16(-1)))));
        const float largest = number_of(size << 16);
        const bool counts = largest >= SMALLEST && largest < LARGEST;
        const float room = counts ? power_below(largest) * (2.0f * WHOLE / Format<BITS>::MOST) : 0.0f;
        const float part = counts ? (BITS == 4 ? 1.0f / PARTS : 1.0f) : largest < LARGEST ? 0.0f : NAN;
        auto rounded = [&](__m512i bits, float by) {
            const __m512 over = _mm512_add_ps(_mm512_castsi512_ps(bits), _mm512_set1_ps(room));
            return _mm512_castps_si512(_mm512_mul_ps(_mm512_sub_ps(over, _mm512_set1_ps(room)), _mm512_set1_ps(by)));
        };
        const __m512i even = rounded(_mm512_slli_epi32(numbers, 16), part);
        const __m512i odd = rounded(_mm512_and_si512(numbers, _mm512_set1_epi32(int(0xffff0000))), part / SECOND);
        const __m512i pairs = _mm512_mask_blend_epi16(0xaaaaaaaa, _mm512_srli_epi32(even, 16), odd);
        const __m512i order = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15));
        _mm512_store_si512(to, _mm512_shuffle_epi8(pairs, order));
    }
};

// Where a thread's rows, tiles of a block's weights, sums that are yet to be scaled, and roots are.
struct Desk {
    TileRows x;
    std::vector<Line> weights;
    alignas(64) Lanes sums[2][BATCH][WIDTH];
    Roots roots;
};

// Sums of groups i to stop, scaled and added to `part`, row by row.
template <int SCALES>
INLINE void add_groups(const Lanes (*sums)[WIDTH], const uint8_t *scales, int64_t i, int64_t stop, Lanes *part) {
    Lanes v[WIDTH];
#pragma GCC unroll 16
    for (int j = 0; j < WIDTH; j++) v[j] = part[j];
    for (; i < stop; i++) {
        const Lanes scale = lanes_of(scales + i * SCALES);
#pragma GCC unroll 16
        for (int j = 0; j < WIDTH; j++) v[j] = fma(sums[i][j], scale, v[j]);
    }
#pragma GCC unroll 16
    for (int j = 0; j < WIDTH; j++) part[j] = v[j];
}

// Tile t of the rows by block n of the weights, whose groups' sums are scaled and added up while the next ones are multiplied.
template <int BITS> void tile_by_block(const Job &job, Desk &desk, int64_t t, int64_t n) {
    constexpr int SCALES = Format<BITS>::SCALES;
    const bool whole = job.first < 0;
    const int64_t a_unit = job.unit_groups(), groups = job.groups(), height = desk.x.height;
    const bf16 *x = desk.x.tile(t), *w = (const bf16 *)desk.weights.data();
    const uint8_t *scales = job.w.scales + n * job.w.block_groups * SCALES;
    const float *factors = job.w.factors + n * job.w.block_units * WIDTH;
    Lanes part[WIDTH];
    int64_t unit = 0, left = a_unit;
    desk.roots.start(WIDTH);
    if (whole) desk.roots.next(true);
    for (int i = 0; i < WIDTH; i++) part[i] = all(0.0f);
    auto multiply = [&](int64_t count, Lanes (*to)[WIDTH]) __attribute__((always_inline)) {
        const int64_t next = height * GROUP;
        written();
        _tile_loadd(4, x, 64);
        _tile_loadd(6, w, 64);
        _tile_zero(0);
        _tile_dpbf16ps(0, 4, 6);
        _tile_stored(0, to[0], 64);
        if (count > 1) {
            _tile_loadd(5, x + next, 64);
            _tile_loadd(7, w + TILE, 64);
            _tile_zero(1);
            _tile_dpbf16ps(1, 5, 7);
            _tile_stored(1, to[1], 64);
        }
        if (count > 2) {
            _tile_loadd(4, x + 2 * next, 64);
            _tile_loadd(6, w + 2 * TILE, 64);
            _tile_zero(2);
            _tile_dpbf16ps(2, 4, 6);
            _tile_stored(2, to[2], 64);
        }
        if (count > 3) {
            _tile_loadd(5, x + 3 * next, 64);
            _tile_loadd(7, w + 3 * TILE, 64);
            _tile_zero(3);
            _tile_dpbf16ps(3, 5, 7);
            _tile_stored(3, to[3], 64);
        }
        written();
        x += count * next, w += count * TILE;
    };
    auto add = [&](const Lanes (*sums)[WIDTH], int64_t count) {
        for (int64_t i = 0; i < count;) {
            const int64_t stop = std::min(count, i + left);
            left -= stop - i;
            add_groups<SCALES>(sums, scales, i, stop, part);
            i = stop;
            if (left) break;
            const Lanes factor = load(factors + unit * WIDTH);
            Lanes *total = whole ? desk.roots.plane(0) : desk.roots.next(false);
            for (int j = 0; j < WIDTH; j++) total[j] = whole ? total[j] + part[j] * factor : part[j] * factor;
            for (int j = 0; j < WIDTH; j++) part[j] = all(0.0f);
            if (!whole) desk.roots.push(job.first + unit);
            unit++, left = a_unit;
        }
        scales += count * SCALES;
    };
    const int64_t m = desk.x.m + t * height, rows = std::min(height, desk.x.rows - t * height);
    // The next block's codes are called in meanwhile, a share with every batch.
    const int64_t batches = (groups + BATCH - 1) / BATCH, all_lines = groups * Format<BITS>::CODES / 64;
    const int64_t lines = (all_lines + batches * desk.x.tiles - 1) / (batches * desk.x.tiles);
    const uint8_t *ahead = job.w.codes + (n + 1) * job.w.block_groups * Format<BITS>::CODES + t * batches * lines * 64;
    int64_t before = 0;
    int turn = 0;
    for (int64_t g = 0; g < groups; turn ^= 1) {
        const int64_t count = std::min<int64_t>(BATCH, groups - g);
        multiply(count, desk.sums[turn]);
        for (int64_t i = 0; i < lines; i++, ahead += 64) __builtin_prefetch(ahead, 0, 2);
        add(desk.sums[turn ^ 1], before);
        g += count, before = count;
    }
    add(desk.sums[turn ^ 1], before);
    for (int p = 0; p < (whole ? 1 : desk.roots.size); p++)
        for (int64_t i = 0; i < rows; i++) put<bf16>(job, p, m + i, n * WIDTH, desk.roots.plane(p)[i]);
}

template <int BITS> void rows_by_block(const Job &job, Desk &desk, int64_t n) {
    constexpr int CODES = Format<BITS>::CODES, SCALES = Format<BITS>::SCALES;
    const int64_t groups = job.groups(), first = n * job.w.block_groups;
    if (int64_t(desk.weights.size()) < groups * WIDTH) desk.weights.resize(groups * WIDTH);
    bf16 *to = (bf16 *)desk.weights.data();
    for (int64_t g = first; g < first + groups; g++, to += TILE)
        put_tile<BITS>(job.w.codes + g * CODES, job.w.scales + g * SCALES, to);
    for (int64_t t = 0; t < desk.x.tiles; t++) tile_by_block<BITS>(job, desk, t, n);
}

// Called by every thread of a team. Each takes its share of the rows, or if they are few all rows by its share of the blocks.
template <int BITS> void by_tiles(const Job &job, int threads) {
    const int64_t n_blocks = (job.n + WIDTH - 1) / WIDTH, width = blocks_a_thread(job.n, threads);
    const int64_t most = std::clamp<int64_t>(X_BLOCK / 64 / job.groups(), 4 * WIDTH, 32 * WIDTH) / WIDTH * WIDTH;
    const bool by_rows = job.m >= 4 * WIDTH * threads && job.m > n_blocks * 2;
    static thread_local Desk desk;
#pragma omp for schedule(static, 1) nowait
    for (int64_t t = 0; t < threads; t++) {
        const int64_t m = by_rows ? job.m * t / threads : 0, m_end = by_rows ? job.m * (t + 1) / threads : job.m;
        const int64_t first = by_rows ? 0 : t * width, end = by_rows ? n_blocks : std::min(n_blocks, first + width);
        const int64_t parts = (m_end - m + most - 1) / most;
        for (int64_t part = 0; first < end && part < parts; part++) {
            desk.x.take<BITS>(job, m + (m_end - m) * part / parts, m + (m_end - m) * (part + 1) / parts);
            set_up_tiles(desk.x.height);
            for (int64_t n = first; n < end; n++) rows_by_block<BITS>(job, desk, n);
            let_tiles_go();
        }
    }
}

#endif

}  // namespace
