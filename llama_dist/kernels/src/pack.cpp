// Weights into groups of whole numbers (groups.h). Sixteen rows are treated at once, a row a lane, so every sum over a
// group is taken in the order of K and the numbers of a row do not depend on the other rows.
#include <algorithm>
#include <cmath>
#include <vector>

#include "groups.h"
#include "pairs.h"
#include "team.h"

namespace {

constexpr float LARGEST = 1e30f;  // of a weight; beyond it sums of squares may overflow
constexpr float SHRUNK[] = {1.0f, 0.95f, 0.9f, 0.85f, 0.8f};  // ranges that are tried, as shares of the whole one

INLINE Lanes less(Lanes a, Lanes b) { return pick(b < a, b, a); }
INLINE Lanes more(Lanes a, Lanes b) { return pick(a < b, b, a); }
INLINE Lanes near(Lanes x) { return (x + all(WHOLE)) - all(WHOLE); }  // the nearest whole number
INLINE Lanes within(Lanes x, float low, float high) { return less(more(x, all(low)), all(high)); }
INLINE Lanes inverse(Lanes x) { return pick(all(0.0f) < x, all(1.0f) / x, all(0.0f)); }

// What a block's weights are read from: [rows][columns], the rest of sixteen rows and of the units zero.
struct From {
    const float *w;
    int64_t ldw, rows, columns;
};

// Group [32] of lanes, at column `at`. Returns whether all numbers of it are sound.
INLINE bool read_group(const From &from, int64_t at, int64_t n, Lanes *group) {
    alignas(64) float numbers[GROUP][WIDTH];
    n = std::min(n, from.columns - at);
    if (n == GROUP && from.rows == WIDTH) {
        turn(from.w + at, from.ldw, GROUP, numbers[0]);
    } else {
        memset(numbers, 0, sizeof numbers);
        for (int64_t r = 0; r < from.rows; r++)
            for (int64_t i = 0; i < n; i++) numbers[i][r] = from.w[r * from.ldw + at + i];
    }
    Lanes wrong = all(0.0f);
    for (int i = 0; i < GROUP; i++) {
        group[i] = load(numbers[i]);
        const Lanes size = pick(group[i] < all(0.0f), all(0.0f) - group[i], group[i]);
        wrong = pick(size < all(LARGEST), wrong, all(1.0f));
    }
    return most(wrong) == 0.0f;
}

struct Range {
    Lanes scale, low;  // code q stands for low + scale * q
};

INLINE Lanes code(Lanes w, Range range, Lanes by) { return near(within((w - range.low) * by, 0, 15)); }

// The best of some ranges, each fitted to the codes that it gives (least squares).
INLINE Range search(const Lanes *w) {
    Lanes low = all(0.0f), high = all(0.0f), total = all(0.0f), least = all(INFINITY);
    for (int i = 0; i < GROUP; i++) {
        low = less(low, w[i]);
        high = more(high, w[i]);
        total = total + w[i];
    }
    const Lanes n = all(GROUP);
    Range best{(high - low) * all(1.0f / 15), low};
    const Range widest = best;
    for (float shrunk : SHRUNK) {
        const Range tried{widest.scale * all(shrunk), widest.low * all(shrunk)};
        Lanes by = inverse(tried.scale), codes = all(0.0f), squares = all(0.0f), products = all(0.0f);
        for (int i = 0; i < GROUP; i++) {
            const Lanes q = code(w[i], tried, by);
            codes = codes + q;
            squares = squares + q * q;
            products = products + w[i] * q;
        }
        const Lanes spread = n * squares - codes * codes;
        Range fitted{(n * products - codes * total) / spread, (squares * total - codes * products) / spread};
        const Mask above = all(0.0f) < fitted.low;  // no zero point stands for it
        fitted = {pick(above, products / squares, fitted.scale), pick(above, all(0.0f), fitted.low)};
        const Lanes can = pick(all(0.0f) < spread, fitted.scale, all(0.0f));
        fitted = {pick(all(0.0f) < can, fitted.scale, tried.scale), pick(all(0.0f) < can, fitted.low, tried.low)};
        Lanes error = all(0.0f);
        by = inverse(fitted.scale);
        for (int i = 0; i < GROUP; i++) {
            const Lanes off = code(w[i], fitted, by) * fitted.scale + fitted.low - w[i];
            error = error + off * off;
        }
        const Mask better = error < least;
        best = {pick(better, fitted.scale, best.scale), pick(better, fitted.low, best.low)};
        least = pick(better, error, least);
    }
    return best;
}

template <int BITS>
constexpr int LARGEST_CODE = (1 << (BITS - 1)) - 1;  // where codes have a sign

template <int BITS>
INLINE Lanes span(const Lanes *w) {  // what one step must be
    Lanes largest = all(0.0f);
    for (int i = 0; i < GROUP; i++) largest = more(largest, pick(w[i] < all(0.0f), all(0.0f) - w[i], w[i]));
    return largest * all(1.0f / LARGEST_CODE<BITS>);
}

INLINE void put_bytes(uint8_t *to, Lanes x) {
    float numbers[WIDTH];
    store(numbers, x);
    for (int r = 0; r < WIDTH; r++) to[r] = uint8_t(int(numbers[r]));
}

// The codes of a group, by their places.
template <int BITS>
INLINE void put_codes(uint8_t *to, const uint8_t (*codes)[WIDTH]) {
    auto line = [&](int step, int n, auto code) {
        uint32_t words[WIDTH];
        for (int r = 0; r < WIDTH; r++) {
            auto byte = [&](int k) { return uint32_t(uint8_t(code(4 * step + k, r))) << 8 * k; };
            words[r] = byte(0) | byte(1) | byte(2) | byte(3);
        }
        memcpy(to + n * STEP_BYTES, words, sizeof words);
    };
    if (BITS == 8) {
        for (int s = 0; s < STEPS; s++) line(s, s, [&](int i, int r) { return codes[i][r]; });
        return;
    }
    constexpr int HALF = GROUP / 2;  // from step s to s + 4
    for (int s = 0; s < 4; s++)
        line(s, s, [&](int i, int r) { return (codes[i][r] & 15) | (codes[i + HALF][r] & 15) << 4; });
    if (BITS == 4) return;
    for (int s = 0; s < 4; s += 2)
        line(s, 4 + s / 2, [&](int i, int r) {
            return codes[i][r] >> 4 | codes[i + HALF][r] >> 4 << 2 | codes[i + 4][r] >> 4 << 4 | codes[i + 4 + HALF][r] >> 4 << 6;
        });
}

// One unit of a block. Returns whether its numbers are sound.
template <int BITS>
bool pack_unit(const From &from, int64_t start, int64_t unit, uint8_t *codes, uint8_t *scales, float *factors) {
    const int64_t groups = (unit + GROUP - 1) / GROUP;
    std::vector<Range> ranges(groups);
    Lanes w[GROUP], largest = all(0.0f);
    bool sound = true;
    for (int64_t g = 0; g < groups; g++) {
        sound &= read_group(from, start + g * GROUP, std::min<int64_t>(GROUP, unit - g * GROUP), w);
        ranges[g] = BITS == 4 ? search(w) : Range{span<BITS>(w), all(0.0f)};
        largest = more(largest, ranges[g].scale);
    }
    const Lanes factor = pick(all(1e-30f) < largest, largest * all(1.0f / 255), all(0.0f)), over = inverse(factor);
    store(factors, factor);
    for (int64_t g = 0; g < groups; g++, codes += Format<BITS>::CODES, scales += Format<BITS>::SCALES) {
        read_group(from, start + g * GROUP, std::min<int64_t>(GROUP, unit - g * GROUP), w);
        uint8_t found[GROUP][WIDTH];
        const Lanes exact = ranges[g].scale * over;
        Lanes scale = near(exact);
        if (BITS != 4) {
            scale = less(pick(scale < exact, scale + all(1.0f), scale), all(255.0f));  // upwards: the largest must fit
            const Lanes step = scale * factor, by = inverse(step);
            constexpr int MOST_CODE = LARGEST_CODE<BITS>, ZERO = Format<BITS>::ZERO;
            for (int i = 0; i < GROUP; i++)
                put_bytes(found[i], near(within(w[i] * by, -MOST_CODE, MOST_CODE)) + all(ZERO));
        } else {
            scale = pick(all(0.0f) < exact, within(scale, 1, 255), all(0.0f));
            const Lanes step = scale * factor, by = inverse(step);
            Lanes zero = near(within(all(0.0f) - ranges[g].low * by * all(16.0f), 0, 255)), q[GROUP];
            for (int round = 0;; round++) {
                Lanes off = all(0.0f);
                for (int i = 0; i < GROUP; i++) {
                    q[i] = near(within(w[i] * by + zero * all(1.0f / 16), 0, 15));
                    off = off + (q[i] - w[i] * by);
                }
                if (round == 2) break;
                zero = near(within(off * all(16.0f / GROUP), 0, 255));  // the best one for these codes
            }
            for (int i = 0; i < GROUP; i++) put_bytes(found[i], q[i]);
            put_bytes(scales + WIDTH, zero);
        }
        put_bytes(scales, scale);
        put_codes<BITS>(codes, found);
    }
    return sound;
}

// The nearest e4m3 of numbers up to 448 in size, ties to even, as bytes.
INLINE void put_floats(uint8_t *to, Lanes x) {
    float numbers[WIDTH], eighths[WIDTH];
    store(numbers, x);
    // Below 2^-6 there is no leading one: these are multiples of 2^-9.
    store(eighths, pick(x < all(0.0f), all(0.0f) - x, x) * all(512.0f) + all(WHOLE));
    for (int r = 0; r < WIDTH; r++) {
        uint32_t bits, small;
        memcpy(&bits, numbers + r, 4);
        memcpy(&small, eighths + r, 4);
        const uint32_t size = bits & 0x7fffffff;
        const uint32_t normal = ((size + 0x7ffff + (size >> 20 & 1)) >> 20) - (120 << 3);
        to[r] = uint8_t((size < 0x3c800000 ? small & 15 : normal) | (bits >> 24 & 0x80));
    }
}

// One unit of a block as floats, the largest of a row being 448. Returns whether its numbers are sound.
bool pack_floats(const From &from, int64_t start, int64_t unit, uint8_t *codes, float *factors) {
    const int64_t groups = (unit + GROUP - 1) / GROUP;
    Lanes w[GROUP], largest = all(0.0f);
    bool sound = true;
    for (int64_t g = 0; g < groups; g++) {
        sound &= read_group(from, start + g * GROUP, std::min<int64_t>(GROUP, unit - g * GROUP), w);
        for (int i = 0; i < GROUP; i++) largest = more(largest, pick(w[i] < all(0.0f), all(0.0f) - w[i], w[i]));
    }
    const Lanes factor = pick(all(1e-30f) < largest, largest * all(1.0f / 448), all(0.0f)), by = inverse(factor);
    store(factors, factor);
    for (int64_t g = 0; g < groups; g++, codes += Format<8>::CODES) {
        read_group(from, start + g * GROUP, std::min<int64_t>(GROUP, unit - g * GROUP), w);
        uint8_t found[GROUP][WIDTH];
        for (int i = 0; i < GROUP; i++) put_floats(found[i], w[i] * by);
        put_codes<8>(codes, found);
    }
    return sound;
}

}  // namespace

