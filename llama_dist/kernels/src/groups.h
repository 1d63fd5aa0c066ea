// Weights packed in groups of 32 along K: how they lie, and dot products of whole numbers with them.
//
// Sixteen rows make a block, a row a lane. A group has eight steps of four numbers along K; a step of a block is 64 bytes,
// four codes of row 0, four of row 1 ... four of row 15. Codes of eight bits lie step after step. Of four bits, a byte holds
// that of step s, 0 to 3, in its low half and that of step s + 4 in its high one. Of six bits, their low four lie so, and 64
// bytes of their high two follow for steps 0, 4, 1, 5, from the lowest bits up, and as many for steps 2, 6, 3, 7.
//
// A weight is factor * scale * (code - ZERO), or for four bits factor * scale * (code - zero / 16). The scales, sixteen bytes
// for a group of a block, and the zeros behind them lie apart from the codes; a row has a factor for each unit.
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

constexpr int GROUP = 32, STEPS = 8, STEP_BYTES = 64;

template <int BITS>
struct Format {
    static constexpr int CODES = GROUP * WIDTH * BITS / 8;         // bytes of a group's codes in a block
    static constexpr int SCALES = BITS == 4 ? 2 * WIDTH : WIDTH;  // and of its scales
    static constexpr int ZERO = BITS == 4 ? 0 : 1 << (BITS - 1);
    // Of a number of x, so that the sum over a group of what it is multiplied by is exact as a float too.
    static constexpr int MOST = BITS == 4 ? 2048 : 4096;
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

#if WHOLES == 2

struct Sums {
    __m512i v;
};

INLINE Lanes lanes_of(Sums s) { return {_mm512_cvtepi32_ps(s.v)}; }

// Numbers of x are 64 * a + b: first the a's of a group, then the b's, a byte each.
INLINE void place(const int16_t *numbers, int8_t *x) {
    for (int i = 0; i < GROUP; i++) {
        const int a = (numbers[i] + 32) >> 6;
        x[i] = int8_t(a), x[i + GROUP] = int8_t(numbers[i] - 64 * a);
    }
}

// The codes of step `step`, 0 to 3, and of step + 4.
template <int BITS>
INLINE void read(const uint8_t *w, int step, __m512i &first, __m512i &second) {
    const __m512i low = _mm512_set1_epi8(15), high = _mm512_set1_epi8(0x30);
    first = _mm512_loadu_si512(w + step * STEP_BYTES);
    if (BITS == 8) {
        second = _mm512_loadu_si512(w + (step + 4) * STEP_BYTES);
        return;
    }
    second = _mm512_and_si512(_mm512_srli_epi16(first, 4), low);
    first = _mm512_and_si512(first, low);
    if (BITS == 4) return;
    const __m512i more = _mm512_loadu_si512(w + (4 + step / 2) * STEP_BYTES);
    const __m512i a = step % 2 ? more : _mm512_slli_epi16(more, 4);
    const __m512i b = step % 2 ? _mm512_srli_epi16(more, 2) : _mm512_slli_epi16(more, 2);
    first = _mm512_or_si512(first, _mm512_and_si512(a, high));
    second = _mm512_or_si512(second, _mm512_and_si512(b, high));
}

INLINE __m512i four(const int8_t *x) {
    int32_t all;
    memcpy(&all, x, 4);
    return _mm512_set1_epi32(all);
}

// sums[i][j] = the codes of group j, of a block each, times those of x's row i, whose sum is of_x[i].
template <int BITS, int M, int N>
INLINE void multiply(const uint8_t *const *w, const int8_t *const *x, const int *of_x, Sums (*sums)[N]) {
    __m512i high[M][N];
    for (int i = 0; i < M; i++)
        for (int j = 0; j < N; j++) {
            sums[i][j].v = _mm512_set1_epi32(-Format<BITS>::ZERO * of_x[i]);
            high[i][j] = _mm512_setzero_si512();
        }
#pragma GCC unroll 4
    for (int step = 0; step < STEPS / 2; step++) {
        __m512i a[N], b[N];
        for (int j = 0; j < N; j++) read<BITS>(w[j], step, a[j], b[j]);
        for (int i = 0; i < M; i++) {
            const int8_t *at = x[i] + 4 * step;
            for (int j = 0; j < N; j++) high[i][j] = _mm512_dpbusd_epi32(high[i][j], a[j], four(at));
            for (int j = 0; j < N; j++) high[i][j] = _mm512_dpbusd_epi32(high[i][j], b[j], four(at + 16));
            for (int j = 0; j < N; j++) sums[i][j].v = _mm512_dpbusd_epi32(sums[i][j].v, a[j], four(at + GROUP));
            for (int j = 0; j < N; j++) sums[i][j].v = _mm512_dpbusd_epi32(sums[i][j].v, b[j], four(at + GROUP + 16));
        }
    }
    for (int i = 0; i < M; i++)
        for (int j = 0; j < N; j++) sums[i][j].v = _mm512_add_epi32(sums[i][j].v, _mm512_slli_epi32(high[i][j], 6));
}

#else

// Numbers of x in sixteen bits: of each four 0, 2, 1, 3, so that two times sixteen bits meet two bytes of a weight's four.
INLINE void place(const int16_t *numbers, int8_t *x) {
    int16_t to[GROUP];
    for (int i = 0; i < GROUP; i += 4) {
        to[i] = numbers[i], to[i + 1] = numbers[i + 2];
        to[i + 2] = numbers[i + 1], to[i + 3] = numbers[i + 3];
    }
    memcpy(x, to, sizeof to);
}

#if WHOLES == 1

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

// The codes of eight rows for a step, 0 to 7.
template <int BITS>
INLINE __m256i read(const uint8_t *w, int step) {
    auto line = [&](int i) { return _mm256_loadu_si256((const __m256i *)(w + i * STEP_BYTES)); };
    if (BITS == 8) return line(step);
    const __m256i both = line(step % 4);
    const __m256i codes = _mm256_and_si256(step < 4 ? both : _mm256_srli_epi16(both, 4), _mm256_set1_epi8(15));
    if (BITS == 4) return codes;
    __m256i more = line(4 + step % 4 / 2);
    if (step % 2 == 0) more = _mm256_slli_epi16(more, step < 4 ? 4 : 2);
    if (step % 2 == 1 && step > 4) more = _mm256_srli_epi16(more, 2);
    return _mm256_or_si256(codes, _mm256_and_si256(more, _mm256_set1_epi8(0x30)));
}

INLINE __m256i two(const int8_t *x) {
    int32_t all;
    memcpy(&all, x, 4);
    return _mm256_set1_epi32(all);
}

INLINE void add_products(__m256i &sum, __m256i a, __m256i x, __m256i b, __m256i y) {
    sum = _mm256_add_epi32(sum, _mm256_add_epi32(_mm256_madd_epi16(a, x), _mm256_madd_epi16(b, y)));
    // The sum so far stays one number: left alone, the compiler makes all products first and has no registers for them.
    asm("" : "+x"(sum));
}

template <int BITS, int M, int N>
INLINE void multiply(const uint8_t *const *w, const int8_t *const *x, const int *of_x, Sums (*sums)[N]) {
    const __m256i byte = _mm256_set1_epi16(0xff);
    for (int i = 0; i < M; i++)
        for (int j = 0; j < N; j++) sums[i][j].a = sums[i][j].b = _mm256_set1_epi32(-Format<BITS>::ZERO * of_x[i]);
#pragma GCC unroll 8
    for (int step = 0; step < STEPS; step++)
        for (int j = 0; j < N; j++) {
            const __m256i a = read<BITS>(w[j], step), b = read<BITS>(w[j] + STEP_BYTES / 2, step);
            const __m256i a0 = _mm256_and_si256(a, byte), a1 = _mm256_srli_epi16(a, 8);
            const __m256i b0 = _mm256_and_si256(b, byte), b1 = _mm256_srli_epi16(b, 8);
            for (int i = 0; i < M; i++) {
                const __m256i p = two(x[i] + 8 * step), q = two(x[i] + 8 * step + 4);
                add_products(sums[i][j].a, a0, p, a1, q);
                add_products(sums[i][j].b, b0, p, b1, q);
            }
        }
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

// The code at byte i of a step, 0 to 7.
template <int BITS>
INLINE int code(const uint8_t *w, int step, int i) {
    if (BITS == 8) return w[step * STEP_BYTES + i];
    const int low = w[step % 4 * STEP_BYTES + i] >> (step < 4 ? 0 : 4) & 15;
    if (BITS == 4) return low;
    return low | (w[(4 + step % 4 / 2) * STEP_BYTES + i] >> (step % 2 * 4 + (step < 4 ? 0 : 2)) & 3) << 4;
}

template <int BITS, int M, int N>
INLINE void multiply(const uint8_t *const *w, const int8_t *const *x, const int *of_x, Sums (*sums)[N]) {
    for (int i = 0; i < M; i++) {
        int16_t numbers[GROUP];
        memcpy(numbers, x[i], sizeof numbers);
        for (int j = 0; j < N; j++) {
            int32_t total[WIDTH];
            for (int r = 0; r < WIDTH; r++) total[r] = -Format<BITS>::ZERO * of_x[i];
            for (int s = 0; s < STEPS; s++)
                for (int r = 0; r < WIDTH; r++) {
                    const int16_t *four = numbers + 4 * s;
                    total[r] += code<BITS>(w[j], s, 4 * r) * four[0] + code<BITS>(w[j], s, 4 * r + 1) * four[2] +
                                code<BITS>(w[j], s, 4 * r + 2) * four[1] + code<BITS>(w[j], s, 4 * r + 3) * four[3];
                }
            memcpy(sums[i][j].v, total, sizeof total);
        }
    }
}

#endif
#endif

}  // namespace
