// Rows of x as whole numbers, for products with packed weights, see quantized.cpp.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "groups.h"
#include "team.h"

namespace {

constexpr float SMALLEST = 1e-30f;  // a group of x whose largest number is below counts as zero
constexpr float LARGEST = 1e30f;    // and one with a number that is not below this as not finite

// What one call computes, the same for all its threads.
struct Job {
    const void *x;
    int64_t ldx;
    team::Packed w;
    const void *bias;
    void *y;
    int64_t ldy, plane;
    bool y_f32;
    int64_t m, n, first;  // first < 0: one sum over all units
    int64_t unit_groups() const { return (w.unit + GROUP - 1) / GROUP; }
    int64_t groups() const { return w.n_units * unit_groups(); }
};

inline int64_t blocks_a_thread(int64_t n, int threads) { return ((n + WIDTH - 1) / WIDTH + threads - 1) / threads; }

constexpr int X_BYTES = 2 * GROUP;  // of a group of x

// Rows of x as whole numbers: [m][groups][64], as groups.h places them, and of each group its scale and sum.
struct Rows {
    std::vector<int8_t> numbers;
    std::vector<float> scales;
    std::vector<int> sums;
};

INLINE Lanes magnitude(Lanes x) { return pick(x < all(0.0f), all(0.0f) - x, x); }

INLINE float number_of(uint32_t bits) {
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

INLINE float power_below(float x) {  // the greatest power of two that is not above x, of the normal numbers
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return number_of(bits & 0x7f800000);
}

// By what a group's numbers become whole ones, and the power of two that is the scale of these, or NaN where one is not finite.
struct Steps {
    float by, scale;
};

INLINE Steps steps_of(Lanes a, Lanes b, int most_of) {
    const Lanes p = magnitude(a), q = magnitude(b);
    const float largest = most(pick(p < q, q, p));
    const bool counts = largest >= SMALLEST && largest < LARGEST;
    const float scale = counts ? power_below(largest) * 2 / most_of : 0.0f, none = sum(a * all(0.0f) + b * all(0.0f));
    return {counts ? 1 / scale : 0.0f, largest < LARGEST ? scale + none : NAN};
}

// n numbers, at most 32, then zeros -> whole numbers from -most to most.
template <class T>
INLINE void round_group(const T *x, int64_t n, int most_of, int8_t *to, float &scale, int &total) {
    const Lanes a = load(x, n), b = n > WIDTH ? load(x + WIDTH, n - WIDTH) : all(0.0f);
    const Steps steps = steps_of(a, b, most_of);
    scale = steps.scale;
    uint32_t bits[GROUP];  // with WHOLE added a whole number stands in the low bits
    store((float *)bits, a * all(steps.by) + all(WHOLE));
    store((float *)bits + WIDTH, b * all(steps.by) + all(WHOLE));
    int16_t numbers[GROUP];
    total = 0;
    for (int i = 0; i < GROUP; i++) numbers[i] = int16_t(bits[i]);
    for (int i = 0; i < GROUP; i++) total += numbers[i];
    place(numbers, to);
}

template <class T, int BITS>
void round_rows(const Job &job, int64_t m, int64_t m_end, Rows &rows) {
    const int64_t a_unit = job.unit_groups(), groups = job.groups(), n = (m_end - m) * groups;
    if (int64_t(rows.scales.size()) < n) {
        rows.numbers.resize(n * X_BYTES);
        rows.scales.resize(n);
        rows.sums.resize(n);
    }
    for (int64_t i = 0; m < m_end; m++)
        for (int64_t g = 0; g < groups; g++, i++) {
            const int64_t at = g % a_unit * GROUP, left = std::min<int64_t>(GROUP, job.w.unit - at);
            const T *x = (const T *)job.x + m * job.ldx + g / a_unit * job.w.unit + at;
            round_group(x, left, Format<BITS>::MOST, &rows.numbers[i * X_BYTES], rows.scales[i], rows.sums[i]);
        }
}

template <class T> INLINE void put(const Job &job, int64_t plane, int64_t m, int64_t n, Lanes v) {
    const int64_t left = job.n - n, at = plane * job.plane + m * job.ldy + n;
    if (job.bias) v = v + load((const T *)job.bias + n, left);
    job.y_f32 ? store((float *)job.y + at, v, left) : store((T *)job.y + at, v, left);
}

}  // namespace
