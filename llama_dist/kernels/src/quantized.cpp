// y = x W^T for packed weights (groups.h). Rows of x become whole numbers too, a scale, a power of two, for each group of 32;
// products of groups are exact, and their scaled sums are taken lane by lane in the order of K, then by unit in the tree of
// unit_tree.h.
//
// So the bits of an entry of y are a function of its row of x and its row of W, on any number of threads, in any batch, and
// the same on processors with and without AVX-512, and by AMX (quantized_tiles.h).
#include "quantized_tiles.h"
#include "unit_tree.h"

namespace {

constexpr int64_t M_BLOCK = 64;     // rows of x that stay in the second cache while weights pass by
// Bytes of weights called into the cache before M rows are multiplied by them, and in which. Where no more than some lines
// can be on their way (Zen 3) a single row's are called in late and once; of several rows the next ones find them in the second
// cache. Processors with AVX-512 (Granite Rapids) drop what is to pass by the outer caches, and like it early; those with bf16 but
// no AMX (Zen 4) call in a single row's eight bits themselves, and like one block of W after another.
#if DOTS == 1
template <int BITS, int M> constexpr int AHEAD = BITS == 8 && M == 1 ? 0 : 4096;
template <int BITS, int M> constexpr int KEEP = BITS == 8 ? 2 : 3;
#elif LANES == 2
template <int BITS, int M> constexpr int AHEAD = 4096;
template <int BITS, int M> constexpr int KEEP = 3;
#else
template <int BITS, int M> constexpr int AHEAD = BITS == 8 && M == 1 ? 1024 : 2048;
template <int BITS, int M> constexpr int KEEP = M == 1 ? 0 : 3;
#endif
constexpr int TILE_M = 4, TILE_N = WHOLES == 2 && DOTS != 1 ? 2 : 1;  // rows, and blocks of W, whose sums are in registers together

// M rows, the first being number m of y and `row` of those rounded, by N blocks of W, from block n on.
template <class T, int BITS, int M, int N>
void tile(const Job &job, const Rows &rows, int64_t m, int64_t row, int64_t n) {
    constexpr int CODES = Format<BITS>::CODES, SCALES = Format<BITS>::SCALES;
    const int64_t groups = job.groups(), a_unit = job.unit_groups();
    const uint8_t *codes[N], *scales[N];
    const int8_t *x[M];
    for (int j = 0; j < N; j++) {
        codes[j] = job.w.codes + (n + j) * job.w.block_groups * CODES;
        scales[j] = job.w.scales + (n + j) * job.w.block_groups * SCALES;
    }
    for (int i = 0; i < M; i++) x[i] = &rows.numbers[(row + i) * groups * X_BYTES];
    const float *x_scales = &rows.scales[row * groups];
    const int *x_sums = &rows.sums[row * groups];
    const bool whole = job.first < 0;
    Lanes totals[M][N];
    TreeOf<Lanes> trees[M][N];
    for (int i = 0; i < M; i++)
        for (int j = 0; j < N; j++) totals[i][j] = all(0.0f);
    for (int64_t u = 0, g = 0; u < job.w.n_units; u++) {
        Lanes part[M][N];
        for (int i = 0; i < M; i++)
            for (int j = 0; j < N; j++) part[i][j] = all(0.0f);
        for (const int64_t end = g + a_unit; g < end; g++) {
            Sums sums[M][N];
            int of_x[M];
            for (int i = 0; i < M; i++) of_x[i] = x_sums[i * groups + g];
            for (int j = 0; j < N; j++)
                for (int at = 0; AHEAD<BITS, M> && at < CODES; at += 64)
                    __builtin_prefetch(codes[j] + AHEAD<BITS, M> + at, 0, KEEP<BITS, M>);
            multiply<BITS, M, N>(codes, x, of_x, sums);
            for (int j = 0; j < N; j++) {
                const Lanes scale = lanes_of(scales[j]);
                const Lanes zero = BITS == 4 ? lanes_of(scales[j] + WIDTH) : all(0.0f);
                for (int i = 0; i < M; i++) {
                    Lanes v = lanes_of(sums[i][j]);
                    if (BITS == 4) v = fma(zero, all(of_x[i] * (-1.0f / 16)), v);
                    part[i][j] = fma(v, scale * all(x_scales[i * groups + g]), part[i][j]);
                }
                codes[j] += CODES;
                scales[j] += SCALES;
            }
            for (int i = 0; i < M; i++) x[i] += X_BYTES;
        }
        for (int j = 0; j < N; j++) {
            const Lanes factor = load(job.w.factors + ((n + j) * job.w.block_units + u) * WIDTH);
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

template <class T, int BITS, int N>
void rows_by_blocks(const Job &job, const Rows &rows, int64_t m, int64_t m_end, int64_t n) {
    int64_t row = 0, many = m_end - m;
    for (; row + TILE_M <= many; row += TILE_M) tile<T, BITS, TILE_M, N>(job, rows, m + row, row, n);
    if (row + 2 <= many) tile<T, BITS, 2, N>(job, rows, m + row, row, n), row += 2;
    if (row < many) tile<T, BITS, 1, N>(job, rows, m + row, row, n);
}

// Called by every thread of a team. Each rounds the rows that it needs for itself: that is cheaper than to wait for others.
template <class T, int BITS> void run(const Job &job, int threads) {
    const int64_t n_blocks = (job.n + WIDTH - 1) / WIDTH, m_blocks = (job.m + M_BLOCK - 1) / M_BLOCK;
    const int64_t width = blocks_a_thread(job.n, threads), n_parts = (n_blocks + width - 1) / width;
    static thread_local Rows rows;
    int64_t rounded = -1;
#pragma omp for schedule(static) nowait
    for (int64_t t = 0; t < m_blocks * n_parts; t++) {
        const int64_t m = t / n_parts * M_BLOCK, m_end = std::min(m + M_BLOCK, job.m);
        int64_t n = t % n_parts * width;
        const int64_t n_end = std::min(n + width, n_blocks);
        if (rounded != m) round_rows<T, BITS>(job, m, m_end, rows), rounded = m;
        for (; n + TILE_N <= n_end; n += TILE_N) rows_by_blocks<T, BITS, TILE_N>(job, rows, m, m_end, n);
        for (; n < n_end; n++) rows_by_blocks<T, BITS, 1>(job, rows, m, m_end, n);
    }
}

}  // namespace

Coming team::coming(const Packed &w, int64_t m, int64_t n, int t, int threads) {
    if (w.bits >= 16 || w.bits == E4M3) return coming_panels(w, m, n, t, threads);
    const int64_t codes = w.bits == 8 ? Format<8>::CODES : w.bits == 6 ? Format<6>::CODES : Format<4>::CODES;
    const int64_t blocks = (n + WIDTH - 1) / WIDTH, width = blocks_a_thread(n, threads), count = std::min(width, blocks - width * t);
    if (m > M_BLOCK || count <= 0) return {};
    const int64_t block = w.block_groups * codes;
    return Coming::of(w.codes + width * t * block, 1, 0, count * block);
}

void team::quantized(int is_bf16, const void *x, int64_t ldx, const Packed &w, const void *bias, void *y, int64_t ldy,
                     int64_t plane, int y_f32, int64_t m, int64_t n, int64_t first, int threads, Coming *coming) {
    if (w.bits >= 16 || w.bits == E4M3) return panels(is_bf16, x, ldx, w, bias, y, ldy, plane, y_f32, m, n, first, threads, coming);
    const Job job{x, ldx, w, bias, y, ldy, plane, y_f32 != 0, m, n, first};
#if PACKED_TILES
    if (is_bf16 && m >= FEWEST && w.n_units && has_tiles()) {
        if (w.bits == 8) by_tiles<8>(job, threads);
        if (w.bits == 6) by_tiles<6>(job, threads);
        if (w.bits == 4) by_tiles<4>(job, threads);
        return;
    }
#endif
    if (w.bits == 8) is_bf16 ? run<bf16, 8>(job, threads) : run<float, 8>(job, threads);
    if (w.bits == 6) is_bf16 ? run<bf16, 6>(job, threads) : run<float, 6>(job, threads);
    if (w.bits == 4) is_bf16 ? run<bf16, 4>(job, threads) : run<float, 4>(job, threads);
}

// x [m, n_units * unit], rows ldx apart; y [planes, m, n] in x's type or float; bias [n] in x's type or null. Planes are
// the roots of the tree over units number first ... first + n_units - 1, or one whole sum where first is negative.
extern "C" int llama_dist_quantized(int is_bf16, const void *x, int64_t ldx, const team::Packed *w, const void *bias, void *y,
                                    int64_t ldy, int64_t plane, int y_f32, int64_t m, int64_t n, int64_t first, int threads) {
#pragma omp parallel num_threads(threads) if (threads > 1)
    team::quantized(is_bf16, x, ldx, *w, bias, y, ldy, plane, y_f32, m, n, first, threads);
    return 0;
}
