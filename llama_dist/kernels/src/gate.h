// The gate of the feed-forward, sixteen numbers of a row at a time.
#pragma once

#include <cmath>

#include "dots.h"

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

#if DOTS
// silu(a), to some tens of ulps of floats, -0 from about -87.3 on. Where instructions for bf16 make the sums processors without
// them have other bits anyway, so this may be another, faster one.
INLINE Lanes silu_fast(Lanes a) {
    const __m512 power = power_of_two(_mm512_mul_ps(a.v, _mm512_set1_ps(-1.4426950408889634f)));
    const __m512 below = _mm512_add_ps(power, _mm512_set1_ps(1.0f));
    if (DOTS == 1) return {_mm512_div_ps(a.v, below)};  // of more than one maker, whose rcp14 differ
    const __m512 near = _mm512_rcp14_ps(below);
    // Past 2^126 a step towards the quotient has no numbers: there it is zero.
    const __mmask16 counts = _mm512_cmp_ps_mask(below, _mm512_set1_ps(0x1p126f), _CMP_NGE_UQ);
    const __m512 off = _mm512_fnmadd_ps(below, near, _mm512_set1_ps(1.0f));
    return {_mm512_mul_ps(a.v, _mm512_maskz_fmadd_ps(counts, near, off, near))};
}
#endif

// silu(a), rounded, times b: the first `left` of sixteen
template <class T>
INLINE void put_gated(T *to, Lanes a, Lanes b, int64_t left) {
#if DOTS
    if constexpr (sizeof(T) == 2) {
        const Lanes v = narrowed(silu_fast(a)) * b;
        return left >= WIDTH ? narrow(to, v) : store(to, v, left);
    }
#endif
    store(to, rounded<T>(a / (all(1.0f) + exp(all(0.0f) - a))) * b, left);
}

}  // namespace
