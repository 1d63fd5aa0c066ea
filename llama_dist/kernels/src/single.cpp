// What is done with single rows: an embedding taken out of its panel, the likeliest token of a row of logits.
#include <algorithm>
#include <cmath>

#include "pairs.h"

namespace {

// The first of the greatest of n numbers, or -1 where one of them is not finite.
template <class T>
int64_t likeliest(const T *row, int64_t n) {
    Lanes greatest = all(-INFINITY), found_at = all(0.0f), faults = all(0.0f);
    for (int64_t i = 0; i < n; i += WIDTH) {
        Lanes x = load(row + i, n - i);
        faults = fma(x, all(0.0f), faults);  // 0, or NaN for ever
        if (n - i < WIDTH) x = pick(between(0, int(n - i)), x, all(-INFINITY));
        const Mask more = greatest < x;
        greatest = pick(more, x, greatest);
        found_at = pick(more, all(float(i / WIDTH)), found_at);
    }
    if (!(sum(faults) == 0)) return -1;
    float values[WIDTH], places[WIDTH];
    store(values, greatest);
    store(places, found_at);
    int64_t best = 0, at = int64_t(places[0]) * WIDTH;
    for (int lane = 1; lane < WIDTH; lane++) {
        const int64_t place = int64_t(places[lane]) * WIDTH + lane;
        if (values[lane] > values[best] || (values[lane] == values[best] && place < at)) best = lane, at = place;
    }
    return at;
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