// w [rows, columns], rows ldw apart, into blocks of sixteen rows of n_units units; what is beyond w is zero. Returns 0, or
// 1 + the first of a block of sixteen rows that hold a NaN or a number beyond 1e30.
extern "C" int llama_dist_pack(int bits, const float *w, int64_t ldw, int64_t rows, int64_t columns, int64_t unit,
                               int64_t n_units, uint8_t *codes, uint8_t *scales, float *factors, int threads) {
    const int64_t blocks = (rows + WIDTH - 1) / WIDTH, unit_groups = (unit + GROUP - 1) / GROUP;
    int64_t fault = INT64_MAX;
#pragma omp parallel for schedule(static) num_threads(threads) reduction(min : fault)
    for (int64_t b = 0; b < blocks; b++) {
        const From from{w + b * WIDTH * ldw, ldw, std::min<int64_t>(WIDTH, rows - b * WIDTH), columns};
        for (int64_t u = 0; u < n_units; u++) {
            const int64_t i = b * n_units + u, g = i * unit_groups;
            auto pack = [&](auto with) {
                constexpr int BITS = decltype(with)::value;
                uint8_t *c = codes + g * Format<BITS>::CODES, *s = scales + g * Format<BITS>::SCALES;
                return pack_unit<BITS>(from, u * unit, unit, c, s, factors + i * WIDTH);
            };
            const bool sound = bits == team::E4M3 ? pack_floats(from, u * unit, unit, codes + g * Format<8>::CODES, factors + i * WIDTH)
                               : bits == 8 ? pack(std::integral_constant<int, 8>{})
                               : bits == 6 ? pack(std::integral_constant<int, 6>{})
                                           : pack(std::integral_constant<int, 4>{});
            if (!sound) fault = std::min(fault, b * WIDTH);
        }
    }
    return fault == INT64_MAX ? 0 : int(fault) + 1;
}
