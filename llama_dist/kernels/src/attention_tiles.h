// The products of attention: a few rows by the keys or the values of a block. Every sum is one chain, along the head for a
// score, along the keys for a value, whatever rows are taken together.
#pragma once

#include <type_traits>

#include "attention_rows.h"

namespace {

constexpr int GROUP = 6;  // rows whose sums are in registers

// The same pointer, though the compiler does not know: what is read through it takes no register for longer than it is used.
template <class T>
INLINE const T *anew(const T *p) {
#if LANES != 2
    asm volatile("" : "+r"(p));
#endif
    return p;
}

// call(M, row) for groups of M rows, as even as can be.
template <class Call>
INLINE void by_groups(int rows, Call call) {
    const int groups = (rows + GROUP - 1) / GROUP;
    for (int g = 0, row = 0; g < groups; g++) {
        const int end = rows * (g + 1) / groups;
        switch (end - row) {
            case 1: call(std::integral_constant<int, 1>{}, row); break;
            case 2: call(std::integral_constant<int, 2>{}, row); break;
            case 3: call(std::integral_constant<int, 3>{}, row); break;
            case 4: call(std::integral_constant<int, 4>{}, row); break;
            case 5: call(std::integral_constant<int, 5>{}, row); break;
            default: call(std::integral_constant<int, GROUP>{}, row); break;
        }
        row = end;
    }
}

// How many panels, or chunks, go with M rows: enough sums that none waits for its last product, and room for them in registers.
constexpr int how_many(int m, int sums) { return sums / m >= 4 ? 4 : sums / m >= 2 ? 2 : 1; }
constexpr int PANELS = LANES == 2 ? 12 : 4;  // sums of M rows and panels; what is taken of each needs registers too
constexpr int CHUNKS = LANES == 2 ? 12 : 6;

// sums [M][P][16] += x [M][k] times P panels of floats [k][16], `panel` apart; from nothing where they are FRESH.
template <int M, int P, bool FRESH>
INLINE void multiply(const float *x, long ldx, const float *w, long panel, int k, float *sums, long stride) {
    Lanes s[M][P];
#pragma GCC unroll 8
    for (int i = 0; i < M; i++)
#pragma GCC unroll 4
        for (int p = 0; p < P; p++) s[i][p] = FRESH ? all(0.0f) : load(sums + i * stride + p * WIDTH);
    for (int at = 0; at < k; at++, w += WIDTH) {
        Lanes numbers[P];
#pragma GCC unroll 4
        for (int p = 0; p < P; p++) numbers[p] = load(w + p * panel);
#pragma GCC unroll 8
        for (int i = 0; i < M; i++) {
            const Lanes one = all(x[i * ldx + at]);
#pragma GCC unroll 4
            for (int p = 0; p < P; p++) s[i][p] = fma(one, numbers[p], s[i][p]);
        }
    }
#pragma GCC unroll 8
    for (int i = 0; i < M; i++)
#pragma GCC unroll 4
        for (int p = 0; p < P; p++) store(sums + i * stride + p * WIDTH, s[i][p]);
}

// The same for n panels.
template <int M, bool FRESH>
INLINE void multiply_all(const float *x, long ldx, const float *w, long panel, int n, int k, float *sums, long stride) {
    constexpr int P = how_many(M, PANELS);
    int p = 0;
    for (; p + P <= n; p += P) multiply<M, P, FRESH>(x, ldx, w + p * panel, panel, k, sums + p * WIDTH, stride);
    for (; p < n; p++) multiply<M, 1, FRESH>(x, ldx, w + p * panel, panel, k, sums + p * WIDTH, stride);
}

// Values [n][dim] of a page -> floats [chunk of 16 numbers][64 keys][16]
template <class T>
INLINE void widen_values(const T *from, int n, int dim, float *to) {
    for (int c = 0; c * WIDTH < dim; c++, to += BLOCK * WIDTH)
        for (int j = 0; j < n; j++) store(to + j * WIDTH, load(from + j * long(dim) + c * WIDTH, dim - c * WIDTH));
}

// scores [M][P][16] of q [M][dim] and the keys of P pages; as many of `next` are called into the cache, one after another.
template <int M, int P, class T>
INLINE void score(const float *q, long ldq, const T *const *keys, const T *const *next, int dim, float *scores, long stride) {
    Lanes s[M][P];
#pragma GCC unroll 8
    for (int i = 0; i < M; i++)
#pragma GCC unroll 4
        for (int p = 0; p < P; p++) s[i][p] = all(0.0f);
    for (int part = 0, at = 0; part < P; part++) {
        const T *ahead = next[part];
        for (; at < dim * (part + 1) / P; at += 2)
#pragma GCC unroll 4
            for (int p = 0; p < P; p++) {
                for (int i = 0; i < 2 * WIDTH; i += 64 / sizeof(T)) __builtin_prefetch(ahead + i);
                ahead += 2 * WIDTH;
#pragma GCC unroll 2
                for (int j = 0; j < 2; j++) {
                    const Lanes numbers = take_one(anew(keys[p]) + at * WIDTH, j);
#pragma GCC unroll 8
                    for (int i = 0; i < M; i++) s[i][p] = fma(all(q[i * ldq + at + j]), numbers, s[i][p]);
                }
            }
    }
#pragma GCC unroll 8
    for (int i = 0; i < M; i++)
#pragma GCC unroll 4
        for (int p = 0; p < P; p++) store(scores + i * stride + p * WIDTH, s[i][p]);
}

template <int M, class T>
INLINE void score_pages(const float *q, long ldq, const T *const *keys, const T *const *next, int n, int dim, float *scores,
                        long stride) {
    constexpr int P = how_many(M, PANELS);
    int p = 0;
    for (; p + P <= n; p += P) score<M, P>(q, ldq, keys + p, next + p, dim, scores + p * WIDTH, stride);
    for (; p < n; p++) score<M, 1>(q, ldq, keys + p, next + p, dim, scores + p * WIDTH, stride);
}

// sums [M][C * 16] += weights [M][n] times C chunks of values [n][dim]; as many numbers from `next` on are called in.
template <int M, int C, class T>
INLINE void add_chunks(const float *weights, long ldw, const T *values, const T *next, int n, int dim, float *sums, long stride) {
    constexpr int A_LINE = sizeof(T) == 2 ? 2 : 1;  // chunks of it
    Lanes s[M][C];
#pragma GCC unroll 8
    for (int i = 0; i < M; i++)
#pragma GCC unroll 4
        for (int c = 0; c < C; c++) s[i][c] = load(sums + i * stride + c * WIDTH);
    for (int j = 0; j < n; j++, values += dim) {
#pragma GCC unroll 4
        for (int c = 0; c < C; c++) {
            const Lanes numbers = load(values + c * WIDTH);
            if (c % A_LINE == 0) __builtin_prefetch(next), next += std::min(C, A_LINE) * WIDTH;
            const float *w = anew(weights) + j;
#pragma GCC unroll 8
            for (int i = 0; i < M; i++) s[i][c] = fma(all(w[i * ldw]), numbers, s[i][c]);
        }
    }
#pragma GCC unroll 8
    for (int i = 0; i < M; i++)
#pragma GCC unroll 4
        for (int c = 0; c < C; c++) store(sums + i * stride + c * WIDTH, s[i][c]);
}

template <int M, class T>
INLINE void add_values(const float *weights, long ldw, const T *values, const T *next, int n, int dim, float *sums,
                       long stride) {
    constexpr int C = how_many(M, CHUNKS);
    int c = 0;
    for (; c + C * WIDTH <= dim; c += C * WIDTH)
        add_chunks<M, C>(weights, ldw, values + c, next + c * PAGE, n, dim, sums + c, stride);
    for (; c < dim; c += WIDTH) add_chunks<M, 1>(weights, ldw, values + c, next + c * PAGE, n, dim, sums + c, stride);
}

}  // namespace
