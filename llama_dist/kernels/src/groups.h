// Weights packed in groups of 32 along K: how they lie, and dot products of whole numbers with them.
//
// Sixteen rows make a block, a row a lane. A group of a block has its codes in eight steps of four along K: for each step
// four codes of row 0, four of row 1 ... four of row 15. Codes of eight bits are signed bytes; of codes of four bits, 0 to
// 15, a byte holds that of step s in its low half and that of step s + 4 in its high one. After the codes of all groups
// come, elsewhere, their scales: sixteen bytes a group, for four bits sixteen zero points more. And each row has a factor a
// unit. A weight is factor * scale * code, of four bits factor * scale * (code - zero / 16).
#pragma once

#include "rows.h"

// How whole numbers are multiplied: 2 AVX-512's dot products of bytes, 1 AVX2, 0 what every processor has. They are exact.
#if LANES == 2 && defined(__AVX512VNNI__)
#define WHOLES 2
#elif LANES >= 1
#define WHOLES 1
#else
#define WHOLES 0
#endif

namespace {

constexpr int GROUP = 32, STEPS = 8;

template <int BITS>
struct Format {
    static constexpr int CODES = GROUP * WIDTH * BITS / 8;         // bytes of a group's codes in a block
    static constexpr int SCALES = BITS == 4 ? 2 * WIDTH : WIDTH;  // and of its scales
};

// Sixteen bytes from 0 to 255 as lanes.
INLINE Lanes lanes_of(const uint8_t *p) {
#if LANES == 2
    return {_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)p)))};
#elif LANES == 1
    __m128i all = _mm_loadu_si128((const __m128i *)p);
    return {_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(all)),
            _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_srli_si128(all, 8)))};
#else
    float x[WIDTH];
    for (int i = 0; i < WIDTH; i++) x[i] = p[i];
    return load(x);
#endif
}

INLINE int32_t four_bytes(const int8_t *p) {
    int32_t x;
    memcpy(&x, p, 4);
    return x;
}

#if WHOLES == 2

struct Sums {
    __m512i v;
};

INLINE Lanes lanes_of(Sums s) { return {_mm512_cvtepi32_ps(s.v)}; }

// sums[i][j] = the codes of group j, of a block each, times those of x's row i, whose sum is of_x[i].
template <int BITS, int M, int N>
INLINE void multiply(const uint8_t *const *w, const int8_t *const *x, const int *of_x, Sums (*sums)[N]) {
    const __m512i low = _mm512_set1_epi8(15), sign = _mm512_set1_epi8(-128);
    // The instruction takes weights without a sign: with 128 more each, which is taken off beforehand.
    for (int i = 0; i < M; i++)
        for (int j = 0; j < N; j++) sums[i][j].v = _mm512_set1_epi32(BITS == 8 ? -128 * of_x[i] : 0);
#pragma GCC unroll 8
    for (int s = 0; s < (BITS == 8 ? STEPS : STEPS / 2); s++) {
        __m512i a[N], b[N];
        for (int j = 0; j < N; j++) {
            __m512i codes = _mm512_loadu_si512(w[j] + s * 64);
            a[j] = BITS == 8 ? _mm512_xor_si512(codes, sign) : _mm512_and_si512(codes, low);
            if (BITS == 4) b[j] = _mm512_and_si512(_mm512_srli_epi16(codes, 4), low);
        }
        for (int i = 0; i < M; i++) {
            __m512i four = _mm512_set1_epi32(four_bytes(x[i] + 4 * s));
            for (int j = 0; j < N; j++) sums[i][j].v = _mm512_dpbusd_epi32(sums[i][j].v, a[j], four);
            if (BITS == 8) continue;
            four = _mm512_set1_epi32(four_bytes(x[i] + 4 * s + GROUP / 2));
            for (int j = 0; j < N; j++) sums[i][j].v = _mm512_dpbusd_epi32(sums[i][j].v, b[j], four);
        }
    }
}

#elif WHOLES == 1

struct Sums {
    __m256i a, b;
};

INLINE Lanes lanes_of(Sums s) {
#if LANES == 2
    return {_mm512_cvtepi32_ps(_mm512_inserti64x4(_mm512_castsi256_si512(s.a), s.b, 1))};
#else
    return {_mm256_cvtepi32_ps(s.a), _mm256_cvtepi32_ps(s.b)};
#endif
}

