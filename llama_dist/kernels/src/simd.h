// Sixteen float lanes, and how bf16 and float rows are loaded into them. One algorithm stands on top of these, on any
// processor: AVX-512 by its instructions, others by the compiler's vector types.
#pragma once
#include <cstdint>
#include <cstring>

// Which instructions: 2 AVX-512, 0 what every processor has.
#ifndef LANES
#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#define LANES 2
#else
#define LANES 0
#endif
#endif

#if LANES == 2
#include <immintrin.h>
#endif

using bf16 = uint16_t;

static inline float widen(bf16 x) {
    uint32_t bits = uint32_t(x) << 16;
    float f;
    memcpy(&f, &bits, 4);
    return f;
}

static inline float widen(float x) { return x; }

// Round to nearest, ties to even; a NaN stays one.
static inline bf16 narrow(float f) {
    uint32_t bits;
    memcpy(&bits, &f, 4);
    if ((bits & 0x7fffffff) > 0x7f800000) return bf16((bits >> 16) | 0x40);
    return bf16((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

#if LANES == 2

using V = __m512;
static inline V zero() { return _mm512_setzero_ps(); }
static inline V add(V a, V b) { return _mm512_add_ps(a, b); }
static inline void store(float *p, V v) { _mm512_storeu_ps(p, v); }

// A row's next entries: 32 of bf16, 16 of float; `n` of them where the row ends, zeros after.
struct Bf16 {
    using T = bf16;
    using X = __m512i;
    static constexpr int STEP = 32;
    static inline X load(const T *p) { return _mm512_loadu_si512(p); }
    static inline X load(const T *p, int n) { return _mm512_maskz_loadu_epi16((__mmask32(1) << n) - 1, p); }
    static inline V dot(V acc, X a, X b) {
#if defined(__AVX512BF16__)
        return _mm512_dpbf16_ps(acc, (__m512bh)a, (__m512bh)b);
#else
        const __m512i high = _mm512_set1_epi32(int(0xffff0000));
        acc = _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_slli_epi32(a, 16)), _mm512_castsi512_ps(_mm512_slli_epi32(b, 16)), acc);
        return _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_and_si512(a, high)), _mm512_castsi512_ps(_mm512_and_si512(b, high)), acc);
#endif
    }
};

struct F32 {
    using T = float;
    using X = __m512;
    static constexpr int STEP = 16;
    static inline X load(const T *p) { return _mm512_loadu_ps(p); }
    static inline X load(const T *p, int n) { return _mm512_maskz_loadu_ps(__mmask16((1u << n) - 1), p); }
    static inline V dot(V acc, X a, X b) { return _mm512_fmadd_ps(a, b, acc); }
};

// Lane i of the result is the sum of v[i]'s lanes, every one taken in the same tree.
static inline V sums(const V *v) {
    V u[4];
    for (int i = 0; i < 4; i++) {
        V a = add(_mm512_unpacklo_ps(v[4 * i], v[4 * i + 1]), _mm512_unpackhi_ps(v[4 * i], v[4 * i + 1]));
        V b = add(_mm512_unpacklo_ps(v[4 * i + 2], v[4 * i + 3]), _mm512_unpackhi_ps(v[4 * i + 2], v[4 * i + 3]));
        __m512d c = _mm512_castps_pd(a), d = _mm512_castps_pd(b);
        u[i] = add(_mm512_castpd_ps(_mm512_unpacklo_pd(c, d)), _mm512_castpd_ps(_mm512_unpackhi_pd(c, d)));
    }
    V p = add(_mm512_shuffle_f32x4(u[0], u[1], 0x88), _mm512_shuffle_f32x4(u[0], u[1], 0xdd));
    V q = add(_mm512_shuffle_f32x4(u[2], u[3], 0x88), _mm512_shuffle_f32x4(u[2], u[3], 0xdd));
    return add(_mm512_shuffle_f32x4(p, q, 0x88), _mm512_shuffle_f32x4(p, q, 0xdd));
}

#else

typedef float V __attribute__((vector_size(64)));
typedef uint32_t U __attribute__((vector_size(64)));
static inline V zero() { return V{}; }
static inline V add(V a, V b) { return a + b; }
static inline void store(float *p, V v) { memcpy(p, &v, 64); }

static inline V fma(V a, V b, V c) {
    V r;
    for (int i = 0; i < 16; i++) r[i] = __builtin_fmaf(a[i], b[i], c[i]);
    return r;
}

struct Bf16 {
    using T = bf16;
    using X = U;
    static constexpr int STEP = 32;
    static inline X load(const T *p) {
        X x;
        memcpy(&x, p, 64);
        return x;
    }
    static inline X load(const T *p, int n) {
        X x{};
        memcpy(&x, p, 2 * n);
        return x;
    }
    static inline V dot(V acc, X a, X b) {
        acc = fma((V)(a << 16), (V)(b << 16), acc);
        return fma((V)(a & 0xffff0000u), (V)(b & 0xffff0000u), acc);
    }
};

struct F32 {
    using T = float;
    using X = V;
    static constexpr int STEP = 16;
    static inline X load(const T *p) {
        X x;
        memcpy(&x, p, 64);
        return x;
    }
    static inline X load(const T *p, int n) {
        X x{};
        memcpy(&x, p, 4 * n);
        return x;
    }
    static inline V dot(V acc, X a, X b) { return fma(a, b, acc); }
};

static inline V sums(const V *v) {
    V r;
    for (int i = 0; i < 16; i++) {
        float s[16];
        memcpy(s, &v[i], 64);
        for (int width = 8; width; width /= 2)
            for (int j = 0; j < width; j++) s[j] += s[j + width];
        r[i] = s[0];
    }
    return r;
}

#endif
