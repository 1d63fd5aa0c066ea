// The rows of attention: what is asked of each, how they are dealt out, and the numbers that each has so far.
#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <memory>
#include <vector>

#include "dots.h"
#include "team.h"

namespace {

constexpr int MAX_DIM = 256;
constexpr int SEGMENT = 512;  // keys, after which partial results are merged: threads may share a long sequence
constexpr int BLOCK = 64;     // keys whose scores are weighed at once where numbers are widened
constexpr int ROWS = 48;      // of a tile: they share each block's keys and values, which are widened once
constexpr int MOST_ROWS = 192;  // of a tile for dots.h: they share a segment's values, which are laid out once
constexpr int FEW = 12;       // rows of one token; more of them share what is widened
constexpr int AHEAD = BLOCK / PAGE;  // pages that are called into the cache before they are read

}  // namespace

// What is asked for, whatever the layer.
struct team::Plan {
    // `rows` rows of one span and KV head. A token has a row for each reader of the head; the first row is that of `reader`, for
    // the span's `token`. The rows see keys begin ... end - 1.
    struct Tile {
        int span, kv_head, token, reader, rows, begin, end;
    };
    // A tile's keys of one segment; what its rows hold after them goes to states + state.
    struct Piece {
        int tile, segment;
        long state;
    };
    int is_bf16;
    const int *tables;  // [spans, max_pages]
    int max_pages;
    const int *starts, *lengths;
    int heads, kv_heads, dim, window, threads;
    std::vector<int> readers{}, first_reader{};  // the query heads in the order of their KV heads; where each one's begin
    std::vector<long> first_token{};             // of each span
    std::vector<Tile> tiles{};
    // Of few tiles over many keys: the threads share these. Else there are none.
    std::vector<Piece> pieces{};
    std::vector<int> first_piece{};              // of each tile, and the end
    std::unique_ptr<float[]> states{};
    std::unique_ptr<std::atomic<int>[]> done{};  // pieces of each tile; zeros between two layers

    // Whether products are taken by the instructions of dots.h; queries stay as they are then.
    bool dots() const { return DOTS && is_bf16 && dim % 32 == 0; }
    int rows() const { return dots() ? MOST_ROWS : ROWS; }  // of a tile, at most
    int chunks() const { return (dim + WIDTH - 1) / WIDTH; }
    int stride() const { return (chunks() + 2) * WIDTH; }
    // A score s weighs 2^(s * score_unit()).
    float score_unit() const { return float(1.4426950408889634 / std::sqrt(double(dim))); }
};

namespace {

using team::Plan;

// A layer of it.
template <class T>
struct Job {
    const Plan &plan;
    const T *q;  // [n, heads, dim], rows q_stride apart
    long q_stride;
    const T *keys, *values;  // [kv_heads][slots / 16] of panels of sixteen keys, and of rows [16][dim]
    long slots;
    T *out;  // [n, heads, dim]
};

// A tile's rows: each one's token, and the keys that it sees.
struct Asked {
    const Plan &plan;
    const Plan::Tile &tile;
    int n_readers;

    Asked(const Plan &plan, const Plan::Tile &tile)
        : plan(plan), tile(tile), n_readers(plan.first_reader[tile.kv_head + 1] - plan.first_reader[tile.kv_head]) {}
    // call(row, token, head) for each row, the token counted among all of the call.
    template <class Call> void each(Call call) const {
        const int *heads = plan.readers.data() + plan.first_reader[tile.kv_head];
        long at = plan.first_token[tile.span] + tile.token;
        for (int row = 0, reader = tile.reader; row < tile.rows; row++) {
            call(row, at, heads[reader]);
            if (++reader == n_readers) reader = 0, at++;
        }
    }
    bool one_token() const { return tile.reader + tile.rows <= n_readers; }
    int height() const {  // of tiles for dots.h, as even as can be
        const int tiles = (tile.rows + WIDTH - 1) / WIDTH;
        return (tile.rows + tiles - 1) / tiles;
    }
    int room() const { return (tile.rows + height() - 1) / height() * height(); }  // rows of whole tiles
    int first_segment() const { return tile.begin / SEGMENT; }
    int end_segment() const { return (tile.end - 1) / SEGMENT + 1; }
};

// The same in a layer; and what this thread is likely to read next, a tile's keys of a segment. `begins`: it has not called
// this tile's own into the cache.
template <class T>
struct Rows : Asked {
    const Job<T> &job;
    const Plan::Tile &next;
    int next_segment;
    bool begins;

    Rows(const Job<T> &job, const Plan::Tile &tile, const Plan::Tile &next, int next_segment, bool begins)
        : Asked(job.plan, tile), job(job), next(next), next_segment(next_segment), begins(begins) {}
    // Where in keys and values the page is that holds a position.
    long place(const Plan::Tile &tile, int position) const {
        const long page = plan.tables[long(tile.span) * plan.max_pages + position / PAGE];
        return (tile.kv_head * job.slots + page * PAGE) * plan.dim;
    }
    long place(int position) const { return place(tile, position); }
    template <class Call> void next_pages(Call call) const {  // call(keys, values) for each page of what is next
        const int from = std::max(next.begin, next_segment * SEGMENT), to = std::min(next.end, (next_segment + 1) * SEGMENT);
        for (int at = from / PAGE * PAGE; at < to; at += PAGE) call(job.keys + place(next, at), job.values + place(next, at));
    }
    long next_place(int p) const {  // of page `p` of what is next
        return place(next, std::min(std::max(next.begin, next_segment * SEGMENT) + p * PAGE, next.end - 1));
    }
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

    explicit Seen(const Asked &rows) {
        const Plan &plan = rows.plan;
        const Plan::Tile &tile = rows.tile;
        int reader = tile.reader, end = plan.starts[tile.span] + tile.token + 1;
        for (int r = 0; r < tile.rows; r++, reader++) {
            if (reader == rows.n_readers) reader = 0, end++;
            begins[r] = plan.window ? std::max(0, end - plan.window) : 0, ends[r] = end;
        }
    }
    void block(int base, int n) {
        for (int r = 0; r < n; r++) from[r] = std::max(begins[r] - base, 0), to[r] = std::min(ends[r] - base, BLOCK);
    }
};

}  // namespace
