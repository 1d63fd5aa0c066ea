// y = x W^T with every sum in an order of its own making: for one entry of y the lanes run along K in steps, then one
// tree over the lanes. No other row, column, thread or alignment plays a part, so the bits of an entry are the same in
// any batch and on any cut of N. Along K the sum may be cut into units, whose partial sums are added in the binary tree
// over unit numbers, as far as this rank's run of units holds whole subtrees: one plane of y for each of its roots.
//
// It serves processors that multiply bfloat16 themselves; on others weights lie in panels (panels.cpp), and this is slow.
#include "simd.h"
#include "team.h"
#include "unit_tree.h"

#include <algorithm>

namespace {

constexpr int64_t M_BLOCK = 32;  // rows of x that stay in the second cache while columns pass by, if they are short

// What one call computes, the same for all its threads.
struct Job {
    const void *x, *w, *bias;
    void *y;
    int64_t ldx, ldw, ldy, plane, m, n, k, unit, first;
    bool y_f32;
};

using Tree = TreeOf<V>;

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

}  // namespace

#include "linear_tiles.h"

namespace {

// Called by every thread of a team.
template <class D> void run(const Job &job, int threads) {
    const int64_t rows = block_rows(job), m_blocks = (job.m + rows - 1) / rows;
    // Columns a task takes: all threads busy, and a multiple of 16 so that no tile is cut without need.
    int64_t parts = m_blocks >= 4 * threads ? 1 : threads * (m_blocks > 1 ? 4 : 1);
    int64_t width = std::max<int64_t>(16, ((job.n + parts - 1) / parts + 15) & ~int64_t(15));
    int64_t n_blocks = (job.n + width - 1) / width;
#pragma omp for schedule(static) nowait
    for (int64_t t = 0; t < m_blocks * n_blocks; t++) {
        int64_t m = t % m_blocks * rows, n = t / m_blocks * width;
        block<D>(job, m, std::min(m + rows, job.m), n, std::min(n + width, job.n));
    }
}

}  // namespace

extern "C" int llama_dist_instructions() {
#if LANES == 2 && defined(__AVX512BF16__)
    return 2;
#elif LANES == 2
    return 1;
#else
    return 0;
#endif
}

void team::linear(int is_bf16, const void *x, int64_t ldx, const void *w, int64_t ldw, const void *bias, void *y, int64_t ldy,
                  int64_t plane, int y_f32, int64_t m, int64_t n, int64_t k, int64_t unit, int64_t first, int threads) {
    Job job{x, w, bias, y, ldx, ldw, ldy, plane, m, n, k, unit, first, y_f32 != 0};
    is_bf16 ? run<Bf16>(job, threads) : run<F32>(job, threads);
}

extern "C" int llama_dist_linear(int is_bf16, const void *x, int64_t ldx, const void *w, int64_t ldw, const void *bias, void *y,
                                 int64_t ldy, int64_t plane, int y_f32, int64_t m, int64_t n, int64_t k, int64_t unit,
                                 int64_t first, int threads) {
#pragma omp parallel num_threads(threads) if (threads > 1)
    team::linear(is_bf16, x, ldx, w, ldw, bias, y, ldy, plane, y_f32, m, n, k, unit, first, threads);
    return 0;
}
