// Causal attention over the paged cache. A row is one query head of one token; its keys are taken in pages of 16, from
// position 0 on, with a running maximum and sum; every 512 keys the running numbers start anew and are merged in order.
//
// So a row's bits follow from its query, its keys and their positions, however rows are tiled and dealt to threads.
#include <algorithm>
#include <cmath>
#include <vector>

#include "dots.h"
#include "team.h"

namespace {

constexpr int PAGE = WIDTH;
constexpr int ROWS = 32;      // of a tile: they share each page's keys and values, which are widened once
constexpr int SEGMENT = 512;  // keys, after which partial results are merged: threads may share a long sequence
constexpr int MAX_DIM = 256;

template <class T>
struct Job {
    const T *q;  // [n, heads, dim], rows q_stride apart
    long q_stride;
    const T *keys, *values;  // [kv_heads, slots, dim], heads head_stride apart
    long head_stride;
    const int *tables;  // [spans, max_pages]
    int max_pages;
    const int *starts, *lengths;
    int heads, dim, window;
    T *out;  // [n, heads, dim]
    std::vector<int> readers, first_reader;  // the query heads in the order of their KV heads; where each one's begin
    std::vector<long> first_token;           // of each span

    int chunks() const { return (dim + WIDTH - 1) / WIDTH; }
    int stride() const { return (chunks() + 2) * WIDTH; }
};

// `rows` rows of one span and KV head: row i is reader i % readers of token i / readers.
struct Tile {
    int span, kv_head, first, rows;
};

// A tile with what is asked of each row: its token's position, and the first key that it sees.
template <class T>
struct Rows {
    const Job<T> &job;
    const Tile &tile;
    int n_readers;

