// The gate of the feed-forward, sixteen numbers of a row at a time.
#pragma once

#include <cmath>

#include "rows.h"

namespace {

// e^x, within an ulp or two; infinite from about 88.4 on, zero below the normal numbers.
INLINE Lanes exp(Lanes x) {
    const Lanes high = all(0x1.715476p+0f), low = all(0x1.4ae0cp-26f);  // together log2(e)
    Lanes whole = (x * high + all(WHOLE));
    Lanes n = whole - all(WHOLE);
    Lanes r = fma(x, low, fma(x, high, all(0.0f) - n));
    Lanes y = exp2_fraction(r) * power(whole);
    y = pick(x < all(-87.0f), all(0.0f), y);
    return pick(all(88.37f) < x, all(INFINITY), y);
}

// silu(a), rounded, times b
template <class T>
INLINE Lanes gated(Lanes a, Lanes b) {
    return rounded<T>(a / (all(1.0f) + exp(all(0.0f) - a))) * b;
}

}  // namespace
