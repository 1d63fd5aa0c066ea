// What ranks of one host do in their shared segment: sums, gathers, messages, the likeliest of their logits.
#include "shared.h"

#include <algorithm>
#include <numeric>
#include <vector>

#include "likely.h"
#include "tree.h"

namespace {

constexpr long CALLED = 1024;  // numbers of another rank that are all asked for before the first is used
// Bytes, and numbers of planes, from which on it is faster if the ranks add up a part each.
constexpr long EACH_ITS_PART = 1 << 15, MANY_NUMBERS = 1 << 16;

// Put numbers [first, last) of the round's slots, added up over the ranks, at `to`.
template <class T>
void add_up(Segment *s, uint32_t round, long first, long last, T *to) {
    for (long i = first; i < last; i += WIDTH) {
        Lanes total = load((const T *)s->slot(round, 0) + i, last - i);
        for (int r = 1; r < s->n_ranks; r++) total = total + load((const T *)s->slot(round, r) + i, last - i);
        store(to + i - first, total, last - i);
    }
}

template <class T>
int sum(Segment *s, int rank, T *x, long n, Coming *coming) {
    const long most = s->capacity / sizeof(T);
    for (long done = 0; done < n; done += most) {
        const long count = std::min(most, n - done), bytes = count * sizeof(T);
        const uint32_t round = next_round(s, rank);
        memcpy(s->slot(round, rank), x + done, bytes);
        if (int fault = enter_alike(s, rank, round, bytes, coming)) return fault;
        if (bytes < EACH_ITS_PART) {
            add_up(s, round, 0, count, x + done);
            continue;
        }
        const long part = (count / s->n_ranks / WIDTH + 1) * WIDTH;
        auto first = [&](long r) { return std::min(count, r * part); };
        add_up(s, round, first(rank), first(rank + 1), (T *)s->slot(round + 1, rank));
        if (int fault = enter_alike(s, rank, round + 1, bytes)) return fault;
        for (int r = 0; r < s->n_ranks; r++)
            memcpy(x + done + first(r), s->slot(round + 1, r), (first(r + 1) - first(r)) * sizeof(T));
    }
    return 0;
}

template <class T>
int sum_planes(Segment *s, int rank, const float *planes, long plane, const int64_t *counts, const int64_t *nodes, T *y,
               long numbers, Coming *coming) {
    const long n_planes = std::accumulate(counts, counts + s->n_ranks, 0L);
    const long most = s->capacity / long(sizeof(float)) / *std::max_element(counts, counts + s->n_ranks);
    std::vector<const float *> parts(n_planes);
    for (long done = 0; done < numbers; done += most) {
        const long count = std::min(most, numbers - done);
        const uint32_t round = next_round(s, rank);
        const bool in_parts = count * n_planes >= MANY_NUMBERS;
        const long part = in_parts ? (count / s->n_ranks / WIDTH + 1) * WIDTH : 0;
        auto first = [&](long r) { return std::min(count, r * part); };
        const long begin = in_parts ? first(rank) : 0, end = in_parts ? first(rank + 1) : count;
        for (long i = 0; i < counts[rank]; i++) {  // what others add up
            float *to = (float *)s->slot(round, rank) + i * count;
            const float *from = planes + i * plane + done;
            memcpy(to, from, (in_parts ? begin : count) * sizeof(float));
            if (in_parts) memcpy(to + end, from + end, (count - end) * sizeof(float));
        }
        if (int fault = enter_alike(s, rank, round, count, coming)) return fault;
        for (long r = 0, p = 0; r < s->n_ranks; r++)
            for (long i = 0; i < counts[r]; i++, p++) {
                parts[p] = r == rank ? planes + i * plane + done : (const float *)s->slot(round, r) + i * count;
                call_in(parts[p] + begin, std::min(end - begin, CALLED));
            }
        T *to = in_parts ? (T *)s->slot(round + 1, rank) - begin : y + done;
        for (long i = begin; i < end; i += WIDTH)
            store(to + i, tree(nodes, n_planes, [&](long p) { return load(parts[p] + i, end - i); }), end - i);
        if (!in_parts) continue;
        if (int fault = enter_alike(s, rank, round + 1, count)) return fault;
        for (int r = 0; r < s->n_ranks; r++)
            memcpy(y + done + first(r), s->slot(round + 1, r), (first(r + 1) - first(r)) * sizeof(T));
    }
    return 0;
}

struct Best {
    float value;
    int32_t at;
};

template <class T>
int likeliest(Segment *s, int rank, const T *rows, long stride, long m, long n, long first, int64_t *found, Coming *coming) {
    const long most = s->capacity / long(sizeof(Best));
    for (long done = 0; done < m; done += most) {
        const long end = std::min(m, done + most), bytes = (end - done) * long(sizeof(Best));
        const uint32_t round = next_round(s, rank);
        Best *mine = (Best *)s->slot(round, rank);
        for (long i = done; i < end; i++)
            mine[i - done] = found[i] < 0 ? Best{0, -1}
                             : n          ? Best{float(number(rows + i * stride + found[i])), int32_t(first + found[i])}
                                          : Best{-INFINITY, INT32_MAX};
        if (int fault = enter_alike(s, rank, round, bytes, coming)) return fault;
        for (long i = done; i < end; i++) {
            Best best = ((const Best *)s->slot(round, 0))[i - done];
            for (int r = 1; r < s->n_ranks && best.at >= 0; r++) {
                const Best other = ((const Best *)s->slot(round, r))[i - done];
                if (other.at < 0 || other.value > best.value) best = other;
            }
            found[i] = best.at;
        }
    }
    return 0;
}

}  // namespace

