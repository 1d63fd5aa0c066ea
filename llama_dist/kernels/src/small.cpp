// The small operations between the matrix products: norms, rotation into the cache, the gate of the feed-forward.
//
// Each row is computed alone, in 16 lanes from its first number on; its bits do not depend on the other rows.
#include <algorithm>
#include <cmath>

#include "gate.h"
#include "pairs.h"
#include "team.h"

namespace {

constexpr long SERIAL = 1 << 14;  // numbers, below which waking the other threads costs more than it gains
constexpr long GATE = 512;        // numbers of a row that one thread gates; a multiple of the lanes
constexpr int MAX_DIM = 256;      // of a head that is cached

// x / sqrt(mean of squares + eps), rounded to T, times weight
template <class T>
void norm(const T *x, const T *weight, T *out, long dim, float eps) {
    call_in(weight, dim);  // not needed before the squares are added up
    Lanes squares[4] = {all(0.0f), all(0.0f), all(0.0f), all(0.0f)};
    for (long i = 0, lane = 0; i < dim; i += WIDTH, lane = (lane + 1) % 4) {
        Lanes a = load(x + i, dim - i);
        squares[lane] = fma(a, a, squares[lane]);
    }
    const float mean = sum((squares[0] + squares[1]) + (squares[2] + squares[3])) / float(dim);
    const Lanes factor = all(1.0f / std::sqrt(mean + eps));
    for (long i = 0; i < dim; i += WIDTH) {
        Lanes a = rounded<T>(load(x + i, dim - i) * factor);
        store(out + i, a * load(weight + i, dim - i), dim - i);
    }
}

// out = x + y; out may be x or y
template <class T>
void add(const T *x, const T *y, T *out, long dim) {
    for (long i = 0; i < dim; i += WIDTH) store(out + i, load(x + i, dim - i) + load(y + i, dim - i), dim - i);
}

// One head: its halves (a, b) become (a cos - b sin, b cos + a sin); `to` may be `from`.
template <class T>
void rotate(const T *from, const float *cos, const float *sin, T *to, long half) {
    for (long i = 0; i < half; i += WIDTH) {
        Lanes a = load(from + i, half - i), b = load(from + half + i, half - i);
        Lanes c = load(cos + i, half - i), s = load(sin + i, half - i);
        store(to + i, a * c - b * s, half - i);
        store(to + half + i, b * c + a * s, half - i);
    }
}

template <class T>
void silu_mul_row(const T *a, const T *b, T *out, long dim) {
    for (long i = 0; i < dim; i += WIDTH) put_gated(out + i, load(a + i, dim - i), load(b + i, dim - i), dim - i);
}

template <class F>
void typed(int is_bf16, F f) {
    is_bf16 ? f(bf16{}) : f(float{});
}

int worth(long numbers, int threads) { return numbers > SERIAL ? threads : 1; }

}  // namespace

void team::rms_norm(int is_bf16, const void *x, long x_stride, const void *y, long y_stride, void *total, const void *weight,
                    void *out, long out_stride, long n, long groups, long dim, float eps) {
    typed(is_bf16, [=](auto type) {
        using T = decltype(type);
#pragma omp for schedule(static) nowait
        for (long i = 0; i < n * groups; i++) {
            const long token = i / groups, at = i % groups * dim;
            const T *row = (const T *)x + token * x_stride + at;
            if (y) {
                T *sums = (T *)total + i * dim;
                add(row, (const T *)y + token * y_stride + at, sums, dim);
                row = sums;
            }
            if (weight) norm(row, (const T *)weight, (T *)out + token * out_stride + at, dim, eps);
        }
    });
}

