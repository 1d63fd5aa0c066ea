// Causal attention over the paged cache. A row is one query head of one token; its keys are taken in blocks of 64, from
// position 0 on, with a running maximum and sum; every 512 keys the running numbers start anew and are merged in order.
//
// A score is one chain of products along the head, a value one along the keys. So a row's bits follow from its query, its
// keys and their positions, however rows are tiled and dealt to threads. By the instructions of dots.h 512 keys are taken at
// once (attention_dots.h), of which the same holds while all values are finite.
#include "attention_dots.h"
#include "attention_tiles.h"

namespace {

// The weights of a row's keys first ... end - 1 of a block, by their scores [64] times `by`, in place of the scores. The row's
// numbers are brought to its new greatest score.
INLINE void weigh(float *scores, float by, int first, int end, float *row, int chunks) {
    const int page = first / PAGE, stop = (end - 1) / PAGE + 1;
    Lanes s[BLOCK / PAGE];
    Lanes greatest = all(-INFINITY);
    for (int p = page; p < stop; p++) {
        s[p] = load(scores + p * PAGE) * all(by);
        if (first > p * PAGE || end < (p + 1) * PAGE)
            s[p] = pick(between(std::max(0, first - p * PAGE), std::min(PAGE, end - p * PAGE)), s[p], all(-INFINITY));
        greatest = pick(greatest < s[p], s[p], greatest);
    }
    const float now = most(greatest), before = most_of(row, chunks);
    if (now > before) {
        scale(row, chunks, before - now);
        most_of(row, chunks) = now;
    }
    const Lanes highest = all(most_of(row, chunks));
    Lanes total = load(total_of(row, chunks));
    for (int p = page; p < stop; p++) {
        const Lanes weights = exp2(s[p] - highest);
        total = total + weights;
        store(scores + p * PAGE, weights);
    }
    store(total_of(row, chunks), total);
}

// One token's few rows over keys start ... stop - 1 of a segment, read as they lie in the cache: first all keys, then all
// values, page by page, so that memory is read in one stream.
template <class T>
void attend_few(const Rows<T> &rows, const float *q, int start, int stop, Seen &seen, float *state) {
    const Job<T> &job = rows.job;
    const int chunks = rows.plan.chunks(), dim = rows.plan.dim, n = rows.tile.rows, origin = start / BLOCK * BLOCK;
    const int first = (start - origin) / PAGE, pages = (stop - origin - 1) / PAGE + 1;
    const long stride = rows.plan.stride(), width = chunks * WIDTH;
    const T *keys[SEGMENT / PAGE + AHEAD], *values[SEGMENT / PAGE + AHEAD];
    for (int p = first; p < pages; p++) {
        const long at = rows.place(origin + p * PAGE);
        keys[p] = job.keys + at, values[p] = job.values + at;
    }
    for (int p = 0; p < AHEAD; p++) {
        keys[pages + p] = values[std::min(first + p, pages - 1)];
        values[pages + p] = job.keys + rows.next_place(p);
    }
    alignas(64) float scores[FEW * SEGMENT];
    for (int p = first; p < pages; p += AHEAD)
        by_groups(n, [&](auto with, int r) {
            score_pages<decltype(with)::value>(q + r * width, width, keys + p, keys + p + AHEAD, std::min(AHEAD, pages - p),
                                               dim, scores + r * SEGMENT + p * PAGE, SEGMENT);
        });
    for (int base = origin; base < stop; base += BLOCK) {
        seen.block(base, n);
        const int from = seen.from[0], to = seen.to[0];
        by_groups(n, [&](auto with, int r) {
            constexpr int M = decltype(with)::value;
            float *score = scores + r * SEGMENT + base - origin, *row = state + r * stride;
            for (int i = 0; i < M; i++) weigh(score + i * SEGMENT, rows.plan.score_unit(), from, to, row + i * stride, chunks);
            for (int at = from; at < to; at = at / PAGE * PAGE + PAGE) {
                const int p = (base - origin + at) / PAGE, many = std::min(PAGE - at % PAGE, to - at);
                add_values<M>(score + at, SEGMENT, values[p] + at % PAGE * dim, values[p + AHEAD], many, dim, row,
                              stride);
            }
        });
    }
}

// Any rows over a block that is widened for them.
template <class T>
void attend_many(const Rows<T> &rows, const float *q, int base, int stop, const Seen &seen, float *scores, float *state) {
    const Job<T> &job = rows.job;
    const int chunks = rows.plan.chunks(), dim = rows.plan.dim, n = rows.tile.rows, last = seen.ends[n - 1];
    const long stride = rows.plan.stride(), width = chunks * WIDTH;
    alignas(64) float k[BLOCK * MAX_DIM], v[BLOCK * MAX_DIM];
    for (int p = seen.from[0] / PAGE; base + p * PAGE < std::min(base + BLOCK, stop); p++) {
        const int at = base + p * PAGE;
        const long here = rows.place(at), next = rows.place(std::min(at + PAGE, stop - 1));
        call_in(job.keys + next, PAGE * dim);
        call_in(job.values + next, PAGE * dim);
        widen_panel(job.keys + here, dim, k + p * PAGE * dim);
        widen_values(job.values + here, std::min(PAGE, last - at), dim, v + p * PAGE * WIDTH);
    }
    by_groups(n, [&](auto with, int r) {
        constexpr int M = decltype(with)::value;
        const int *from = seen.from + r, *to = seen.to + r;
        float *score = scores + r * BLOCK, *row = state + r * stride;
        const int page = from[0] / PAGE, pages = (to[M - 1] + PAGE - 1) / PAGE - page;
        if (pages <= 0) return;  // the last row sees the furthest
        multiply_all<M, true>(q + r * width, width, k + page * PAGE * dim, PAGE * dim, pages, dim, score + page * PAGE, BLOCK);
        for (int i = 0; i < M; i++)
            if (from[i] < to[i]) weigh(score + i * BLOCK, rows.plan.score_unit(), from[i], to[i], row + i * stride, chunks);
        // Keys that all see are taken by all at once, those before and after by each row.
        auto take = [&](auto with, int i, int first, int end) {
            if (first < end)
                multiply_all<decltype(with)::value, false>(score + i * BLOCK + first, BLOCK, v + first * WIDTH, BLOCK * WIDTH,
                                                           chunks, end - first, row + i * stride, stride);
        };
        const std::integral_constant<int, 1> one;
        const int first = from[M - 1], end = std::max(first, to[0]);
        for (int i = 0; i < M - 1; i++) take(one, i, from[i], std::min(first, to[i]));
        take(with, 0, first, end);
        for (int i = 1; i < M; i++) take(one, i, std::max(end, from[i]), to[i]);
    });
}

// The tile's rows over the keys of one segment, from nothing: `state` [rows][stride], room for whole tiles.
template <class T>
void attend_segment(const Rows<T> &rows, const float *q, int segment, float *state) {
    const Plan &plan = rows.plan;
    const int chunks = plan.chunks(), n = rows.tile.rows;
    Seen seen(rows);
    const int start = std::max(segment * SEGMENT, rows.tile.begin), stop = std::min(rows.tile.end, (segment + 1) * SEGMENT);
#if DOTS
    if constexpr (sizeof(T) == 2)
        if (plan.dots()) return attend_dots(rows, (const T *)q, start, stop, seen, state);
#endif
    for (int r = 0; r < n; r++) {
        float *row = state + r * plan.stride();
        std::fill(row, row + (chunks + 1) * WIDTH, 0.0f);
        most_of(row, chunks) = -INFINITY;
    }
    if (n <= FEW && rows.one_token() && plan.dim % WIDTH == 0)
        return attend_few(rows, q, start, stop, seen, state);
    alignas(64) float scores[ROWS * BLOCK];
    for (int base = std::max(segment * SEGMENT, seen.begins[0] / BLOCK * BLOCK); base < stop; base += BLOCK) {
        seen.block(base, n);
        attend_many(rows, q, base, stop, seen, scores, state);
    }
}

// What a tile's rows hold after one segment, merged into what they hold of those before it.
void merge(const Asked &rows, int segment, const float *state, float *into) {
    const int chunks = rows.plan.chunks();
    const Seen seen(rows);
    for (int r = 0; r < rows.tile.rows; r++, state += rows.plan.stride(), into += rows.plan.stride()) {
        const int first = seen.begins[r] / SEGMENT;
        if (first > segment || seen.ends[r] <= segment * SEGMENT) continue;
        if (first == segment) {
            std::copy(state, state + rows.plan.stride(), into);
            continue;
        }
        const float before = most_of(into, chunks), now = most_of(state, chunks), most = std::max(before, now);
        const Lanes keep = exp2(all(before - most)), take = exp2(all(now - most));
        for (int c = 0; c <= chunks; c++)
            store(into + c * WIDTH, load(into + c * WIDTH) * keep + load(state + c * WIDTH) * take);
        most_of(into, chunks) = most;
    }
}

// The tile's queries: floats [rows][chunks * 16], or for dots.h as they are [rows][dim], the last tile filled up; AMX's
// have `height` rows.
template <class T>
void queries(const Job<T> &job, const Asked &rows, float *q, int &height) {
    const Plan &plan = job.plan;
    rows.each([&](int row, long token, int head) {
        const T *from = job.q + token * job.q_stride + long(head) * plan.dim;
        if (plan.dots())
            memcpy((T *)q + row * plan.dim, from, plan.dim * sizeof(T));
        else
            for (int c = 0; c * WIDTH < plan.dim; c++, q += WIDTH) store(q, load(from + c * WIDTH, plan.dim - c * WIDTH));
    });
    if (!plan.dots()) return;
    std::fill_n((T *)q + rows.tile.rows * plan.dim, (rows.room() - rows.tile.rows) * plan.dim, T{});
    if (has_tiles() && height != rows.height()) set_up_tiles(height = rows.height());
}

template <class T>
void finish(const Job<T> &job, const Asked &rows, const float *state) {
    const Plan &plan = job.plan;
    const int chunks = plan.chunks(), dim = plan.dim;
    rows.each([&](int, long token, int head) {
        T *to = job.out + (token * plan.heads + head) * dim;
        const Lanes factor = all(1.0f / sum(load(state + chunks * WIDTH)));
        for (int c = 0; c < chunks; c++) store(to + c * WIDTH, load(state + c * WIDTH) * factor, dim - c * WIDTH);
        state += plan.stride();
    });
}

constexpr int STATE = MOST_ROWS * (MAX_DIM + 2 * WIDTH);
constexpr int QUERIES = std::max(ROWS * MAX_DIM, MOST_ROWS * MAX_DIM / 2);  // floats

// What a thread remembers from one tile to the next: the height of AMX's tiles, once they are set up, and the tile or the piece
// that it has called in.
struct Thread {
    int height = 0, called = -1;

