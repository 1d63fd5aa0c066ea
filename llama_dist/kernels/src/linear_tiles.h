// Part of linear.cpp: tiles of rows by columns, their sums in registers, on sixteen lanes that are one register or that the
// compiler makes.
#pragma once

namespace {

// Sums along [0, k) of MR rows of x with NR rows of w, into acc[m * stride + n].
template <class D, int MR, int NR>
inline void dots(const typename D::T *x, int64_t ldx, const typename D::T *w, int64_t ldw, int64_t k, V *acc, int stride) {
    V a[MR][NR];
    for (int i = 0; i < MR; i++)
        for (int j = 0; j < NR; j++) a[i][j] = zero();
    int64_t at = 0;
    for (; at + D::STEP <= k; at += D::STEP) {
        typename D::X r[NR];
        for (int j = 0; j < NR; j++) r[j] = D::load(w + j * ldw + at);
        for (int i = 0; i < MR; i++) {
            typename D::X l = D::load(x + i * ldx + at);
            for (int j = 0; j < NR; j++) a[i][j] = D::dot(a[i][j], l, r[j]);
        }
    }
    if (at < k) {
        int left = int(k - at);
        typename D::X r[NR];
        for (int j = 0; j < NR; j++) r[j] = D::load(w + j * ldw + at, left);
        for (int i = 0; i < MR; i++) {
            typename D::X l = D::load(x + i * ldx + at, left);
            for (int j = 0; j < NR; j++) a[i][j] = D::dot(a[i][j], l, r[j]);
        }
    }
    for (int i = 0; i < MR; i++)
        for (int j = 0; j < NR; j++) acc[i * stride + j] = a[i][j];
}

// MR rows by NR columns from (m, n); columns go in groups of G.
template <class D, int MR, int NR, int G> inline void tile(const Job &job, int64_t m, int64_t n) {
    using T = typename D::T;
    static_assert(NR % G == 0, "columns go in whole groups");
    constexpr int N_SUMS = (MR * NR + 15) / 16;
    const T *x = static_cast<const T *>(job.x) + m * job.ldx, *w = static_cast<const T *>(job.w) + n * job.ldw;
    Tree tree[N_SUMS];
    for (int64_t start = 0, unit = job.first; start < job.k; start += job.unit, unit++) {
        int64_t k = std::min(job.unit, job.k - start);
        V acc[16 * N_SUMS];
        for (int i = MR * NR; i < 16 * N_SUMS; i++) acc[i] = zero();
        for (int g = 0; g < NR; g += G) dots<D, MR, G>(x + start, job.ldx, w + g * job.ldw + start, job.ldw, k, acc + g, NR);
        for (int s = 0; s < N_SUMS; s++) tree[s].push(sums(acc + 16 * s), unit);
    }
    for (int plane = 0; plane < tree[0].size; plane++) {
        float out[16 * N_SUMS];
        for (int s = 0; s < N_SUMS; s++) store(out + 16 * s, tree[s].values[plane]);
        for (int i = 0; i < MR; i++)
            for (int j = 0; j < NR; j++) put<T>(job, plane, m + i, n + j, out[i * NR + j]);
    }
}

template <class D, int MR, int NR, int G> inline void columns(const Job &job, int64_t m, int64_t n, int64_t n_end) {
    for (; n + NR <= n_end; n += NR) tile<D, MR, NR, G>(job, m, n);
    for (; n < n_end; n++) tile<D, MR, 1, 1>(job, m, n);
}

template <class D> void block(const Job &job, int64_t m, int64_t m_end, int64_t n, int64_t n_end) {
    // Wide tiles read less and narrow ones sum up cheaper, which counts where units are short; the bits are the same.
    int64_t whole = m + (m_end - m) / 4 * 4, step = job.unit < 512 ? 4 : 6;
    for (int64_t j = n; m < whole && j < n_end; j += step) {
        int64_t j_end = std::min(j + step, n_end);
        for (int64_t i = m; i < whole; i += 4)
            step == 4 ? columns<D, 4, 4, 4>(job, i, j, j_end) : columns<D, 4, 6, 6>(job, i, j, j_end);
    }
    m = whole;
    if (m_end - m >= 2) columns<D, 2, 8, 4>(job, m, n, n_end), m += 2;
    if (m_end - m) columns<D, 1, 16, 4>(job, m, n, n_end);
}

inline int64_t block_rows(const Job &) { return M_BLOCK; }

}  // namespace
