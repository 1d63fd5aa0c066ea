// The rows of attention: what is asked of each, and the numbers that it has so far.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "dots.h"

namespace {

constexpr int PAGE = WIDTH;
constexpr int MAX_DIM = 256;
constexpr int SEGMENT = 512;  // keys, after which partial results are merged: threads may share a long sequence
constexpr int BLOCK = 64;     // keys whose scores are weighed at once where numbers are widened
constexpr int ROWS = 48;      // of a tile: they share each block's keys and values, which are widened once
constexpr int MOST_ROWS = 192;  // of a tile for dots.h: they share a segment's values, which are laid out once
constexpr int FEW = 12;       // rows of one token; more of them share what is widened
constexpr int AHEAD = BLOCK / PAGE;  // pages that are called into the cache before they are read

template <class T>
struct Job {
    const T *q;  // [n, heads, dim], rows q_stride apart
    long q_stride;
    const T *keys, *values;  // [kv_heads][slots / 16] of panels of sixteen keys, and of rows [16][dim]
    long slots;
    const int *tables;  // [spans, max_pages]
    int max_pages;
    const int *starts, *lengths;
    int heads, kv_heads, dim, window;
    T *out;  // [n, heads, dim]
    std::vector<int> readers, first_reader;  // the query heads in the order of their KV heads; where each one's begin
    std::vector<long> first_token;           // of each span

    float score_unit = float(1.4426950408889634 / std::sqrt(double(dim)));  // the weight of a score s is 2^(s * score_unit)
    // Whether products are taken by the instructions of dots.h; queries stay as they are then.
    bool dots() const { return DOTS == 2 && sizeof(T) == 2 && dim % 32 == 0; }
    int rows() const { return dots() ? MOST_ROWS : ROWS; }  // of a tile, at most
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
    const Tile *after;  // what this thread is likely to take next
    int n_readers;

    Rows(const Job<T> &job, const Tile &tile, const Tile *after = nullptr)
        : job(job),
          tile(tile),
          after(after),
          n_readers(job.first_reader[tile.kv_head + 1] - job.first_reader[tile.kv_head]) {}
    int token(int row) const { return (tile.first + row) / n_readers; }
    // call(row, token, head) for each row, the token counted among all of the call.
    template <class Call> void each(Call call) const {
        const int *heads = job.readers.data() + job.first_reader[tile.kv_head];
        long at = job.first_token[tile.span] + tile.first / n_readers;
        for (int row = 0, reader = tile.first % n_readers; row < tile.rows; row++) {
            call(row, at, heads[reader]);
            if (++reader == n_readers) reader = 0, at++;
        }
    }
    int end(int row) const { return job.starts[tile.span] + token(row) + 1; }
    int begin(int row) const { return job.window ? std::max(0, end(row) - job.window) : 0; }
    long place(int position) const {  // in keys and values, of the page that holds a position
        const long page = job.tables[long(tile.span) * job.max_pages + position / PAGE];
        return (tile.kv_head * job.slots + page * PAGE) * job.dim;
    }
    // The same of page `p` of what this thread is likely to read after the keys up to `stop`.
    long next_place(int stop, int p) const {
        if (!after) return place(stop - 1);
        if (stop < end(0)) return place(std::min(stop + p * PAGE, end(0) - 1));
        const Rows next(job, *after);
        return next.place(std::min(next.begin(0) + p * PAGE, next.end(0) - 1));
    }
    int height() const {  // of tiles for dots.h, as even as can be
        const int tiles = (tile.rows + WIDTH - 1) / WIDTH;
        return (tile.rows + tiles - 1) / tiles;
    }
    int room() const { return (tile.rows + height() - 1) / height() * height(); }  // rows of whole tiles
    int first_segment() const { return begin(0) / SEGMENT; }
    int end_segment() const { return (end(tile.rows - 1) - 1) / SEGMENT + 1; }
};

// The running numbers of a row: the weighted values [chunks * 16], the sum of weights in 16 lanes, the greatest score.
INLINE float *total_of(float *row, int chunks) { return row + chunks * WIDTH; }
INLINE float &most_of(float *row, int chunks) { return row[(chunks + 1) * WIDTH]; }
INLINE float most_of(const float *row, int chunks) { return row[(chunks + 1) * WIDTH]; }

// values and total of a row times 2^by
INLINE void scale(float *row, int chunks, float by) {
    Lanes factor = exp2(all(by));
    for (int c = 0; c <= chunks; c++) store(row + c * WIDTH, load(row + c * WIDTH) * factor);
}

// What a tile does block by block: its rows' keys of the block, from ... to - 1, none where to <= from.
struct Seen {
    int begins[MOST_ROWS], ends[MOST_ROWS], from[ROWS], to[ROWS];

    template <class T>
    explicit Seen(const Rows<T> &rows) {
        int reader = rows.tile.first % rows.n_readers, end = rows.end(0);
        for (int r = 0; r < rows.tile.rows; r++, reader++) {
            if (reader == rows.n_readers) reader = 0, end++;
            begins[r] = rows.job.window ? std::max(0, end - rows.job.window) : 0, ends[r] = end;
        }
    }
    void block(int base, int n) {
        for (int r = 0; r < n; r++) from[r] = std::max(begins[r] - base, 0), to[r] = std::min(ends[r] - base, BLOCK);
    }
};

}  // namespace
