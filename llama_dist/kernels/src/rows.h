// Sixteen float lanes, the one shape in which rows are computed: AVX-512, two AVX2 halves, or four plain vectors.
//
// Every operation is exactly rounded lane by lane and sums take one fixed tree, so a row's bits are a function of its own
// numbers alone. A row's end is computed by the same instructions on lanes filled up with zeros.
#pragma once

#include <cstdint>
#include <cstring>

#define INLINE static inline __attribute__((always_inline))

// Which lanes: 2 AVX-512, 1 AVX2, 0 what every processor has. A test compiles all three and wants the same bits.
#ifndef LANES
#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512DQ__)
#define LANES 2
#elif defined(__AVX2__) && defined(__FMA__)
#define LANES 1
#else
#define LANES 0
#endif
#endif

#if defined(__ARM_NEON)
#include <arm_neon.h>
#elif defined(__SSE2__)
#include <immintrin.h>
#endif

namespace {

constexpr int WIDTH = 16;
constexpr int PAGE = WIDTH;  // slots of a page of the cache

struct bf16 {
    uint16_t bits;
};

#if LANES == 2

struct Lanes {
    __m512 v;
};
struct Mask {
    __mmask16 m;
};

INLINE Lanes all(float x) { return {_mm512_set1_ps(x)}; }
INLINE Lanes load(const float *p) { return {_mm512_loadu_ps(p)}; }
INLINE Lanes load(const bf16 *p) {
    __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(p));
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16))};
}
INLINE void store(float *p, Lanes a) { _mm512_storeu_ps(p, a.v); }
INLINE Lanes operator+(Lanes a, Lanes b) { return {_mm512_add_ps(a.v, b.v)}; }
INLINE Lanes operator-(Lanes a, Lanes b) { return {_mm512_sub_ps(a.v, b.v)}; }
INLINE Lanes operator*(Lanes a, Lanes b) { return {_mm512_mul_ps(a.v, b.v)}; }
INLINE Lanes operator/(Lanes a, Lanes b) { return {_mm512_div_ps(a.v, b.v)}; }
INLINE Lanes fma(Lanes a, Lanes b, Lanes c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
INLINE Mask operator<(Lanes a, Lanes b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ)}; }
INLINE Lanes pick(Mask m, Lanes yes, Lanes no) { return {_mm512_mask_blend_ps(m.m, no.v, yes.v)}; }
// Lanes from `first` up to `last`.
INLINE Mask between(int first, int last) { return {static_cast<__mmask16>((0xffffu << first) & (0xffffu >> (16 - last)))}; }
// 2^n for the whole number n that t = n + 1.5 * 2^23 holds in its low bits.
INLINE Lanes power(Lanes t) {
    __m512i bits = _mm512_slli_epi32(_mm512_castps_si512(t.v), 23);
    return {_mm512_castsi512_ps(_mm512_add_epi32(bits, _mm512_set1_epi32(0x3f800000)))};
}
INLINE float most(Lanes a) { return _mm512_reduce_max_ps(a.v); }
INLINE __m512i bf16_bits(Lanes a) {  // to the nearest, ties to even
    __m512i bits = _mm512_castps_si512(a.v);
    __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i even = _mm512_srli_epi32(_mm512_add_epi32(_mm512_add_epi32(bits, odd), _mm512_set1_epi32(0x7fff)), 16);
    __mmask16 nan = _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q);
    return _mm512_mask_blend_epi32(nan, even, _mm512_set1_epi32(0x7fc0));
}
INLINE void store(bf16 *p, Lanes a) {
    _mm256_storeu_si256(reinterpret_cast<__m256i *>(p), _mm512_cvtepi32_epi16(bf16_bits(a)));
}

#elif LANES == 1

struct Lanes {
    __m256 a, b;
};
struct Mask {
    __m256 a, b;
};

