// The products of attention: a few rows by the keys or the values of a block. Every sum is one chain, along the head for a
// score, along the keys for a value, whatever rows are taken together.
#pragma once

#include <algorithm>
#include <type_traits>

#include "pairs.h"

namespace {

constexpr int PAGE = WIDTH;
constexpr int BLOCK = 64;  // keys whose scores are weighed at once
constexpr int MAX_DIM = 256;
constexpr int GROUP = 6;  // rows whose sums are in registers

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

// How many panels go with M rows: enough sums that none waits for its last product, and room for them in registers.
constexpr int panels_for(int m) {
    const int most = (LANES == 2 ? 12 : 6) / m;
    return most >= 4 ? 4 : most >= 2 ? 2 : 1;
}

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
    constexpr int P = panels_for(M);
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

template <class T>
INLINE void call_in(const T *p, long numbers) {
    for (long byte = 0; byte < numbers * long(sizeof(T)); byte += 64) __builtin_prefetch((const char *)p + byte);
}

// scores [M][P][16] of q [M][dim] and the keys of P pages; as many of `next` are called into the cache.
template <int M, int P, class T>
INLINE void score(const float *q, long ldq, const T *const *keys, const T *const *next, int dim, float *scores, long stride) {
    Lanes s[M][P];
#pragma GCC unroll 8
    for (int i = 0; i < M; i++)
#pragma GCC unroll 4
        for (int p = 0; p < P; p++) s[i][p] = all(0.0f);
    for (int at = 0; at < dim; at += 2) {
        Lanes pairs[P][2];
#pragma GCC unroll 4
        for (int p = 0; p < P; p++) {
            take(keys[p] + at * WIDTH, pairs[p]);
            __builtin_prefetch(next[p] + at * WIDTH);
        }
#pragma GCC unroll 2
        for (int j = 0; j < 2; j++)
#pragma GCC unroll 8
            for (int i = 0; i < M; i++)
#pragma GCC unroll 4
                for (int p = 0; p < P; p++) s[i][p] = fma(all(q[i * ldq + at + j]), pairs[p][j], s[i][p]);
    }
#pragma GCC unroll 8
    for (int i = 0; i < M; i++)
#pragma GCC unroll 4
        for (int p = 0; p < P; p++) store(scores + i * stride + p * WIDTH, s[i][p]);
}

template <int M, class T>
INLINE void score_pages(const float *q, long ldq, const T *const *keys, const T *const *next, int n, int dim, float *scores,
                        long stride) {
    constexpr int P = panels_for(M);
    int p = 0;
    for (; p + P <= n; p += P) score<M, P>(q, ldq, keys + p, next + p, dim, scores + p * WIDTH, stride);
    for (; p < n; p++) score<M, 1>(q, ldq, keys + p, next + p, dim, scores + p * WIDTH, stride);
}

// sums [M][C * 16] += weights [M][n] times C chunks of values [n][dim]
template <int M, int C, class T>
INLINE void add_chunks(const float *weights, long ldw, const T *values, const T *next, int n, int dim, float *sums, long stride) {
    Lanes s[M][C];
#pragma GCC unroll 8
    for (int i = 0; i < M; i++)
#pragma GCC unroll 4
        for (int c = 0; c < C; c++) s[i][c] = load(sums + i * stride + c * WIDTH);
    for (int j = 0; j < n; j++, values += dim, next += dim) {
        Lanes numbers[C];
#pragma GCC unroll 4
        for (int c = 0; c < C; c++) {
            numbers[c] = load(values + c * WIDTH);
            __builtin_prefetch(next + c * WIDTH);
        }
#pragma GCC unroll 8
        for (int i = 0; i < M; i++) {
            const Lanes one = all(weights[i * ldw + j]);
#pragma GCC unroll 4
            for (int c = 0; c < C; c++) s[i][c] = fma(one, numbers[c], s[i][c]);
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
    constexpr int C = panels_for(M);
    int c = 0;
    for (; c + C * WIDTH <= dim; c += C * WIDTH)
        add_chunks<M, C>(weights, ldw, values + c, next + c, n, dim, sums + c, stride);
    for (; c < dim; c += WIDTH) add_chunks<M, 1>(weights, ldw, values + c, next + c, n, dim, sums + c, stride);
}

}  // namespace
