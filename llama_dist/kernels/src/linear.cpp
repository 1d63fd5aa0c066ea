// y = x W^T with every sum in an order of its own making: for one entry of y the lanes run along K in steps, then one
// tree over the lanes. No other row, column, thread or alignment plays a part, so the bits of an entry are the same in
// any batch and on any cut of N. Along K the sum may be cut into units, whose partial sums are added in the binary tree
// over unit numbers, as far as this rank's run of units holds whole subtrees: one plane of y for each of its roots.
#include "simd.h"
#include "tree.h"

#include <algorithm>

namespace {

constexpr int64_t M_BLOCK = 32;  // rows of x that stay in the second cache while columns pass by

// What one call computes, the same for all its threads.
struct Job {
    const void *x, *w, *bias;
    void *y;
    int64_t ldx, ldw, ldy, plane, m, n, k, unit, first;
    bool y_f32;
};

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

template <class T> inline float bias_at(const Job &job, int64_t n) {
    return job.bias ? widen(static_cast<const T *>(job.bias)[n]) : 0.0f;
}

template <class T> inline void put(const Job &job, int plane, int64_t m, int64_t n, float v) {
    if (job.bias) v += bias_at<T>(job, n);
    int64_t at = plane * job.plane + m * job.ldy + n;
    if (job.y_f32)
        static_cast<float *>(job.y)[at] = v;
    else if (sizeof(T) == 2)
        static_cast<bf16 *>(job.y)[at] = narrow(v);
    else
        static_cast<float *>(job.y)[at] = v;
}

// MR rows by NR columns from (m, n); columns go in groups of G.
template <class D, int MR, int NR, int G> inline void tile(const Job &job, int64_t m, int64_t n) {
    using T = typename D::T;
    static_assert(NR % G == 0, "columns go in whole groups");
    constexpr int N_SUMS = (MR * NR + 15) / 16;
    const T *x = static_cast<const T *>(job.x) + m * job.ldx, *w = static_cast<const T *>(job.w) + n * job.ldw;
    Tree<V> tree[N_SUMS];
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

template <class D> void run(const Job &job, int threads) {
    int64_t m_blocks = (job.m + M_BLOCK - 1) / M_BLOCK;
    // Columns a task takes: all threads busy, and a multiple of 16 so that no tile is cut without need.
    int64_t parts = m_blocks >= 4 * threads ? 1 : threads * (m_blocks > 1 ? 4 : 1);
    int64_t width = std::max<int64_t>(16, (job.n + parts - 1) / parts + 15 & ~int64_t(15));
    int64_t n_blocks = (job.n + width - 1) / width;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t t = 0; t < m_blocks * n_blocks; t++) {
        int64_t m = t % m_blocks * M_BLOCK, n = t / m_blocks * width;
        block<D>(job, m, std::min(m + M_BLOCK, job.m), n, std::min(n + width, job.n));
    }
}

}  // namespace

extern "C" int llama_dist_instructions() {
#if LD_AVX512 && defined(__AVX512BF16__)
    return 2;
#elif LD_AVX512
    return 1;
#else
    return 0;
#endif
}

extern "C" int llama_dist_linear(int is_bf16, const void *x, int64_t ldx, const void *w, int64_t ldw, const void *bias, void *y,
                          int64_t ldy, int64_t plane, int y_f32, int64_t m, int64_t n, int64_t k, int64_t unit,
                          int64_t first, int threads) {
    Job job{x, w, bias, y, ldx, ldw, ldy, plane, m, n, k, unit, first, y_f32 != 0};
    if (is_bf16)
        run<Bf16>(job, threads);
    else
        run<F32>(job, threads);
    return 0;
}