INLINE Lanes all(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
INLINE Lanes load(const float *p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
INLINE __m256 widen(const bf16 *p) {
    __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i *>(p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
}
INLINE Lanes load(const bf16 *p) { return {widen(p), widen(p + 8)}; }
INLINE void store(float *p, Lanes x) {
    _mm256_storeu_ps(p, x.a);
    _mm256_storeu_ps(p + 8, x.b);
}
INLINE Lanes operator+(Lanes x, Lanes y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
INLINE Lanes operator-(Lanes x, Lanes y) { return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)}; }
INLINE Lanes operator*(Lanes x, Lanes y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
INLINE Lanes operator/(Lanes x, Lanes y) { return {_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)}; }
INLINE Lanes fma(Lanes x, Lanes y, Lanes z) { return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)}; }
INLINE Mask operator<(Lanes x, Lanes y) {
    return {_mm256_cmp_ps(x.a, y.a, _CMP_LT_OQ), _mm256_cmp_ps(x.b, y.b, _CMP_LT_OQ)};
}
INLINE Lanes pick(Mask m, Lanes yes, Lanes no) {
    return {_mm256_blendv_ps(no.a, yes.a, m.a), _mm256_blendv_ps(no.b, yes.b, m.b)};
}
INLINE __m256 between8(__m256i at, int first, int last) {
    __m256i low = _mm256_cmpgt_epi32(_mm256_set1_epi32(first), at);
    return _mm256_castsi256_ps(_mm256_andnot_si256(low, _mm256_cmpgt_epi32(_mm256_set1_epi32(last), at)));
}
INLINE Mask between(int first, int last) {
    __m256i at = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    return {between8(at, first, last), between8(_mm256_add_epi32(at, _mm256_set1_epi32(8)), first, last)};
}
INLINE __m256 power8(__m256 t) {
    __m256i bits = _mm256_slli_epi32(_mm256_castps_si256(t), 23);
    return _mm256_castsi256_ps(_mm256_add_epi32(bits, _mm256_set1_epi32(0x3f800000)));
}
INLINE Lanes power(Lanes t) { return {power8(t.a), power8(t.b)}; }
INLINE float most(Lanes x) {
    __m256 m = _mm256_max_ps(x.a, x.b);
    __m128 h = _mm_max_ps(_mm256_castps256_ps128(m), _mm256_extractf128_ps(m, 1));
    h = _mm_max_ps(h, _mm_movehl_ps(h, h));
    return _mm_cvtss_f32(_mm_max_ss(h, _mm_shuffle_ps(h, h, 1)));
}
INLINE __m256i narrow(__m256 a) {
    __m256i bits = _mm256_castps_si256(a);
    __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    __m256i even = _mm256_srli_epi32(_mm256_add_epi32(_mm256_add_epi32(bits, odd), _mm256_set1_epi32(0x7fff)), 16);
    __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(a, a, _CMP_UNORD_Q));
    return _mm256_blendv_epi8(even, _mm256_set1_epi32(0x7fc0), nan);
}
INLINE void store(bf16 *p, Lanes x) {
    __m256i both = _mm256_permute4x64_epi64(_mm256_packus_epi32(narrow(x.a), narrow(x.b)), 0xd8);
    _mm256_storeu_si256(reinterpret_cast<__m256i *>(p), both);
}

#else

typedef float Four __attribute__((vector_size(16)));
typedef int32_t Signs __attribute__((vector_size(16)));
typedef uint32_t Words __attribute__((vector_size(16)));
typedef uint16_t Halves __attribute__((vector_size(8)));

struct Lanes {
    Four a, b, c, d;
};
struct Mask {
    Signs a, b, c, d;
};

template <class V, class T>
INLINE V read(const T *p) {
    V v;
    memcpy(&v, p, sizeof v);
    return v;
}
INLINE Four widen(const bf16 *p) { return (Four)(__builtin_convertvector(read<Halves>(p), Words) << 16); }
INLINE Halves narrow(Four x) {
    Words bits = (Words)x, even = (bits + ((bits >> 16) & 1u) + 0x7fffu) >> 16;
    return __builtin_convertvector(x == x ? even : Words{0x7fc0, 0x7fc0, 0x7fc0, 0x7fc0}, Halves);
}
INLINE Four fused(Four x, Four y, Four z) {
#if defined(__ARM_NEON)
    return (Four)vfmaq_f32((float32x4_t)z, (float32x4_t)x, (float32x4_t)y);
#elif defined(__FMA__)
    return (Four)_mm_fmadd_ps((__m128)x, (__m128)y, (__m128)z);
#else
    return x * y + z;
#endif
}
INLINE Four power(Four t) { return (Four)(((Words)t << 23) + 0x3f800000u); }
INLINE Four more(Four x, Four y) { return x > y ? x : y; }
INLINE Signs from(Signs at, int first, int last) { return (at >= first) & (at < last); }

