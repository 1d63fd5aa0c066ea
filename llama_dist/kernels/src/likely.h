// Of a row of logits: the likeliest tokens, ties by rising id, and the weights of all, exp((x - greatest) / temperature).
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "rows.h"

namespace {

constexpr double LOG2E = 1.4426950408889634;
constexpr int64_t PART = 256;  // numbers whose sum is taken in floats

INLINE double number(const float *p) { return *p; }
INLINE double number(const bf16 *p) {
    const uint32_t bits = uint32_t(p->bits) << 16;
    float f;
    memcpy(&f, &bits, 4);
    return f;
}

// Whether token a comes before token b.
template <class T> INLINE bool likelier(const T *x, int64_t a, int64_t b) {
    const double p = number(x + a), q = number(x + b);
    return p > q || (p == q && a < b);
}

struct Likeliest {
    int64_t at;   // the first of the greatest
    bool finite;  // whether all numbers are; a NaN is never the greatest
};

template <class T> Likeliest likeliest_of(const T *x, int64_t n) {
    Lanes greatest = all(-INFINITY), found_at = all(0.0f), faults = all(0.0f);
    for (int64_t i = 0; i < n; i += WIDTH) {
        Lanes v = load(x + i, n - i);
        faults = fma(v, all(0.0f), faults);  // 0, or NaN for ever
        if (n - i < WIDTH) v = pick(between(0, int(n - i)), v, all(-INFINITY));
        const Mask more = greatest < v;
        greatest = pick(more, v, greatest);
        found_at = pick(more, all(float(i / WIDTH)), found_at);
    }
    float values[WIDTH], places[WIDTH];
    store(values, greatest);
    store(places, found_at);
    int64_t best = 0, at = int64_t(places[0]) * WIDTH;
    for (int lane = 1; lane < WIDTH; lane++) {
        const int64_t place = int64_t(places[lane]) * WIDTH + lane;
        if (values[lane] > values[best] || (values[lane] == values[best] && place < at)) best = lane, at = place;
    }
    return {at, sum(faults) == 0};
}

// The `k` likeliest, likeliest first.
template <class T> std::vector<int64_t> likeliest_few(const T *x, int64_t n, int64_t k) {
    std::vector<int64_t> few;
    auto order = [x](int64_t a, int64_t b) { return likelier(x, a, b); };  // the heap's front is the least likely
    for (int64_t at = 0; at < n; at++) {
        if (int64_t(few.size()) == k) {
            const double least = number(x + few.front());
            while (at + WIDTH < n && most(load(x + at)) <= least) at += WIDTH;
            if (number(x + at) <= least) continue;
            std::pop_heap(few.begin(), few.end(), order);
            few.pop_back();
        }
        few.push_back(at);
        std::push_heap(few.begin(), few.end(), order);
    }
    std::sort_heap(few.begin(), few.end(), order);
    return few;
}

// The sum of the lanes that f(at) gives, in an order that the numbers' places alone decide.
template <class F> INLINE double lanes_total(int64_t from, int64_t to, F f) {
    double whole = 0;
    for (int64_t part = from; part < to; part += PART) {
        Lanes lanes = all(0.0f);
        for (int64_t at = part; at < std::min(to, part + PART); at += WIDTH) lanes = lanes + f(at);
        whole += sum(lanes);
    }
    return whole;
}

// The sum of all weights; each WIDTH of them, zeros at the end, are given to take(at, lanes).
template <class T, class F> INLINE double weigh(const T *x, int64_t n, double greatest, double temperature, F take) {
    const Lanes top = all(float(greatest)), scale = all(float(LOG2E / temperature));
    return lanes_total(0, n, [&](int64_t at) {
        Lanes e = exp2((load(x + at, n - at) - top) * scale);
        if (at + WIDTH > n) e = pick(between(0, int(n - at)), e, all(0.0f));
        take(at, e);
        return e;
    });
}

}  // namespace