    // Whether `i` was not called in; what is `next` is while few rows are taken.
    bool begins(const Asked &rows, int i, int next) {
        const bool begins = i != called;
        called = rows.tile.rows <= WIDTH ? next : -1;
        return begins;
    }
};

// All keys of tile t; after it the thread is likely to take tile `next`.
template <class T>
void attend_tile(const Job<T> &job, int t, int next, Thread &thread) {
    const Plan::Tile &tile = job.plan.tiles[t], &after = job.plan.tiles[next];
    const Asked asked(job.plan, tile);
    const bool begins = thread.begins(asked, t, next);
    alignas(64) float q[QUERIES], part[STATE], state[STATE];
    queries(job, asked, q, thread.height);
    const int first = asked.first_segment(), end = asked.end_segment();
    for (int s = first; s < end; s++) {
        const bool goes_on = s + 1 < end;
        const Rows<T> rows(job, tile, goes_on ? tile : after, goes_on ? s + 1 : Asked(job.plan, after).first_segment(),
                           begins && s == first);
        attend_segment(rows, q, s, s == first ? state : part);
        if (s > first) merge(rows, s, part, state);
    }
    finish(job, asked, state);
}

// The keys of piece i. Who ends a tile's last one merges them all, in order.
template <class T>
void attend_piece(const Job<T> &job, int i, Thread &thread) {
    const Plan &plan = job.plan;
    const int after = std::min(i + plan.threads, int(plan.pieces.size()) - 1);
    const auto &piece = plan.pieces[i], &next = plan.pieces[after];
    const Plan::Tile &tile = plan.tiles[piece.tile];
    const Rows<T> rows(job, tile, plan.tiles[next.tile], next.segment, thread.begins(Asked(plan, tile), i, after));
    {
        alignas(64) float q[QUERIES];
        queries(job, rows, q, thread.height);
        attend_segment(rows, q, piece.segment, plan.states.get() + piece.state);
    }
    const int first = plan.first_piece[piece.tile], end = plan.first_piece[piece.tile + 1];
    if (plan.done[piece.tile].fetch_add(1, std::memory_order_acq_rel) + 1 < end - first) return;
    plan.done[piece.tile].store(0, std::memory_order_relaxed);
    alignas(64) float state[STATE];
    for (int p = first; p < end; p++) merge(rows, plan.pieces[p].segment, plan.states.get() + plan.pieces[p].state, state);
    finish(job, rows, state);
}

template <class T>
void attend(const Job<T> &job) {
    const Plan &plan = job.plan;
    const int tiles = int(plan.tiles.size()), pieces = int(plan.pieces.size());
    Thread thread;
    if (pieces) {
#pragma omp for schedule(dynamic) nowait
        for (int i = 0; i < pieces; i++) attend_piece(job, i, thread);
    } else {
        const int together = std::max(1, std::min(8, tiles / (8 * plan.threads)));
#pragma omp for schedule(dynamic, together) nowait
        for (int i = 0; i < tiles; i++) {  // the long ones first
            const int next = i + ((i + 1) % together ? 1 : 1 + (plan.threads - 1) * together);
            attend_tile(job, tiles - 1 - i, tiles - 1 - std::min(next, tiles - 1), thread);
        }
    }
    if (thread.height) let_tiles_go();
}

// Few tiles over many keys are cut into pieces.
void cut(Plan &plan) {
    long size = 0;
    for (int t = 0; t < int(plan.tiles.size()); t++) {
        const Asked rows(plan, plan.tiles[t]);
        plan.first_piece.push_back(int(plan.pieces.size()));
        for (int s = rows.first_segment(); s < rows.end_segment(); s++, size += rows.room() * long(plan.stride()))
            plan.pieces.push_back({t, s, size});
    }
    plan.first_piece.push_back(int(plan.pieces.size()));
    plan.states.reset(new float[size]);
    plan.done.reset(new std::atomic<int>[plan.tiles.size()]());
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

std::shared_ptr<const Plan> team::plan_attention(int is_bf16, const int *tables, int max_pages, const int *starts,
                                                 const int *lengths, int spans, const int *of_query, int heads, int kv_heads,
                                                 int dim, int window, int threads) {
    Plan plan{is_bf16, tables, max_pages, starts, lengths, heads, kv_heads, dim, window, threads};
    for (int h = 0; h < kv_heads; h++) {
        plan.first_reader.push_back(int(plan.readers.size()));
        for (int i = 0; i < heads; i++)
            if (of_query[i] == h) plan.readers.push_back(i);
    }
    plan.first_reader.push_back(int(plan.readers.size()));
    bool longer = false;  // than a segment
    long token = 0;
    for (int i = 0; i < spans; token += lengths[i++]) {
        plan.first_token.push_back(token);
        longer |= starts[i] + lengths[i] > SEGMENT;
        for (int h = 0; h < kv_heads; h++) {
            const int readers = plan.first_reader[h + 1] - plan.first_reader[h], all = lengths[i] * readers;
            for (int first = 0; first < all; first += plan.rows()) {
                const int rows = std::min(plan.rows(), all - first), token = first / readers;
                const int begin = window ? std::max(0, starts[i] + token + 1 - window) : 0;
                const int end = starts[i] + (first + rows - 1) / readers + 1;
                plan.tiles.push_back({i, h, token, first % readers, rows, begin, end});
            }
        }
    }
    if (longer && threads > 1 && int(plan.tiles.size()) < 4 * threads) cut(plan);
    return std::make_shared<const Plan>(std::move(plan));
}

void team::attend(const Plan &plan, const void *q, long q_stride, const void *keys, const void *values, long slots, void *out) {
    auto run = [&](auto type) {
        using T = decltype(type);
        ::attend(Job<T>{plan, (const T *)q, q_stride, (const T *)keys, (const T *)values, slots, (T *)out});
    };
    plan.is_bf16 ? run(bf16{}) : run(float{});
}

// Returns 0, or 1 + the first span whose pages are missing or lie outside the cache, in which case nothing is computed.
extern "C" int llama_dist_attend(int is_bf16, const void *q, long q_stride, const void *keys, const void *values,
                                 long slots, const int *tables, int max_pages, const int *starts, const int *lengths,
                                 int spans, const int *of_query, int heads, int kv_heads, int dim, int window, void *out,
                                 int threads) {
    if (int bad = team::bad_span(slots, tables, max_pages, starts, lengths, spans)) return bad;
    const auto plan = team::plan_attention(is_bf16, tables, max_pages, starts, lengths, spans, of_query, heads, kv_heads, dim,
                                           window, threads);
#pragma omp parallel num_threads(threads) if (threads > 1)
    team::attend(*plan, q, q_stride, keys, values, slots, out);
    return 0;
}