void team::rope_write(int is_bf16, void *q, long q_stride, const void *k, long k_stride, const void *v, long v_stride,
                      const float *cos, const float *sin, const int64_t *angles, void *keys, void *values, long n_slots,
                      const int64_t *slots, long n, long heads, long kv_heads, long dim) {
    typed(is_bf16, [=](auto type) {
        using T = decltype(type);
#pragma omp for schedule(static) nowait
        for (long unit = 0; unit < n * kv_heads; unit++) {
            const long i = unit / kv_heads, h = unit % kv_heads, at = (angles ? angles[i] : i) * (dim / 2);
            const float *c = cos + at, *s = sin + at;
            const long in_page = slots[i] % WIDTH, page = (h * n_slots + slots[i] - in_page) * dim;
            T *to = (T *)keys + page, *value = (T *)values + page + in_page * dim;
            // A key is strewn over its page: its lines are asked for together, before the first is written.
            for (long j = 0; j < dim; j += sizeof(T) == 2 ? 2 : 1) __builtin_prefetch(to + in_panel<T>(in_page, j), 1);
            for (long j = 0; j < dim; j += 64 / long(sizeof(T))) __builtin_prefetch(value + j, 1);
            T *query = (T *)q + i * q_stride;
            for (long j = heads * h / kv_heads; j < heads * (h + 1) / kv_heads; j++)
                rotate(query + j * dim, c, s, query + j * dim, dim / 2);
            T key[MAX_DIM];
            rotate((const T *)k + i * k_stride + h * dim, c, s, key, dim / 2);
            constexpr long PAIR = sizeof(T) == 2 ? 2 : 1;  // numbers that stay side by side
            for (long j = 0; j < dim; j += PAIR) memcpy(to + in_panel<T>(in_page, j), key + j, PAIR * sizeof(T));
            memcpy(value, (const T *)v + i * v_stride + h * dim, dim * sizeof(T));
        }
    });
}

void team::silu_mul(int is_bf16, const void *a, long a_stride, const void *b, long b_stride, void *out, long n, long dim) {
    typed(is_bf16, [=](auto type) {
        using T = decltype(type);
        const long parts = (dim + GATE - 1) / GATE;
#pragma omp for schedule(static) nowait
        for (long i = 0; i < n * parts; i++) {
            const long row = i / parts, at = i % parts * GATE;
            silu_mul_row((const T *)a + row * a_stride + at, (const T *)b + row * b_stride + at, (T *)out + row * dim + at,
                         std::min(GATE, dim - at));
        }
    });
}

// x, out [n, dim]; rows of x are x_stride apart, those of out and, below, of y and total dim. Without y there is no sum.
extern "C" int llama_dist_rms_norm(int is_bf16, const void *x, long x_stride, const void *y, long y_stride, void *total,
                                   const void *weight, void *out, long n, long dim, float eps, int threads) {
    threads = worth(n * dim, threads);
#pragma omp parallel num_threads(threads) if (threads > 1)
    team::rms_norm(is_bf16, x, x_stride, y, y_stride, total, weight, out, dim, n, 1, dim, eps);
    return 0;
}

// q [n, heads, dim] is rotated in place; k [n, kv_heads, dim] rotated and v as it is go to slots[i] of the cache
// [kv_heads][n_slots / 16] of pages, in which sixteen keys are a panel (pairs.h) and values rows. dim is even, 256 at most.
// Returns 0, or 1 + the first token whose slot is not in the cache: then nothing is done.
extern "C" int llama_dist_rope_write(int is_bf16, void *q, long q_stride, const void *k, long k_stride, const void *v,
                                     long v_stride, const float *cos, const float *sin, void *keys, void *values,
                                     long n_slots, const int64_t *slots, long n, long heads, long kv_heads, long dim,
                                     int threads) {
    for (long i = 0; i < n; i++)
        if (slots[i] < 0 || slots[i] >= n_slots) return int(i) + 1;
    threads = worth(n * (heads + 2 * kv_heads) * dim, threads);
#pragma omp parallel num_threads(threads) if (threads > 1)
    team::rope_write(is_bf16, q, q_stride, k, k_stride, v, v_stride, cos, sin, nullptr, keys, values, n_slots, slots, n, heads,
                     kv_heads, dim);
    return 0;
}

// silu(a), rounded, times b; a, b, out [n, dim], rows of out dim apart
extern "C" int llama_dist_silu_mul(int is_bf16, const void *a, long a_stride, const void *b, long b_stride, void *out,
                                   long n, long dim, int threads) {
    threads = worth(n * dim, threads);
#pragma omp parallel num_threads(threads) if (threads > 1)
    team::silu_mul(is_bf16, a, a_stride, b, b_stride, out, n, dim);
    return 0;
}
