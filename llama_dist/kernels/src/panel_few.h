// A row or two of bf16 by panels, without AMX: reading the weights is all that counts.
#pragma once

#include "panel_rows.h"

namespace {

#if DOTS == 1

static_assert(FEW_PAIRED == 2);

// M rows, all of x, by P panels: n, n + apart ... Steps are short: with longer ones the processor's own prefetch falls behind.
// Units' sums wait for the tree, up to UNITS of them.
template <int M, int P>
INLINE void rows_by_panels_apart(const Job &job, const Wide &x, int64_t n, int64_t apart, Roots &roots) {
    constexpr int STEP = 8, UNITS = 16;  // numbers along K; sums of a row
    const bool whole = job.first < 0;
    const int64_t k = whole ? job.numbers_a_row() : job.unit_numbers(), units = whole ? 1 : job.w.n_units;
    const int64_t words = job.numbers_a_row() / 2, panel = job.panel() * apart;
    const bf16 *w = (const bf16 *)job.w.codes + n * job.panel();
    const uint32_t *pairs = x.as<uint32_t>();
    Lanes sums[UNITS][P * M];
    roots.start(P * M);
    for (int64_t done = 0; done < units; done += UNITS) {
        const int64_t some = std::min<int64_t>(UNITS, units - done);
        for (int64_t u = 0; u < some; u++) {
            __m512 s[P][M];
            for (int p = 0; p < P; p++)
                for (int i = 0; i < M; i++) s[p][i] = _mm512_setzero_ps();
            for (int64_t at = 0; at < k; at += STEP)
#pragma GCC unroll 4
                for (int j = 0; j < STEP / 2; j++, pairs++, w += 2 * WIDTH)
#pragma GCC unroll 2
                    for (int p = 0; p < P; p++) {
                        const __m512bh weights = (__m512bh)_mm512_loadu_si512(w + p * panel);
#pragma GCC unroll 2
                        for (int i = 0; i < M; i++)
                            s[p][i] = _mm512_dpbf16_ps(s[p][i], weights, (__m512bh)_mm512_set1_epi32(pairs[i * words]));
                    }
            for (int p = 0; p < P; p++)
                for (int i = 0; i < M; i++) sums[u][p * M + i] = {s[p][i]};
        }
        for (int64_t u = 0; u < some; u++) {
            std::copy_n(sums[u], P * M, roots.next(false));
            roots.push(whole ? 0 : job.first + done + u);
        }
    }
    put_roots<bf16, P>(job, x, n, apart, roots);
}

// Whether x has a row or two, which are then multiplied.
template <int P> bool row_or_two(const Job &job, const Wide &x, int64_t n, int64_t apart, Roots &roots) {
    if (x.rows == 1) rows_by_panels_apart<1, P>(job, x, n, apart, roots);
    if (x.rows == 2) rows_by_panels_apart<2, P>(job, x, n, apart, roots);
    return x.rows <= 2;
}

#endif

}  // namespace
