// What is done with single rows: an embedding taken out of its panel, the likeliest token of a row of logits.
#include "likely.h"
#include "pairs.h"
#include "team.h"

namespace {

// The first of the greatest of n numbers, or -1 where one of them is not finite.
template <class T>
int64_t first_of(const T *row, int64_t n) {
    const Likeliest found = likeliest_of(row, n);
    return found.finite ? found.at : -1;
}

inline bf16 plus_zero(bf16 x) { return {uint16_t(x.bits == 0x8000 ? 0 : x.bits)}; }
inline float plus_zero(float x) { return x + 0.0f; }

template <class T>
void look_up(const T *table, int64_t stride, bool panels, int64_t row, int64_t n, bool plus, T *to) {
    if (panels) {
        const T *from = table + row / WIDTH * stride;
        for (int64_t i = 0; i < n; i++) to[i] = from[in_panel<T>(row % WIDTH, i)];
    } else {
        memcpy(to, table + row * stride, n * sizeof(T));
    }
    if (plus)
        for (int64_t i = 0; i < n; i++) to[i] = plus_zero(to[i]);
}

template <class T>
void look_up_all(const T *table, int64_t stride, bool panels, int64_t first, int64_t rows, bool plus, const int64_t *ids,
                 int64_t m, int64_t n, T *to) {
#pragma omp for schedule(static) nowait
    for (int64_t i = 0; i < m; i++) {
        const int64_t row = ids[i] - first;
        if (row >= 0 && row < rows)
            look_up(table, stride, panels, row, n, plus, to + i * n);
        else
            memset(to + i * n, 0, n * sizeof(T));
    }
}

}  // namespace

void team::look_up(int is_bf16, const void *table, int64_t stride, bool panels, int64_t first, int64_t rows, bool plus,
                   const int64_t *ids, int64_t m, int64_t n, void *to) {
    is_bf16 ? look_up_all((const bf16 *)table, stride, panels, first, rows, plus, ids, m, n, (bf16 *)to)
            : look_up_all((const float *)table, stride, panels, first, rows, plus, ids, m, n, (float *)to);
}

void team::likeliest(int is_bf16, const void *rows, int64_t stride, int64_t m, int64_t n, int64_t *found) {
#pragma omp for schedule(static) nowait
    for (int64_t i = 0; i < m; i++)
        found[i] = is_bf16 ? first_of((const bf16 *)rows + i * stride, n) : first_of((const float *)rows + i * stride, n);
}

extern "C" int llama_dist_likeliest(int is_bf16, const void *rows, int64_t stride, int64_t m, int64_t n, int64_t *found,
                                    int threads) {
#pragma omp parallel num_threads(threads) if (threads > 1 && m > 1)
    team::likeliest(is_bf16, rows, stride, m, n, found);
    return 0;
}

// Rows ids [m] of the first n numbers in panels of `panel` numbers each -> to [m, n]. 0, or 1 + the first that is not one of
// the `rows` rows.
extern "C" int llama_dist_look_up(int is_bf16, const void *panels, int64_t panel, int64_t rows, const int64_t *ids, int64_t m,
                                  int64_t n, void *to) {
    for (int64_t i = 0; i < m; i++)
        if (ids[i] < 0 || ids[i] >= rows) return int(i) + 1;
    team::look_up(is_bf16, panels, panel, true, 0, rows, false, ids, m, n, to);
    return 0;
}
