// Panels: sixteen rows side by side, two numbers of each at a time, as [row][2] of bf16 or [2][row] of floats. One load takes
// a number or two of each row.
#pragma once

#include "rows.h"

namespace {

INLINE void two(const float *p, Lanes &first, Lanes &second) { first = load(p), second = load(p + WIDTH); }
#if LANES == 2
INLINE void two(const bf16 *p, Lanes &first, Lanes &second) {
    const __m512i words = _mm512_loadu_si512(p);
    first = {_mm512_castsi512_ps(_mm512_slli_epi32(words, 16))};
    second = {_mm512_castsi512_ps(_mm512_and_si512(words, _mm512_set1_epi32(int(0xffff0000))))};
}
#elif LANES == 1
INLINE void two(const bf16 *p, Lanes &first, Lanes &second) {
    const __m256i a = _mm256_loadu_si256((const __m256i *)p), b = _mm256_loadu_si256((const __m256i *)(p + WIDTH));
    const __m256i high = _mm256_set1_epi32(int(0xffff0000));
    first = {_mm256_castsi256_ps(_mm256_slli_epi32(a, 16)), _mm256_castsi256_ps(_mm256_slli_epi32(b, 16))};
    second = {_mm256_castsi256_ps(_mm256_and_si256(a, high)), _mm256_castsi256_ps(_mm256_and_si256(b, high))};
}
#else
INLINE void two(const bf16 *p, Lanes &first, Lanes &second) {
    const Words a = read<Words>(p), b = read<Words>(p + 8), c = read<Words>(p + 16), d = read<Words>(p + 24);
    first = {(Four)(a << 16), (Four)(b << 16), (Four)(c << 16), (Four)(d << 16)};
    second = {(Four)(a & 0xffff0000u), (Four)(b & 0xffff0000u), (Four)(c & 0xffff0000u), (Four)(d & 0xffff0000u)};
}
#endif

// k numbers (an even number) of a panel as floats [k][16]
template <class T>
INLINE void widen_panel(const T *w, long k, float *to) {
    for (long at = 0; at < k; at += 2, w += 2 * WIDTH) {
        Lanes first, second;
        two(w, first, second);
        store(to + at * WIDTH, first);
        store(to + (at + 1) * WIDTH, second);
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