    Rows(const Job<T> &job, const Tile &tile)
        : job(job), tile(tile), n_readers(job.first_reader[tile.kv_head + 1] - job.first_reader[tile.kv_head]) {}
    int token(int row) const { return (tile.first + row) / n_readers; }
    int head(int row) const { return job.readers[job.first_reader[tile.kv_head] + (tile.first + row) % n_readers]; }
    int end(int row) const { return job.starts[tile.span] + token(row) + 1; }
    int begin(int row) const { return job.window ? std::max(0, end(row) - job.window) : 0; }
    long place(int position) const {  // in keys and values, of the page that holds a position
        const long page = job.tables[long(tile.span) * job.max_pages + position / PAGE];
        return tile.kv_head * job.head_stride + page * PAGE * job.dim;
    }
    int first_segment() const { return begin(0) / SEGMENT; }
    int end_segment() const { return (end(tile.rows - 1) - 1) / SEGMENT + 1; }
    bool sees(int row, int segment) const { return begin(row) < (segment + 1) * SEGMENT && end(row) > segment * SEGMENT; }
};

// The running numbers of a row: the weighted values [chunks * 16], the sum of weights in 16 lanes, the greatest score.
INLINE float *total_of(float *row, int chunks) { return row + chunks * WIDTH; }
INLINE float &most_of(float *row, int chunks) { return row[(chunks + 1) * WIDTH]; }

// values and total of a row times 2^by
INLINE void scale(float *row, int chunks, float by) {
    Lanes factor = exp2(all(by));
    for (int c = 0; c <= chunks; c++) store(row + c * WIDTH, load(row + c * WIDTH) * factor);
}

// The weights of a page's keys by their scores, with the row's numbers brought to its new greatest score.
INLINE Lanes weighed(Lanes scores, float *row, int chunks) {
    const float now = most(scores), before = most_of(row, chunks);
    if (now > before) {
        scale(row, chunks, before - now);
        most_of(row, chunks) = now;
    }
    Lanes weights = exp2(scores - all(most_of(row, chunks)));
    store(total_of(row, chunks), load(total_of(row, chunks)) + weights);
    return weights;
}

// [n, dim] of a page -> float [chunks][16][16], zero beyond n and dim; `next`, the page to come, is called into the cache
template <class T>
INLINE void widen(const T *from, const T *next, int n, int dim, float *to) {
    for (int c = 0; c * WIDTH < dim; c++, to += WIDTH * WIDTH) {
        const T *part = from + c * WIDTH;
        for (int j = 0; j < n; j++) {
            __builtin_prefetch(next + j * long(dim) + c * WIDTH);
            store(to + j * WIDTH, load(part + j * long(dim), dim - c * WIDTH));
        }
        for (int j = n; j < PAGE; j++) store(to + j * WIDTH, all(0.0f));
    }
}

// R rows' values += the values of keys first ... last - 1, each by its weight, in rising order
template <int R, int C>
INLINE void weigh_chunks(const float *weights, const float *v, int first, int last, float *rows, long stride) {
    Lanes sums[R][C];
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
#pragma GCC unroll 8
        for (int c = 0; c < C; c++) sums[r][c] = load(rows + r * stride + c * WIDTH);
    for (int j = first; j < last; j++) {
        Lanes at[C];
#pragma GCC unroll 8
        for (int c = 0; c < C; c++) at[c] = load(v + (c * PAGE + j) * WIDTH);
#pragma GCC unroll 8
        for (int r = 0; r < R; r++) {
            Lanes weight = all(weights[r * PAGE + j]);
#pragma GCC unroll 8
            for (int c = 0; c < C; c++) sums[r][c] = fma(weight, at[c], sums[r][c]);
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
#pragma GCC unroll 8
        for (int c = 0; c < C; c++) store(rows + r * stride + c * WIDTH, sums[r][c]);
}

template <int R>
INLINE void weigh(const float *weights, const float *v, int first, int last, float *rows, long stride, int chunks) {
    int c = 0;
    for (; c + 4 <= chunks; c += 4) weigh_chunks<R, 4>(weights, v + c * PAGE * WIDTH, first, last, rows + c * WIDTH, stride);
    for (; c < chunks; c++) weigh_chunks<R, 1>(weights, v + c * PAGE * WIDTH, first, last, rows + c * WIDTH, stride);
}

// The tile's rows over the keys of one segment, from nothing: `state` [rows][stride].
template <class T>
void attend_segment(const Rows<T> &rows, const float *q, int segment, float *state) {
    const Job<T> &job = rows.job;
    const int chunks = job.chunks(), n = rows.tile.rows, last = rows.end(n - 1);
    const long stride = job.stride(), width = chunks * WIDTH;
    alignas(64) float k[PAGE * MAX_DIM], v[PAGE * MAX_DIM], weights[ROWS * PAGE];
    int ends[ROWS], begins[ROWS], firsts[ROWS], counts[ROWS];
    for (int r = 0; r < n; r++) {
        std::fill(state + r * stride, state + r * stride + width + WIDTH, 0.0f);
        most_of(state + r * stride, chunks) = -INFINITY;
        ends[r] = rows.end(r);
        begins[r] = rows.begin(r);
    }
    const int stop = std::min(last, (segment + 1) * SEGMENT);
    for (int base = std::max(segment * SEGMENT, begins[0] / PAGE * PAGE); base < stop; base += PAGE) {
        const int filled = std::min(PAGE, last - base);
        const long at = rows.place(base), next = rows.place(std::min(base + PAGE, stop - 1));
        widen(job.keys + at, job.keys + next, filled, job.dim, k);
        widen(job.values + at, job.values + next, filled, job.dim, v);
        for (int r = 0; r < n; r++) {
            firsts[r] = std::min(std::max(0, begins[r] - base), PAGE);
            counts[r] = std::max(0, std::min(PAGE, ends[r] - base) - firsts[r]);
            if (!counts[r]) continue;
            Lanes scores = dots(q + r * width, k, chunks);
            if (counts[r] < PAGE) scores = pick(between(firsts[r], firsts[r] + counts[r]), scores, all(-INFINITY));
            store(weights + r * PAGE, weighed(scores, state + r * stride, chunks));
        }
        for (int r = 0, many; r < n; r += many) {
            many = 1;
            if (counts[r] == PAGE)
                while (many < 4 && r + many < n && counts[r + many] == PAGE) many++;
            float *row = state + r * stride;
            const float *weight = weights + r * PAGE;
            const int first = firsts[r], end = first + counts[r];
            if (many == 4) weigh<4>(weight, v, first, end, row, stride, chunks);
            if (many == 3) weigh<3>(weight, v, first, end, row, stride, chunks);
            if (many == 2) weigh<2>(weight, v, first, end, row, stride, chunks);
            if (many == 1) weigh<1>(weight, v, first, end, row, stride, chunks);
        }
    }
}

// What a tile's rows hold after one segment, merged into what they hold of those before it.
template <class T>
void merge(const Rows<T> &rows, int segment, float *state, float *into) {
    const int chunks = rows.job.chunks();
    const long stride = rows.job.stride();
    for (int r = 0; r < rows.tile.rows; r++) {
        float *from = state + r * stride, *to = into + r * stride;
        if (!rows.sees(r, segment)) continue;
        if (segment == rows.begin(r) / SEGMENT) {
            std::copy(from, from + stride, to);
            continue;
        }
        const float most = std::max(most_of(from, chunks), most_of(to, chunks));
        scale(from, chunks, most_of(from, chunks) - most);
        scale(to, chunks, most_of(to, chunks) - most);
        for (int c = 0; c <= chunks; c++) store(to + c * WIDTH, load(to + c * WIDTH) + load(from + c * WIDTH));
        most_of(to, chunks) = most;
    }
}

// The tile's queries as floats [rows][chunks * 16], scaled such that the weight of a score s is 2^s.
template <class T>
void queries(const Rows<T> &rows, float *q) {
    const Job<T> &job = rows.job;
    const Lanes scale = all(float(1.4426950408889634 / std::sqrt(double(job.dim))));
    for (int r = 0; r < rows.tile.rows; r++) {
        const T *from = job.q + (job.first_token[rows.tile.span] + rows.token(r)) * job.q_stride;
        from += long(rows.head(r)) * job.dim;
        for (int c = 0; c * WIDTH < job.dim; c++, q += WIDTH)
            store(q, load(from + c * WIDTH, job.dim - c * WIDTH) * scale);
    }
}

template <class T>
void finish(const Rows<T> &rows, float *state) {
    const Job<T> &job = rows.job;
    const int chunks = job.chunks();
    for (int r = 0; r < rows.tile.rows; r++, state += job.stride()) {
        T *to = job.out + ((job.first_token[rows.tile.span] + rows.token(r)) * job.heads + rows.head(r)) * job.dim;
        const Lanes total = all(sum(load(total_of(state, chunks))));
        for (int c = 0; c < chunks; c++) store(to + c * WIDTH, load(state + c * WIDTH) / total, job.dim - c * WIDTH);
    }
}

constexpr int STATE = ROWS * (MAX_DIM + 2 * WIDTH);

template <class T>
void attend_tile(const Rows<T> &rows) {
    alignas(64) float q[ROWS * MAX_DIM], part[STATE], state[STATE];
    queries(rows, q);
    for (int s = rows.first_segment(); s < rows.end_segment(); s++) {
        attend_segment(rows, q, s, part);
        merge(rows, s, part, state);
    }
    finish(rows, state);
}

// Few tiles over many keys: the threads share their segments.
template <class T>
void attend_shared(const Job<T> &job, const std::vector<Tile> &tiles) {
    struct Piece {
        int tile, segment;
        long state;
    };
    std::vector<Piece> pieces;
    std::vector<int> first_piece;
    long size = 0;
    for (int t = 0; t < int(tiles.size()); t++) {
        Rows<T> rows(job, tiles[t]);
        first_piece.push_back(int(pieces.size()));
        for (int s = rows.first_segment(); s < rows.end_segment(); s++, size += tiles[t].rows * long(job.stride()))
            pieces.push_back({t, s, size});
    }
    first_piece.push_back(int(pieces.size()));
    float *states;  // one for the team
#pragma omp single copyprivate(states)
    states = new float[size];
#pragma omp for schedule(dynamic)
    for (int i = 0; i < int(pieces.size()); i++) {
        alignas(64) float q[ROWS * MAX_DIM];
        Rows<T> rows(job, tiles[pieces[i].tile]);
        queries(rows, q);
        attend_segment(rows, q, pieces[i].segment, states + pieces[i].state);
    }
#pragma omp for schedule(dynamic)
    for (int t = 0; t < int(tiles.size()); t++) {
        Rows<T> rows(job, tiles[t]);
        alignas(64) float state[STATE];
        for (int i = first_piece[t]; i < first_piece[t + 1]; i++)
            merge(rows, pieces[i].segment, states + pieces[i].state, state);
        finish(rows, state);
    }
#pragma omp single nowait
    delete[] states;
}

// Called by every thread of a team.
template <class T>
void attend(Job<T> &job, int spans, const int *of_query, int kv_heads, int threads) {
    for (int h = 0; h < kv_heads; h++) {
        job.first_reader.push_back(int(job.readers.size()));
        for (int i = 0; i < job.heads; i++)
            if (of_query[i] == h) job.readers.push_back(i);
    }
    job.first_reader.push_back(int(job.readers.size()));
    std::vector<Tile> tiles;
    bool shared = false;
    long token = 0;
    for (int i = 0; i < spans; token += job.lengths[i++]) {
        job.first_token.push_back(token);
        shared |= job.starts[i] + job.lengths[i] > SEGMENT;
        for (int h = 0; h < kv_heads; h++) {
            const int rows = job.lengths[i] * (job.first_reader[h + 1] - job.first_reader[h]);
            for (int first = 0; first < rows; first += ROWS) tiles.push_back({i, h, first, std::min(ROWS, rows - first)});
        }
    }
    if (shared && threads > 1 && int(tiles.size()) < 4 * threads) return attend_shared(job, tiles);
#pragma omp for schedule(dynamic)
    for (int t = int(tiles.size()) - 1; t >= 0; t--) attend_tile(Rows<T>(job, tiles[t]));  // the long ones first
}

}  // namespace

int team::bad_span(long slots, const int *tables, int max_pages, const int *starts, const int *lengths, int spans) {
    for (int i = 0; i < spans; i++) {
        const int pages = (starts[i] + lengths[i] + PAGE - 1) / PAGE;
        if (pages > max_pages) return i + 1;
        for (int p = 0; p < pages; p++) {
            const long page = tables[long(i) * max_pages + p];
            if (page < 0 || (page + 1) * PAGE > slots) return i + 1;
        }
    }
    return 0;
}

void team::attend(int is_bf16, const void *q, long q_stride, const void *keys, const void *values, long head_stride,
                  const int *tables, int max_pages, const int *starts, const int *lengths, int spans, const int *of_query,
                  int heads, int kv_heads, int dim, int window, void *out, int threads) {
    auto run = [&](auto type) {
        using T = decltype(type);
        Job<T> job{(const T *)q, q_stride, (const T *)keys, (const T *)values, head_stride, tables, max_pages,
                   starts,       lengths,  heads,           dim,               window,      (T *)out};
        ::attend(job, spans, of_query, kv_heads, threads);
    };
    is_bf16 ? run(bf16{}) : run(float{});
}

// Returns 0, or 1 + the first span whose pages are missing or lie outside the cache, in which case nothing is computed.
extern "C" int llama_dist_attend(int is_bf16, const void *q, long q_stride, const void *keys, const void *values,
                                 long head_stride, long slots, const int *tables, int max_pages, const int *starts,
                                 const int *lengths, int spans, const int *of_query, int heads, int kv_heads, int dim,
                                 int window, void *out, int threads) {
    if (int bad = team::bad_span(slots, tables, max_pages, starts, lengths, spans)) return bad;
#pragma omp parallel num_threads(threads) if (threads > 1)
    team::attend(is_bf16, q, q_stride, keys, values, head_stride, tables, max_pages, starts, lengths, spans, of_query, heads,
                 kv_heads, dim, window, out, threads);
    return 0;
}
