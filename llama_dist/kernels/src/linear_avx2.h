// Part of linear.cpp for AVX2: sixteen lanes are two registers. Rows of x are widened to floats once for a block. Few rows
// meet the weights as they lie in memory; for more, four columns at a time are widened too, and their sums taken one half
// of the lanes after the other, so that twelve of them stay in registers. Both ways give the same bits.
#pragma once

#include <vector>

namespace {

constexpr int64_t K_BLOCK = 512;  // numbers of four widened columns that stay in the first cache
constexpr int64_t AHEAD = 8192;   // bytes of weights, at most, called into the cache before they are read

// n numbers of a row as whole steps of floats, zeros after them.
template <class D> inline void widen_row(const typename D::T *from, int64_t n, float *to) {
    int64_t at = 0;
    auto step = [&](const typename D::T *p) {
        if constexpr (sizeof(typename D::T) == 2) {
            __m256 even, odd;
            for (int half = 0; half < 2; half++) {
                Bf16::widen8(reinterpret_cast<const bf16 *>(p) + 16 * half, even, odd);
                _mm256_storeu_ps(to + 8 * half, even);
                _mm256_storeu_ps(to + 16 + 8 * half, odd);
            }
        } else {
            memcpy(to, p, D::STEP * 4);
        }
        to += D::STEP;
    };
    for (; at + D::STEP <= n; at += D::STEP) step(from + at);
    if (at < n) {
        typename D::T end[D::STEP] = {};
        memcpy(end, from + at, (n - at) * sizeof(typename D::T));
        step(end);
    }
}

inline V fma(__m256 a, __m256 b, const float *x, V acc) {
    return {_mm256_fmadd_ps(a, _mm256_loadu_ps(x), acc.low), _mm256_fmadd_ps(b, _mm256_loadu_ps(x + 8), acc.high)};
}

// acc[i][j] += x[i] times w[j] over one step
template <class D, int MR, int NR> inline void step(const float *x, int64_t ldx, const typename D::T *const *w, V (*acc)[NR]) {
#pragma GCC unroll 4
    for (int j = 0; j < NR; j++) {
        if constexpr (sizeof(typename D::T) == 2) {
            __m256 even, odd, even2, odd2;
            Bf16::widen8(reinterpret_cast<const bf16 *>(w[j]), even, odd);
            Bf16::widen8(reinterpret_cast<const bf16 *>(w[j]) + 16, even2, odd2);
#pragma GCC unroll 3
            for (int i = 0; i < MR; i++) acc[i][j] = fma(odd, odd2, x + i * ldx + 16, fma(even, even2, x + i * ldx, acc[i][j]));
        } else {
            __m256 a = _mm256_loadu_ps(reinterpret_cast<const float *>(w[j]));
            __m256 b = _mm256_loadu_ps(reinterpret_cast<const float *>(w[j]) + 8);
#pragma GCC unroll 3
            for (int i = 0; i < MR; i++) acc[i][j] = fma(a, b, x + i * ldx, acc[i][j]);
        }
    }
}

// Sums along k numbers of MR widened rows with NR columns as they lie, into acc[row * stride + column].
template <class D, int MR, int NR>
inline void direct(const float *x, int64_t ldx, const typename D::T *w, int64_t ldw, int64_t k, V *acc, int stride) {
    using T = typename D::T;
    V a[MR][NR];
    const T *p[NR];
    for (int j = 0; j < NR; j++) p[j] = w + j * ldw;
    for (int i = 0; i < MR; i++)
        for (int j = 0; j < NR; j++) a[i][j] = zero();
    // The same place of the next columns, unless they are so long that it would be gone again.
    const int64_t ahead = std::min<int64_t>(AHEAD, NR * ldw * sizeof(T));
    int64_t at = 0;
    for (; at + D::STEP <= k; at += D::STEP, x += D::STEP) {
        step<D, MR, NR>(x, ldx, p, a);
        for (int j = 0; j < NR; j++) {
            _mm_prefetch(reinterpret_cast<const char *>(p[j]) + ahead, _MM_HINT_T0);
            p[j] += D::STEP;
        }
    }
    if (at < k) {
        T ends[NR][D::STEP] = {};
        for (int j = 0; j < NR; j++) {
            memcpy(ends[j], p[j], (k - at) * sizeof(T));
            p[j] = ends[j];
        }
        step<D, MR, NR>(x, ldx, p, a);
    }
    for (int i = 0; i < MR; i++)
        for (int j = 0; j < NR; j++) acc[i * stride + j] = a[i][j];
}

// One half of the lanes of MR rows' and four columns' sums goes on along n floats; steps of either are `width` apart.
template <int MR, bool TWICE> inline void half(const float *x, int64_t ldx, const float *w, int64_t ldw, int64_t n, V *acc, int h) {
    constexpr int STEP = TWICE ? 32 : 16;
    __m256 a[MR][4];
    for (int i = 0; i < MR; i++)
        for (int j = 0; j < 4; j++) a[i][j] = h ? acc[4 * i + j].high : acc[4 * i + j].low;
    for (int64_t at = 8 * h; at < n; at += STEP) {
#pragma GCC unroll 2
        for (int odd = 0; odd <= (TWICE ? 16 : 0); odd += 16) {
            __m256 r[4];
#pragma GCC unroll 4
            for (int j = 0; j < 4; j++) r[j] = _mm256_loadu_ps(w + j * ldw + at + odd);
#pragma GCC unroll 3
            for (int i = 0; i < MR; i++) {
                __m256 l = _mm256_loadu_ps(x + i * ldx + at + odd);
#pragma GCC unroll 4
                for (int j = 0; j < 4; j++) a[i][j] = _mm256_fmadd_ps(l, r[j], a[i][j]);
            }
        }
    }
    for (int i = 0; i < MR; i++)
        for (int j = 0; j < 4; j++) (h ? acc[4 * i + j].high : acc[4 * i + j].low) = a[i][j];
}

template <class D, int MR> inline void halves(const float *x, int64_t ldx, const float *w, int64_t ldw, int64_t n, V *acc) {
    half<MR, D::STEP == 32>(x, ldx, w, ldw, n, acc, 0);
    half<MR, D::STEP == 32>(x, ldx, w, ldw, n, acc, 1);
}

constexpr int64_t padded(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

// A block of rows, widened: row m's unit u at x + m * ldx + u * unit_floats.
struct Wide {
    const float *x;
    int64_t ldx, unit_floats, m;
    int rows;
};

// MR rows by up to sixteen columns from n on, G of them at a time.
template <class D, int MR, int G> void few(const Job &job, const Wide &wide, int64_t n, int columns) {
    using T = typename D::T;
    const T *w = static_cast<const T *>(job.w) + n * job.ldw;
    const float *x = wide.x;
    Tree trees[MR];
    V acc[16 * MR];
    for (V &a : acc) a = zero();
    int64_t unit = job.first;
    for (int64_t start = 0; start < job.k; start += job.unit, unit++, x += wide.unit_floats) {
        const int64_t k = std::min(job.unit, job.k - start);
        int j = 0;
        for (; j + G <= columns; j += G) direct<D, MR, G>(x, wide.ldx, w + j * job.ldw + start, job.ldw, k, acc + j, 16);
        for (; j < columns; j++) direct<D, MR, 1>(x, wide.ldx, w + j * job.ldw + start, job.ldw, k, acc + j, 16);
        for (int i = 0; i < MR; i++) trees[i].push(sums(acc + 16 * i), unit);
    }
    for (int plane = 0; plane < trees[0].size; plane++)
        for (int i = 0; i < MR; i++) {
            float out[16];
            store(out, trees[i].values[plane]);
            for (int j = 0; j < columns; j++) put<T>(job, plane, wide.m + i, n + j, out[j]);
        }
}

// All rows of the block by up to four columns from n on.
template <class D> void many(const Job &job, const Wide &wide, int64_t n, int columns) {
    using T = typename D::T;
    const T *w = static_cast<const T *>(job.w) + n * job.ldw;
    const float *x = wide.x;
    const int rows = wide.rows, n_trees = (rows + 3) / 4;
    Tree trees[M_BLOCK / 4];
    V acc[M_BLOCK * 4];
    alignas(64) float four[4 * K_BLOCK];
    int64_t unit = job.first;
    for (int64_t start = 0; start < job.k; start += job.unit, unit++, x += wide.unit_floats) {
        const int64_t k = std::min(job.unit, job.k - start);
        for (int i = 0; i < 16 * n_trees; i++) acc[i] = zero();
        for (int64_t at = 0; at < k; at += K_BLOCK) {
            const int64_t some = std::min(K_BLOCK, k - at), floats = padded(some, D::STEP);
            for (int j = 0; j < 4; j++)
                widen_row<D>(w + std::min(j, columns - 1) * job.ldw + start + at, some, four + j * K_BLOCK);
            int i = 0;
            for (; i + 3 <= rows; i += 3) halves<D, 3>(x + i * wide.ldx + at, wide.ldx, four, K_BLOCK, floats, acc + 4 * i);
            if (rows - i == 2) halves<D, 2>(x + i * wide.ldx + at, wide.ldx, four, K_BLOCK, floats, acc + 4 * i);
            if (rows - i == 1) halves<D, 1>(x + i * wide.ldx + at, wide.ldx, four, K_BLOCK, floats, acc + 4 * i);
        }
        for (int t = 0; t < n_trees; t++) trees[t].push(sums(acc + 16 * t), unit);
    }
    for (int plane = 0; plane < trees[0].size; plane++)
        for (int i = 0; i < rows; i++) {
            float out[16];
            store(out, trees[i / 4].values[plane]);
            for (int j = 0; j < columns; j++) put<T>(job, plane, wide.m + i, n + j, out[i % 4 * 4 + j]);
        }
}

template <class D> void block(const Job &job, int64_t m, int64_t m_end, int64_t n, int64_t n_end) {
    using T = typename D::T;
    const int64_t n_units = (job.k + job.unit - 1) / job.unit, unit_floats = padded(std::min(job.unit, job.k), D::STEP);
    const int64_t ldx = n_units * unit_floats;
    static thread_local std::vector<float> wide;
    if (int64_t(wide.size()) < (m_end - m) * ldx) wide.resize((m_end - m) * ldx);
    for (int64_t i = 0; i < m_end - m; i++)
        for (int64_t u = 0; u < n_units; u++)
            widen_row<D>(static_cast<const T *>(job.x) + (m + i) * job.ldx + u * job.unit,
                         std::min(job.unit, job.k - u * job.unit), wide.data() + i * ldx + u * unit_floats);
    const Wide rows{wide.data(), ldx, unit_floats, m, int(m_end - m)};
    const int64_t step = rows.rows > 3 ? 4 : 16;
    for (int64_t j = n; j < n_end; j += step) {
        const int columns = int(std::min(step, n_end - j));
        if (rows.rows == 1) few<D, 1, 4>(job, rows, j, columns);
        if (rows.rows == 2) few<D, 2, 2>(job, rows, j, columns);
        if (rows.rows == 3) few<D, 3, 2>(job, rows, j, columns);
        if (rows.rows > 3) many<D>(job, rows, j, columns);
    }
}

inline int64_t block_rows(const Job &job) { return std::max<int64_t>(6, std::min<int64_t>(M_BLOCK, (1 << 16) / job.k)); }

}  // namespace
