// What is done with single rows: an embedding taken out of its panel, the likeliest token of a row of logits.
#include "likely.h"
#include "pairs.h"

namespace {

// The first of the greatest of n numbers, or -1 where one of them is not finite.
template <class T>
int64_t likeliest(const T *row, int64_t n) {
    const Likeliest found = likeliest_of(row, n);
    return found.finite ? found.at : -1;
}

template <class T>
void look_up(const T *panels, int64_t panel, int64_t row, int64_t n, T *to) {
    const T *from = panels + row / WIDTH * panel;
    for (int64_t i = 0; i < n; i++) to[i] = from[in_panel<T>(row % WIDTH, i)];
}

}  // namespace

// found[i]: the first of the greatest of row i's n numbers, or -1; rows are `stride` apart.
extern "C" int llama_dist_likeliest(int is_bf16, const void *rows, int64_t stride, int64_t m, int64_t n, int64_t *found,
                                    int threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1 && m > 1)
    for (int64_t i = 0; i < m; i++)
        found[i] = is_bf16 ? likeliest((const bf16 *)rows + i * stride, n) : likeliest((const float *)rows + i * stride, n);
    return 0;
}

// Rows ids [m] of the first n numbers in panels of `panel` numbers each -> to [m, n]. 0, or 1 + the first that is not one of
// the `rows` rows.
extern "C" int llama_dist_look_up(int is_bf16, const void *panels, int64_t panel, int64_t rows, const int64_t *ids, int64_t m,
                                  int64_t n, void *to) {
    for (int64_t i = 0; i < m; i++)
        if (ids[i] < 0 || ids[i] >= rows) return int(i) + 1;
    for (int64_t i = 0; i < m; i++)
        is_bf16 ? look_up((const bf16 *)panels, panel, ids[i], n, (bf16 *)to + i * n)
                : look_up((const float *)panels, panel, ids[i], n, (float *)to + i * n);
    return 0;
}
