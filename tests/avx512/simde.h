// Read before a kernel's source: AVX-512 by SIMDe (Debian's libsimde-dev) on a processor that has AVX2, so that what such
// processors run is tested on others too. What SIMDe 0.7.4 lacks stands here.
#pragma once

#include <immintrin.h>

#include <cstring>

#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx512.h>

#define __m512 simde__m512
#define __m512i simde__m512i
#define __m512d simde__m512d
#define __m512bh simde__m512bh

#define __AVX512F__ 1
#define __AVX512BW__ 1
#define __AVX512VL__ 1
#define __AVX512DQ__ 1
#ifndef FIRST_AVX512  // Skylake's: neither products of bytes nor of bfloat16
#define __AVX512VNNI__ 1
#define __AVX512BF16__ 1
#endif

namespace lanes_by_hand {

// to[i] = f(from[i]) for the N numbers of a register.
template <int N, class To, class From, class R, class X, class F> inline R each(X x, F f) {
    From from[N];
    To to[N];
    R result;
    static_assert(sizeof from == sizeof x && sizeof to == sizeof result, "registers are full");
    memcpy(from, &x, sizeof from);
    for (int i = 0; i < N; i++) to[i] = To(f(from[i]));
    memcpy(&result, to, sizeof to);
    return result;
}

template <class T, int N, class R> inline R masked(uint32_t mask, const void *p) {
    T x[N];
    R result;
    for (int i = 0; i < N; i++) x[i] = mask >> i & 1 ? static_cast<const T *>(p)[i] : T(0);
    memcpy(&result, x, sizeof x);
    return result;
}

inline __m512i widen16(__m256i x) {
    return each<16, int32_t, uint16_t, __m512i>(x, [](uint16_t v) { return v; });
}
inline __m512i widen8(__m128i x) {
    return each<16, int32_t, uint8_t, __m512i>(x, [](uint8_t v) { return v; });
}
inline __m256i narrow16(__m512i x) {
    return each<16, int16_t, int32_t, __m256i>(x, [](int32_t v) { return v; });
}
inline __m512 floats(__m512i x) {
    return each<16, float, int32_t, __m512>(x, [](int32_t v) { return v; });
}
inline __m512i shifted(__m512i x, int by) {
    return each<16, int32_t, int32_t, __m512i>(x, [by](int32_t v) { return v >> by; });
}

inline float greatest(__m512 x) {
    float v[16];
    memcpy(v, &x, sizeof v);
    for (int i = 1; i < 16; i++) v[0] = v[i] > v[0] ? v[i] : v[0];
    return v[0];
}

// Quarters: two of a, then two of b, each named by two bits.
inline __m512 quarters(__m512 a, __m512 b, int names) {
    float from[32], to[16];
    memcpy(from, &a, 64), memcpy(from + 16, &b, 64);
    for (int i = 0; i < 4; i++) memcpy(to + 4 * i, from + (i < 2 ? 0 : 16) + 4 * (names >> 2 * i & 3), 16);
    __m512 result;
    memcpy(&result, to, 64);
    return result;
}

}  // namespace lanes_by_hand

#undef _mm512_maskz_loadu_ps
#define _mm512_cvtepu16_epi32 lanes_by_hand::widen16
#define _mm512_cvtepu8_epi32 lanes_by_hand::widen8
#define _mm512_cvtepi32_epi16 lanes_by_hand::narrow16
#define _mm512_cvtepi32_ps lanes_by_hand::floats
#define _mm512_srai_epi32 lanes_by_hand::shifted
#define _mm512_reduce_max_ps lanes_by_hand::greatest
#define _mm512_shuffle_f32x4 lanes_by_hand::quarters
#define _mm512_maskz_loadu_epi16 lanes_by_hand::masked<uint16_t, 32, __m512i>
#define _mm512_maskz_loadu_ps lanes_by_hand::masked<float, 16, __m512>