// Bytes of a segment.
extern "C" int llama_dist_shared_size(int n_ranks, long capacity) {
    return int(sizeof(Segment) + n_ranks * (sizeof(Place) + 2 * capacity));
}

// Make a segment of zeros ready; by one rank, before any other uses it. A wait takes `timeout` seconds at most.
extern "C" int llama_dist_shared_start(void *segment, int n_ranks, long capacity, double timeout, int crowded) {
    Segment *s = (Segment *)segment;
    s->n_ranks = n_ranks;
    s->capacity = capacity;
    s->timeout = int64_t(std::min(timeout, 1e9) * 1e9);
    s->spin = crowded ? 0 : SPIN;
    s->yield = YIELD;
    return 0;
}

int shared_sum(void *segment, int rank, int is_bf16, void *x, long n, Coming *coming) {
    Segment *s = (Segment *)segment;
    return is_bf16 ? sum(s, rank, (bf16 *)x, n, coming) : sum(s, rank, (float *)x, n, coming);
}

int shared_planes(void *segment, int rank, const float *planes, long plane, const int64_t *counts, const int64_t *nodes,
                  int is_bf16, void *y, long numbers, Coming *coming) {
    Segment *s = (Segment *)segment;
    return is_bf16 ? sum_planes(s, rank, planes, plane, counts, nodes, (bf16 *)y, numbers, coming)
                   : sum_planes(s, rank, planes, plane, counts, nodes, (float *)y, numbers, coming);
}

int shared_likeliest(void *segment, int rank, int is_bf16, const void *rows, long stride, long m, long n, long first,
                     int64_t *found, Coming *coming) {
    Segment *s = (Segment *)segment;
    return is_bf16 ? likeliest(s, rank, (const bf16 *)rows, stride, m, n, first, found, coming)
                   : likeliest(s, rank, (const float *)rows, stride, m, n, first, found, coming);
}

extern "C" int llama_dist_shared_sum(void *segment, int rank, int is_bf16, void *x, long n) {
    return shared_sum(segment, rank, is_bf16, x, n, nullptr);
}

extern "C" int llama_dist_shared_planes(void *segment, int rank, const float *planes, long plane, const int64_t *counts,
                                        const int64_t *nodes, int is_bf16, void *y, long numbers) {
    return shared_planes(segment, rank, planes, plane, counts, nodes, is_bf16, y, numbers, nullptr);
}

extern "C" int llama_dist_shared_gather(void *segment, int rank, const char *x, long rows, long bytes, char *out) {
    Segment *s = (Segment *)segment;
    for (long done = 0, all = rows * bytes; done < all; done += s->capacity) {
        const long end = std::min(all, done + s->capacity);
        const uint32_t round = next_round(s, rank);
        memcpy(s->slot(round, rank), x + done, end - done);
        if (int fault = enter_alike(s, rank, round, end - done)) return fault;
        for (int r = 0; r < s->n_ranks; r++)
            for (long at = done, next; at < end; at = next) {
                const long row = at / bytes;
                next = std::min(end, (row + 1) * bytes);
                memcpy(out + row * bytes * (s->n_ranks - 1) + r * bytes + at, s->slot(round, r) + at - done, next - at);
            }
    }
    return 0;
}

// Each rank's x, of any number of bytes, at most the capacity: sizes [n_ranks], out [n_ranks, capacity].
extern "C" int llama_dist_shared_exchange(void *segment, int rank, const char *x, long bytes, int64_t *sizes, char *out) {
    Segment *s = (Segment *)segment;
    const uint32_t round = next_round(s, rank);
    memcpy(s->slot(round, rank), x, bytes);
    if (int fault = enter(s, rank, round, bytes, nullptr)) return fault;
    for (int r = 0; r < s->n_ranks; r++) {
        sizes[r] = s->place(r)->bytes[round & 1];
        memcpy(out + r * s->capacity, s->slot(round, r), sizes[r]);
    }
    return 0;
}

// This rank's waits, now and later, end within a moment. For another thread that knows it waits in vain.
extern "C" int llama_dist_shared_break(void *segment, int rank) {
    ((Segment *)segment)->place(rank)->broken.store(1);
    return 0;
}
