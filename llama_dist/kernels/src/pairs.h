// Panels: sixteen rows side by side, some numbers of each at a time, as [row][2] of bf16, [2][row] of floats, or [row][4] of
// e4m3. One load takes a number, two or four of each row.
#pragma once

#include "rows.h"

namespace {

// A float of a sign, four bits of exponent and three of mantissa, without infinities (OCP 8-bit Floating Point, E4M3).
struct e4m3 {
    uint8_t bits;
};

template <class T>
constexpr int AT_ONCE = sizeof(T) == 1 ? 4 : 2;  // numbers of a row that lie together

// The bits of an e4m3 at the top of a word, moved to those of a float: a 2^120th of it, also where it has no leading one.
constexpr int E4M3_BITS = int(0x87f00000);
constexpr float E4M3_UNIT = 0x1p120f;

// The next AT_ONCE numbers of each row.
INLINE void take(const float *p, Lanes *to) { to[0] = load(p), to[1] = load(p + WIDTH); }
#if LANES == 2
INLINE void take(const bf16 *p, Lanes *to) {
    const __m512i words = _mm512_loadu_si512(p);
    to[0] = {_mm512_castsi512_ps(_mm512_slli_epi32(words, 16))};
    to[1] = {_mm512_castsi512_ps(_mm512_and_si512(words, _mm512_set1_epi32(int(0xffff0000))))};
}
INLINE Lanes top_e4m3(__m512i words) {
    const __m512i bits = _mm512_and_si512(_mm512_srai_epi32(words, 4), _mm512_set1_epi32(E4M3_BITS));
    return {_mm512_mul_ps(_mm512_castsi512_ps(bits), _mm512_set1_ps(E4M3_UNIT))};
}
INLINE void take(const e4m3 *p, Lanes *to) {
    const __m512i words = _mm512_loadu_si512(p);
    to[0] = top_e4m3(_mm512_slli_epi32(words, 24)), to[1] = top_e4m3(_mm512_slli_epi32(words, 16));
    to[2] = top_e4m3(_mm512_slli_epi32(words, 8)), to[3] = top_e4m3(words);
}
#elif LANES == 1
INLINE void take(const bf16 *p, Lanes *to) {
    const __m256i a = _mm256_loadu_si256((const __m256i *)p), b = _mm256_loadu_si256((const __m256i *)(p + WIDTH));
    const __m256i high = _mm256_set1_epi32(int(0xffff0000));
    to[0] = {_mm256_castsi256_ps(_mm256_slli_epi32(a, 16)), _mm256_castsi256_ps(_mm256_slli_epi32(b, 16))};
    to[1] = {_mm256_castsi256_ps(_mm256_and_si256(a, high)), _mm256_castsi256_ps(_mm256_and_si256(b, high))};
}
INLINE __m256 top_e4m3(__m256i words) {
    const __m256i bits = _mm256_and_si256(_mm256_srai_epi32(words, 4), _mm256_set1_epi32(E4M3_BITS));
    return _mm256_mul_ps(_mm256_castsi256_ps(bits), _mm256_set1_ps(E4M3_UNIT));
}
INLINE void take(const e4m3 *p, Lanes *to) {
    const __m256i a = _mm256_loadu_si256((const __m256i *)p), b = _mm256_loadu_si256((const __m256i *)(p + 2 * WIDTH));
    to[0] = {top_e4m3(_mm256_slli_epi32(a, 24)), top_e4m3(_mm256_slli_epi32(b, 24))};
    to[1] = {top_e4m3(_mm256_slli_epi32(a, 16)), top_e4m3(_mm256_slli_epi32(b, 16))};
    to[2] = {top_e4m3(_mm256_slli_epi32(a, 8)), top_e4m3(_mm256_slli_epi32(b, 8))};
    to[3] = {top_e4m3(a), top_e4m3(b)};
}
#else
INLINE void take(const bf16 *p, Lanes *to) {
    const Words a = read<Words>(p), b = read<Words>(p + 8), c = read<Words>(p + 16), d = read<Words>(p + 24);
    to[0] = {(Four)(a << 16), (Four)(b << 16), (Four)(c << 16), (Four)(d << 16)};
    to[1] = {(Four)(a & 0xffff0000u), (Four)(b & 0xffff0000u), (Four)(c & 0xffff0000u), (Four)(d & 0xffff0000u)};
}
INLINE Four top_e4m3(Words words) { return (Four)(((Signs)words >> 4) & E4M3_BITS) * E4M3_UNIT; }
INLINE void take(const e4m3 *p, Lanes *to) {
    const Words a = read<Words>(p), b = read<Words>(p + 16), c = read<Words>(p + 32), d = read<Words>(p + 48);
    for (int i = 0; i < 4; i++) {
        const unsigned up = 24 - 8 * i;
        to[i] = {top_e4m3(a << up), top_e4m3(b << up), top_e4m3(c << up), top_e4m3(d << up)};
    }
}
#endif

// Number j of those that lie together, of each row.
template <class T>
INLINE Lanes take_one(const T *p, int j) {
    Lanes numbers[AT_ONCE<T>];
    take(p, numbers);
    return numbers[j];
}

// k numbers (whole loads of them) of a panel as floats [k][16]
template <class T>
INLINE void widen_panel(const T *w, long k, float *to) {
    for (long at = 0; at < k; at += AT_ONCE<T>, w += AT_ONCE<T> * WIDTH) {
        Lanes numbers[AT_ONCE<T>];
        take(w, numbers);
        for (int i = 0; i < AT_ONCE<T>; i++) store(to + (at + i) * WIDTH, numbers[i]);
    }
}

// Where number `at` of a row lies in its panel.
template <class T>
INLINE long in_panel(long row, long at) {
    return sizeof(T) == 2 ? at / 2 * 2 * WIDTH + 2 * row + at % 2 : at * WIDTH + row;
}

typedef uint32_t Quad __attribute__((vector_size(16)));

#ifdef __clang__
#define PICK(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define PICK(a, b, ...) __builtin_shuffle(a, b, Quad{__VA_ARGS__})
#endif

// k numbers each of sixteen rows, `stride` numbers apart, into a panel: four words of four rows change places at a time.
template <class T> INLINE void turn(const T *rows, int64_t stride, int64_t k, T *panel) {
    auto quad = [&](int64_t row, int64_t at) {
        Quad q;
        memcpy(&q, (const char *)(rows + row * stride) + at, sizeof q);
        return q;
    };
    char *to = (char *)panel;
    for (int64_t at = 0; at < int64_t(k * sizeof(T)); at += sizeof(Quad))
        for (int64_t row = 0; row < WIDTH; row += 4) {
            const Quad a = quad(row, at), b = quad(row + 1, at), c = quad(row + 2, at), d = quad(row + 3, at);
            const Quad ab = PICK(a, b, 0, 4, 1, 5), cd = PICK(c, d, 0, 4, 1, 5);
            const Quad ab2 = PICK(a, b, 2, 6, 3, 7), cd2 = PICK(c, d, 2, 6, 3, 7);
            const Quad turned[] = {PICK(ab, cd, 0, 1, 4, 5), PICK(ab, cd, 2, 3, 6, 7), PICK(ab2, cd2, 0, 1, 4, 5),
                                   PICK(ab2, cd2, 2, 3, 6, 7)};
            for (int64_t i = 0; i < 4; i++) memcpy(to + ((at / 4 + i) * WIDTH + row) * 4, &turned[i], sizeof(Quad));
        }
}

}  // namespace
