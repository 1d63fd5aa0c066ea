// The scores of one query row against the sixteen keys of a page, a key a lane.
#pragma once

#include "rows.h"

namespace {

// q [chunks][16], k [chunks][16 keys][16], both zero beyond the head's numbers. Lane j is the product of q and key j: a
// sum over the chunks in each of sixteen lanes, then the tree of `sum`. Here it is taken for many keys at once.
#if LANES == 2

INLINE __m512 halves(__m512 a, __m512 b) {  // i + 8: a's sums in the low half, b's in the high one
    return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xee));
}
INLINE __m512 quarters(__m512 a, __m512 b) {  // i + 4
    return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
}
INLINE __m512 pairs(__m512 a, __m512 b) {  // i + 2
    return _mm512_add_ps(_mm512_shuffle_ps(a, b, 0x44), _mm512_shuffle_ps(a, b, 0xee));
}
INLINE __m512 ones(__m512 a, __m512 b) {  // i + 1
    return _mm512_add_ps(_mm512_shuffle_ps(a, b, 0x88), _mm512_shuffle_ps(a, b, 0xdd));
}

INLINE Lanes dots(const float *q, const float *k, int chunks) {
    // s[i] sums the key that the four steps below move to its own lane.
    static constexpr int KEY[WIDTH] = {0, 2, 1, 3, 8, 10, 9, 11, 4, 6, 5, 7, 12, 14, 13, 15};
    __m512 s[WIDTH];
#pragma GCC unroll 16
    for (int i = 0; i < WIDTH; i++) s[i] = _mm512_setzero_ps();
    for (int c = 0; c < chunks; c++, q += WIDTH, k += WIDTH * WIDTH) {
        __m512 x = _mm512_loadu_ps(q);
#pragma GCC unroll 16
        for (int i = 0; i < WIDTH; i++) s[i] = _mm512_fmadd_ps(x, _mm512_loadu_ps(k + KEY[i] * WIDTH), s[i]);
    }
    __m512 t[8], u[4];
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++) t[i] = halves(s[i], s[i + 8]);
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) u[i] = quarters(t[i], t[i + 4]);
    return {ones(pairs(u[0], u[2]), pairs(u[1], u[3]))};
}

#elif LANES == 1

// Keys a, b, c, d -> their sums but for the last step, in lanes [a a c c | b b d d].
INLINE __m256 four(const float *q, const float *k, int chunks, int a, int b, int c, int d) {
    const int key[4] = {a, b, c, d};
    __m256 low[4], high[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) low[i] = high[i] = _mm256_setzero_ps();
    for (int n = 0; n < chunks; n++, q += WIDTH, k += WIDTH * WIDTH) {
        __m256 x = _mm256_loadu_ps(q), y = _mm256_loadu_ps(q + 8);
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) {
            low[i] = _mm256_fmadd_ps(x, _mm256_loadu_ps(k + key[i] * WIDTH), low[i]);
            high[i] = _mm256_fmadd_ps(y, _mm256_loadu_ps(k + key[i] * WIDTH + 8), high[i]);
        }
    }
    __m256 s[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) s[i] = _mm256_add_ps(low[i], high[i]);
    __m256 ab = _mm256_add_ps(_mm256_permute2f128_ps(s[0], s[1], 0x20), _mm256_permute2f128_ps(s[0], s[1], 0x31));
    __m256 cd = _mm256_add_ps(_mm256_permute2f128_ps(s[2], s[3], 0x20), _mm256_permute2f128_ps(s[2], s[3], 0x31));
    return _mm256_add_ps(_mm256_shuffle_ps(ab, cd, 0x44), _mm256_shuffle_ps(ab, cd, 0xee));
}

INLINE __m256 eight(const float *q, const float *k, int chunks) {
    __m256 a = four(q, k, chunks, 0, 4, 1, 5), b = four(q, k, chunks, 2, 6, 3, 7);
    return _mm256_add_ps(_mm256_shuffle_ps(a, b, 0x88), _mm256_shuffle_ps(a, b, 0xdd));
}

INLINE Lanes dots(const float *q, const float *k, int chunks) {
    return {eight(q, k, chunks), eight(q, k + 8 * WIDTH, chunks)};
}

#else

// The sums of a key's lanes but for the last two steps.
INLINE Four key(const float *q, const float *k, int chunks) {
    Lanes s = all(0.0f);
    for (int c = 0; c < chunks; c++) s = fma(load(q + c * WIDTH), load(k + c * WIDTH * WIDTH), s);
    return (s.a + s.c) + (s.b + s.d);
}
INLINE Four pairs(Four a, Four b) {  // i + 2
    return __builtin_shuffle(a, b, Signs{0, 1, 4, 5}) + __builtin_shuffle(a, b, Signs{2, 3, 6, 7});
}
INLINE Four ones(Four a, Four b) {  // i + 1
    return __builtin_shuffle(a, b, Signs{0, 2, 4, 6}) + __builtin_shuffle(a, b, Signs{1, 3, 5, 7});
}
INLINE Four four(const float *q, const float *k, int chunks) {
    Four a = pairs(key(q, k, chunks), key(q, k + WIDTH, chunks));
    return ones(a, pairs(key(q, k + 2 * WIDTH, chunks), key(q, k + 3 * WIDTH, chunks)));
}

INLINE Lanes dots(const float *q, const float *k, int chunks) {
    return {four(q, k, chunks), four(q, k + 4 * WIDTH, chunks), four(q, k + 8 * WIDTH, chunks),
            four(q, k + 12 * WIDTH, chunks)};
}

#endif

}  // namespace