INLINE __m256i eight_rows(const uint8_t *p) { return _mm256_loadu_si256((const __m256i *)p); }
// The sum so far stays one number: left alone, the compiler makes all products first and has no registers for them.
INLINE void settle(__m256i &x) { asm("" : "+x"(x)); }

template <int BITS, int M, int N>
INLINE void multiply(const uint8_t *const *w, const int8_t *const *x, const int *, Sums (*sums)[N]) {
    const __m256i ones = _mm256_set1_epi16(1), low = _mm256_set1_epi8(15);
    for (int i = 0; i < M; i++)
        for (int j = 0; j < N; j++) sums[i][j] = {_mm256_setzero_si256(), _mm256_setzero_si256()};
#pragma GCC unroll 8
    for (int s = 0; s < (BITS == 8 ? STEPS : STEPS / 2); s++) {
        for (int j = 0; j < N; j++) {
            const __m256i a = eight_rows(w[j] + s * 64), b = eight_rows(w[j] + s * 64 + 32);
            if (BITS == 8) {
                for (int i = 0; i < M; i++) {
                    // The sign goes from x to the weight: |x| * (w or -w). Two such products fit 16 bits.
                    const __m256i four = _mm256_set1_epi32(four_bytes(x[i] + 4 * s)), size = _mm256_abs_epi8(four);
                    const __m256i p = _mm256_maddubs_epi16(size, _mm256_sign_epi8(a, four));
                    const __m256i q = _mm256_maddubs_epi16(size, _mm256_sign_epi8(b, four));
                    sums[i][j].a = _mm256_add_epi32(sums[i][j].a, _mm256_madd_epi16(p, ones));
                    sums[i][j].b = _mm256_add_epi32(sums[i][j].b, _mm256_madd_epi16(q, ones));
                    settle(sums[i][j].a), settle(sums[i][j].b);
                }
                continue;
            }
            const __m256i a0 = _mm256_and_si256(a, low), a1 = _mm256_and_si256(_mm256_srli_epi16(a, 4), low);
            const __m256i b0 = _mm256_and_si256(b, low), b1 = _mm256_and_si256(_mm256_srli_epi16(b, 4), low);
            for (int i = 0; i < M; i++) {
                // 16 products of at most 15 * 127 fit 16 bits: they are widened once, below.
                const __m256i four = _mm256_set1_epi32(four_bytes(x[i] + 4 * s));
                const __m256i more = _mm256_set1_epi32(four_bytes(x[i] + 4 * s + GROUP / 2));
                const __m256i p = _mm256_add_epi16(_mm256_maddubs_epi16(a0, four), _mm256_maddubs_epi16(a1, more));
                const __m256i q = _mm256_add_epi16(_mm256_maddubs_epi16(b0, four), _mm256_maddubs_epi16(b1, more));
                sums[i][j].a = _mm256_add_epi16(sums[i][j].a, p);
                sums[i][j].b = _mm256_add_epi16(sums[i][j].b, q);
                settle(sums[i][j].a), settle(sums[i][j].b);
            }
        }
    }
    if (BITS == 4)
        for (int i = 0; i < M; i++)
            for (int j = 0; j < N; j++)
                sums[i][j] = {_mm256_madd_epi16(sums[i][j].a, ones), _mm256_madd_epi16(sums[i][j].b, ones)};
}

#else

struct Sums {
    int32_t v[WIDTH];
};

INLINE Lanes lanes_of(const Sums &s) {
    float x[WIDTH];
    for (int i = 0; i < WIDTH; i++) x[i] = float(s.v[i]);
    return load(x);
}

template <int BITS, int M, int N>
INLINE void multiply(const uint8_t *const *w, const int8_t *const *x, const int *, Sums (*sums)[N]) {
    for (int i = 0; i < M; i++)
        for (int j = 0; j < N; j++) {
            int32_t total[WIDTH] = {};
            for (int s = 0; s < (BITS == 8 ? STEPS : STEPS / 2); s++)
                for (int r = 0; r < WIDTH; r++)
                    for (int k = 0; k < 4; k++) {
                        const uint8_t code = w[j][(s * WIDTH + r) * 4 + k];
                        if (BITS == 8)
                            total[r] += int8_t(code) * x[i][4 * s + k];
                        else
                            total[r] += (code & 15) * x[i][4 * s + k] + (code >> 4) * x[i][4 * s + k + GROUP / 2];
                    }
            memcpy(sums[i][j].v, total, sizeof total);
        }
}

#endif

}  // namespace
