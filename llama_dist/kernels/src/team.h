// The kernels as parts of one parallel region: every thread of a team of `threads` calls them alike, and may leave before the
// others are done (meet.h). What they compute is said where they are defined. What returns something is asked before.
#pragma once

#include <cstdint>
#include <memory>

#include "coming.h"

namespace team {

// Packed weights, as groups.h says; from one block of sixteen rows to the next are block_groups groups, block_units factors.
// Eight bits may also be E4M3, floats.
constexpr int64_t E4M3 = -8;
struct Packed {
    int64_t bits;
    const uint8_t *codes, *scales;
    const float *factors;
    int64_t block_groups, block_units, unit, n_units;
};

// What is `coming` may be called in at the end.
void quantized(int is_bf16, const void *x, int64_t ldx, const Packed &w, const void *bias, void *y, int64_t ldy, int64_t plane,
               int y_f32, int64_t m, int64_t n, int64_t first, int threads, Coming *coming = nullptr);

// The same of weights that are floats, as panels.cpp says: bits 16 or 32, those of x, without scales and factors, or E4M3.
void panels(int is_bf16, const void *x, int64_t ldx, const Packed &w, const void *bias, void *y, int64_t ldy, int64_t plane,
            int y_f32, int64_t m, int64_t n, int64_t first, int threads, Coming *coming);

// What thread t of `threads` reads first of the weights that a few rows are multiplied by: of any, and of panels.
Coming coming(const Packed &w, int64_t m, int64_t n, int t, int threads);
Coming coming_panels(const Packed &w, int64_t m, int64_t n, int t, int threads);
// The same where products of m rows go by tiles, see below; `up` 0 where there is no gate.
Coming coming_tiles(const Packed &w, int64_t m, int64_t n, int64_t first, int64_t up, int t, int threads);

// Whether products of m rows go by tiles (panel_tiles.h), which can end with more than sums: `total` with that of the tree over
// the units number `first` and on, in x's type, bf16; `gated` with silu(a) b, [m, n], where a are the first n rows of W and b
// those from row `up` on, a multiple of sixteen.
bool in_tiles(int is_bf16, const Packed &w, int64_t m);
void total(const void *x, int64_t ldx, const Packed &w, void *y, int64_t ldy, int64_t m, int64_t n, int64_t first, int threads,
           Coming *coming);
void gated(const void *x, int64_t ldx, const Packed &w, int64_t up, void *y, int64_t ldy, int64_t m, int64_t n, int threads,
           Coming *coming);

// Rows of `groups` heads of `dim` numbers, tokens x_stride, y_stride and out_stride apart; total is packed. Without weight
// there is only the sum.
void rms_norm(int is_bf16, const void *x, long x_stride, const void *y, long y_stride, void *total, const void *weight,
              void *out, long out_stride, long n, long groups, long dim, float eps);

// A token's angles are row angles[i] of cos and sin, or without `angles` row i.
void rope_write(int is_bf16, void *q, long q_stride, const void *k, long k_stride, const void *v, long v_stride,
                const float *cos, const float *sin, const int64_t *angles, void *keys, void *values, long n_slots,
                const int64_t *slots, long n, long heads, long kv_heads, long dim);

// Rows ids [m], less `first`, of a table of `rows` rows of n numbers -> to [m, n]; what the table does not have is zeros. It
// lies in panels of `stride` numbers, or in rows that are `stride` apart. `plus`: a -0 becomes 0, as in a sum.
void look_up(int is_bf16, const void *table, int64_t stride, bool panels, int64_t first, int64_t rows, bool plus,
             const int64_t *ids, int64_t m, int64_t n, void *to);

// found[i]: the first of the greatest of row i's n numbers, or -1 where one of them is not finite; rows are `stride` apart.
void likeliest(int is_bf16, const void *rows, int64_t stride, int64_t m, int64_t n, int64_t *found);

void silu_mul(int is_bf16, const void *a, long a_stride, const void *b, long b_stride, void *out, long n, long dim);

// 0, or 1 + the first span whose pages are missing or lie outside the cache.
int bad_span(long slots, const int *tables, int max_pages, const int *starts, const int *lengths, int spans);

// How attention is dealt out in all layers that are alike: made before the team begins, of what must outlive it.
struct Plan;
std::shared_ptr<const Plan> plan_attention(int is_bf16, const int *tables, int max_pages, const int *starts, const int *lengths,
                                           int spans, const int *of_query, int heads, int kv_heads, int dim, int window,
                                           int threads);
void attend(const Plan &plan, const void *q, long q_stride, const void *keys, const void *values, long slots, void *out);

}  // namespace team