INLINE Lanes all(float x) {
    Four four = {x, x, x, x};
    return {four, four, four, four};
}
INLINE Lanes load(const float *p) { return {read<Four>(p), read<Four>(p + 4), read<Four>(p + 8), read<Four>(p + 12)}; }
INLINE Lanes load(const bf16 *p) { return {widen(p), widen(p + 4), widen(p + 8), widen(p + 12)}; }
INLINE void store(float *p, Lanes x) { memcpy(p, &x, sizeof x); }
INLINE void store(bf16 *p, Lanes x) {
    Halves all[4] = {narrow(x.a), narrow(x.b), narrow(x.c), narrow(x.d)};
    memcpy(p, all, sizeof all);
}
INLINE Lanes operator+(Lanes x, Lanes y) { return {x.a + y.a, x.b + y.b, x.c + y.c, x.d + y.d}; }
INLINE Lanes operator-(Lanes x, Lanes y) { return {x.a - y.a, x.b - y.b, x.c - y.c, x.d - y.d}; }
INLINE Lanes operator*(Lanes x, Lanes y) { return {x.a * y.a, x.b * y.b, x.c * y.c, x.d * y.d}; }
INLINE Lanes operator/(Lanes x, Lanes y) { return {x.a / y.a, x.b / y.b, x.c / y.c, x.d / y.d}; }
INLINE Lanes fma(Lanes x, Lanes y, Lanes z) {
    return {fused(x.a, y.a, z.a), fused(x.b, y.b, z.b), fused(x.c, y.c, z.c), fused(x.d, y.d, z.d)};
}
INLINE Mask operator<(Lanes x, Lanes y) { return {x.a < y.a, x.b < y.b, x.c < y.c, x.d < y.d}; }
INLINE Lanes pick(Mask m, Lanes x, Lanes y) {
    return {m.a ? x.a : y.a, m.b ? x.b : y.b, m.c ? x.c : y.c, m.d ? x.d : y.d};
}
INLINE Mask between(int first, int last) {
    const Signs at = {0, 1, 2, 3};
    return {from(at, first, last), from(at + 4, first, last), from(at + 8, first, last), from(at + 12, first, last)};
}
INLINE Lanes power(Lanes t) { return {power(t.a), power(t.b), power(t.c), power(t.d)}; }
INLINE float most(Lanes x) {
    Four m = more(more(x.a, x.c), more(x.b, x.d));
    float low = m[0] > m[2] ? m[0] : m[2], high = m[1] > m[3] ? m[1] : m[3];
    return low > high ? low : high;
}

#endif

// n lanes of a row, the others zero.
template <class T>
INLINE Lanes load(const T *p, long n) {
    if (n >= WIDTH) return load(p);
    T row[WIDTH] = {};
    memcpy(row, p, n * sizeof(T));
    return load(row);
}

template <class T>
INLINE void store(T *p, Lanes a, long n) {
    if (n >= WIDTH) return store(p, a);
    T row[WIDTH];
    store(row, a);
    memcpy(p, row, n * sizeof(T));
}

// Call numbers that are soon read into the cache.
template <class T>
INLINE void call_in(const T *p, long numbers) {
    for (long byte = 0; byte < numbers * long(sizeof(T)); byte += 64) __builtin_prefetch((const char *)p + byte);
}

// What the numbers are after a round trip through T.
template <class T>
INLINE Lanes rounded(Lanes a) {
#if LANES == 2
    if constexpr (sizeof(T) == 2) return {_mm512_castsi512_ps(_mm512_slli_epi32(bf16_bits(a), 16))};
#endif
    T row[WIDTH];
    store(row, a);
    return load(row);
}

// The one tree in which lanes are summed: lane i with i + 8, then i + 4, i + 2, i + 1.
INLINE float sum(Lanes a) {
#if LANES == 2
    __m256 half = _mm256_add_ps(_mm512_castps512_ps256(a.v), _mm512_extractf32x8_ps(a.v, 1));
    __m128 x = _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
    x = _mm_add_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_add_ss(x, _mm_shuffle_ps(x, x, 1)));
#else
    float x[WIDTH];
    store(x, a);
    for (int half = WIDTH / 2; half; half /= 2)
        for (int i = 0; i < half; i++) x[i] += x[i + half];
    return x[0];
#endif
}

// 2^r for r in [-1/2, 1/2], a polynomial whose own relative error is below 2e-9; its constant term is 1, so 2^0 is 1.
INLINE Lanes exp2_fraction(Lanes r) {
    Lanes p = all(0x1.41fbbcp-13f);
    p = fma(p, r, all(0x1.5f3e52p-10f));
    p = fma(p, r, all(0x1.3b2d4cp-7f));
    p = fma(p, r, all(0x1.c6aee8p-5f));
    p = fma(p, r, all(0x1.ebfbdcp-3f));
    p = fma(p, r, all(0x1.62e43p-1f));
    return fma(p, r, all(1.0f));
}

constexpr float WHOLE = 12582912.0f;  // 1.5 * 2^23: added, it leaves the nearest whole number in the low bits

// 2^x for x < 128; zero below the normal numbers.
INLINE Lanes exp2(Lanes x) {
    Lanes t = x + all(WHOLE);
    Lanes y = exp2_fraction(x - (t - all(WHOLE))) * power(t);
    return pick(x < all(-126.0f), all(0.0f), y);
}

}  // namespace
