// y = x W^T for packed weights (groups.h). Rows of x become whole numbers too, a scale for each group of 32; products of
// groups are exact, and their scaled sums are taken lane by lane in the order of K, then by unit in the tree of linear.cpp.
//
// So the bits of an entry of y are a function of its row of x and its row of W, on any number of threads, in any batch, and
// the same on processors with and without AVX-512.
#include <algorithm>
#include <cmath>
#include <memory>

#include "groups.h"
#include "tree.h"

namespace {

constexpr int64_t M_BLOCK = 64;         // rows of x that stay in the second cache while weights pass by
constexpr int64_t SERIAL = 1 << 15;     // numbers of x, below which waking the other threads costs more than it gains
constexpr float SMALLEST = 1e-30f;      // a group of x whose largest number is below counts as zero

// What one call computes, the same for all its threads.
struct Job {
    const uint8_t *codes, *scales;
    const float *factors;
    int64_t block_groups, block_units;  // from one block of sixteen rows to the next
    const void *bias;
    void *y;
    int64_t ldy, plane;
    bool y_f32;
    int64_t m, n, unit, n_units, first;  // first < 0: one sum over all units
    int64_t unit_groups() const { return (unit + GROUP - 1) / GROUP; }
    int64_t groups() const { return n_units * unit_groups(); }
};

// The rows of x as whole numbers: codes [m][groups][32], and of each group its scale and the sum of its codes.
struct Input {
    std::unique_ptr<int8_t[]> codes;
    std::unique_ptr<float[]> scales;
    std::unique_ptr<int[]> sums;
    Input(int64_t m, int64_t groups)
        : codes(new int8_t[m * groups * GROUP]), scales(new float[m * groups]), sums(new int[m * groups]) {}
};

INLINE Lanes magnitude(Lanes x) { return pick(x < all(0.0f), all(0.0f) - x, x); }

// n numbers, at most 32, then zeros -> codes from -127 to 127. A NaN or an infinite number makes the scale NaN.
template <class T>
INLINE void round_group(const T *x, int64_t n, int8_t *codes, float &scale, int &sum_of_codes) {
    const Lanes a = load(x, n), b = n > WIDTH ? load(x + WIDTH, n - WIDTH) : all(0.0f);
    const Lanes p = magnitude(a), q = magnitude(b);
    const float largest = most(pick(p < q, q, p));
    const bool counts = largest >= SMALLEST;
    const Lanes by = all(counts ? 127.0f / largest : 0.0f);
    scale = (counts ? largest / 127.0f : 0.0f) + sum(a * all(0.0f) + b * all(0.0f));
    uint32_t bits[GROUP];  // with WHOLE added a whole number stands in the low bits
    store((float *)bits, a * by + all(WHOLE));
    store((float *)bits + WIDTH, b * by + all(WHOLE));
    sum_of_codes = 0;
    for (int i = 0; i < GROUP; i++) codes[i] = int8_t(bits[i]);
    for (int i = 0; i < GROUP; i++) sum_of_codes += codes[i];
}

template <class T>
void round_rows(const Job &job, const T *x, int64_t ldx, const Input &in, int threads) {
    const int64_t a_unit = job.unit_groups(), groups = job.groups();
#pragma omp parallel for schedule(static) num_threads(threads) if (job.m * groups * GROUP > SERIAL)
    for (int64_t m = 0; m < job.m; m++)
        for (int64_t g = 0; g < groups; g++) {
            const int64_t at = g % a_unit * GROUP, i = m * groups + g;
            const T *from = x + m * ldx + g / a_unit * job.unit + at;
            round_group(from, std::min<int64_t>(GROUP, job.unit - at), &in.codes[i * GROUP], in.scales[i], in.sums[i]);
        }
}

template <class T> INLINE void put(const Job &job, int64_t plane, int64_t m, int64_t n, Lanes v) {
    const int64_t left = job.n - n, at = plane * job.plane + m * job.ldy + n;
    if (job.bias) v = v + load((const T *)job.bias + n, left);
    job.y_f32 ? store((float *)job.y + at, v, left) : store((T *)job.y + at, v, left);
}

// M rows of x, from m on, by N blocks of W, from block n on.
template <class T, int BITS, int M, int N>
void tile(const Job &job, const Input &in, int64_t m, int64_t n) {
    constexpr int CODES = Format<BITS>::CODES, SCALES = Format<BITS>::SCALES;
    const int64_t groups = job.groups(), a_unit = job.unit_groups();
    const uint8_t *codes[N], *scales[N];
    const int8_t *x[M];
    const float *x_scales[M];
    const int *x_sums[M];
    for (int j = 0; j < N; j++) {
        codes[j] = job.codes + (n + j) * job.block_groups * CODES;
        scales[j] = job.scales + (n + j) * job.block_groups * SCALES;
    }
    for (int i = 0; i < M; i++) {
        x[i] = &in.codes[(m + i) * groups * GROUP];
        x_scales[i] = &in.scales[(m + i) * groups];
        x_sums[i] = &in.sums[(m + i) * groups];
    }
    const bool whole = job.first < 0;
    Lanes totals[M][N];
    Tree<Lanes> trees[M][N];
    for (int i = 0; i < M; i++)
        for (int j = 0; j < N; j++) totals[i][j] = all(0.0f);
    for (int64_t u = 0; u < job.n_units; u++) {
        Lanes part[M][N];
        for (int i = 0; i < M; i++)
            for (int j = 0; j < N; j++) part[i][j] = all(0.0f);
        for (int64_t g = u * a_unit; g < (u + 1) * a_unit; g++) {
            Sums sums[M][N];
            int of_x[M];
            for (int i = 0; i < M; i++) of_x[i] = x_sums[i][g];
            multiply<BITS, M, N>(codes, x, of_x, sums);
            for (int j = 0; j < N; j++) {
                const Lanes scale = lanes_of(scales[j]);
                const Lanes zero = BITS == 4 ? lanes_of(scales[j] + WIDTH) : all(0.0f);
                for (int i = 0; i < M; i++) {
                    Lanes v = lanes_of(sums[i][j]);
                    if (BITS == 4) v = fma(zero, all(of_x[i] * (-1.0f / 16)), v);  // exact, a multiple of 1/16
                    part[i][j] = fma(v, scale * all(x_scales[i][g]), part[i][j]);
                }
                codes[j] += CODES;
                scales[j] += SCALES;
            }
            for (int i = 0; i < M; i++) x[i] += GROUP;
        }
        for (int j = 0; j < N; j++) {
            const Lanes factor = load(job.factors + ((n + j) * job.block_units + u) * WIDTH);
            for (int i = 0; i < M; i++) {
                const Lanes v = part[i][j] * factor;
                if (whole)
                    totals[i][j] = totals[i][j] + v;
                else
                    trees[i][j].push(v, job.first + u);
            }
        }
    }
    for (int i = 0; i < M; i++)
        for (int j = 0; j < N; j++) {
            if (whole) put<T>(job, 0, m + i, (n + j) * WIDTH, totals[i][j]);
            for (int p = 0; p < trees[i][j].size; p++) put<T>(job, p, m + i, (n + j) * WIDTH, trees[i][j].values[p]);
        }
}

#ifndef TILE_M
#define TILE_M 4
#endif
#ifndef TILE_N
#define TILE_N (WHOLES == 2 ? 2 : 1)
#endif

template <class T, int BITS, int N>
void blocks(const Job &job, const Input &in, int64_t m, int64_t m_end, int64_t n) {
    for (; m + TILE_M <= m_end; m += TILE_M) tile<T, BITS, TILE_M, N>(job, in, m, n);
    if (m + 2 <= m_end) tile<T, BITS, 2, N>(job, in, m, n), m += 2;
    if (m < m_end) tile<T, BITS, 1, N>(job, in, m, n);
}

template <class T, int BITS> void run(const Job &job, const T *x, int64_t ldx, int threads) {
    Input in(job.m, job.groups());
    round_rows(job, x, ldx, in, threads);
    const int64_t n_blocks = (job.n + WIDTH - 1) / WIDTH, m_blocks = (job.m + M_BLOCK - 1) / M_BLOCK;
    // Blocks of W a task takes: all threads busy, and alike long.
    const int64_t parts = threads * (m_blocks > 1 ? 4 : 1), width = (n_blocks + parts - 1) / parts;
    const int64_t n_parts = (n_blocks + width - 1) / width;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t t = 0; t < m_blocks * n_parts; t++) {
        const int64_t m = t % m_blocks * M_BLOCK, m_end = std::min(m + M_BLOCK, job.m);
        int64_t n = t / m_blocks * width;
        const int64_t n_end = std::min(n + width, n_blocks);
        for (; n + TILE_N <= n_end; n += TILE_N) blocks<T, BITS, TILE_N>(job, in, m, m_end, n);
        for (; n < n_end; n++) blocks<T, BITS, 1>(job, in, m, m_end, n);
    }
}

}  // namespace

// x [m, n_units * unit], rows ldx apart; y [planes, m, n] in x's type or float; bias [n] in x's type or null. Planes are
// the roots of the tree over units number first ... first + n_units - 1, or one whole sum where first is negative.
extern "C" int llama_dist_quantized(int bits, int is_bf16, const void *x, int64_t ldx, const uint8_t *codes,
                                    const uint8_t *scales, const float *factors, int64_t block_groups,
                                    int64_t block_units, const void *bias, void *y, int64_t ldy, int64_t plane, int y_f32,
                                    int64_t m, int64_t n, int64_t unit, int64_t n_units, int64_t first, int threads) {
    Job job{codes, scales, factors, block_groups, block_units, bias, y, ldy, plane, y_f32 != 0, m, n, unit, n_units, first};
    auto typed = [&](auto type) {
        using T = decltype(type);
        bits == 8 ? run<T, 8>(job, (const T *)x, ldx, threads) : run<T, 4>(job, (const T *)x, ldx, threads);
    };
    is_bf16 ? typed(bf16{}) : typed(float{});
    return 0;
}
