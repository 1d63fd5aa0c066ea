// y = x W^T for weights that are floats, in panels: sixteen rows of W side by side, so that one load takes some numbers of each
// row, and each row's sum has a lane of its own. Floats of eight bits, e4m3, have a factor for each unit of a row.
//
// A lane's sum runs along K, K_BLOCK numbers at a time; these sums are added up in their order, then by unit in the binary tree
// over unit numbers. So the bits of an entry of y are a function of its row of x and its row of W, on any number of threads, in
// any batch, and the same on all processors that can multiply and add in one. Those with instructions for bf16 add up its
// products in an order of their own (dots.h), of which the same holds.
#include <algorithm>
#include <type_traits>
#include <vector>

#include "dots.h"
#include "team.h"

namespace {

constexpr int64_t GROUP = 32;     // a unit is filled up to whole groups with zeros
constexpr int64_t K_BLOCK = 256;  // numbers of a panel that stay in the first cache as floats
constexpr int64_t M_BLOCK = 256;  // rows of x whose K_BLOCK numbers stay in the second cache
constexpr int64_t X_BLOCK = 1 << 20;  // bytes of rows of x that stay in the second cache, for tiles
constexpr int TILE = 6;           // rows of x whose sums are in registers
constexpr int FEW_TILE = 4;       // the same where the weights that are taken apart need registers too
template <class W>
constexpr int64_t FEW = sizeof(W) == 1 ? 8 : 12;  // rows; for more of them a panel is widened first
#if LANES == 2
constexpr int AHEAD = 4096, KEEP = 2;  // bytes of weights called in before they are read, and which caches keep them
#else
constexpr int AHEAD = 384, KEEP = 0;
#endif
constexpr int64_t FEW_PAIRED = 2;  // rows for which products of pairs are faster than tiles
template <class W>
constexpr bool MULTIPLIED = DOTS && std::is_same_v<W, bf16>;  // by the instructions of dots.h
constexpr int MOST_ROOTS = 64;

// What one call computes, the same for all its threads.
struct Job {
    bool is_bf16;  // x, and bias
    const void *x;
    int64_t ldx;
    team::Packed w;
    const void *bias;
    void *y;
    int64_t ldy, plane;
    bool y_f32;
    int64_t m, n, first;  // first < 0: one sum over all units

    Lanes numbers(const void *p, int64_t at, int64_t left) const {
        return is_bf16 ? load((const bf16 *)p + at, left) : load((const float *)p + at, left);
    }
    int64_t unit_numbers() const { return (w.unit + GROUP - 1) / GROUP * GROUP; }
    int64_t numbers_a_row() const { return w.n_units * unit_numbers(); }
};

// Rows of x that are multiplied by some panels before others are, in tiles.
inline int64_t rows_together(const Job &job) {
    return std::clamp<int64_t>(X_BLOCK / int64_t(sizeof(bf16)) / job.numbers_a_row(), 4 * WIDTH, 32 * WIDTH) / (2 * WIDTH) * (2 * WIDTH);
}

// Rows m ... m + rows - 1 of x as they are multiplied, each unit filled up with zeros: floats, or what dots.h takes. Sums have
// room for `room` rows.
struct Wide {
    struct alignas(64) Line {  // of the cache: AMX takes twice as long for rows that share two
        float numbers[WIDTH];
    };
    std::vector<Line> lines;
    int64_t m = -1, rows = 0, room = 0;
    int64_t height = 0;  // rows of a tile, where they lie in tiles

    template <class W> void take(const Job &job, int64_t from, int64_t to) {
        m = from, rows = room = to - from, height = 0;
        if (MULTIPLIED<W> && rows > FEW_PAIRED && has_tiles()) {
            const int64_t tiles = (rows + WIDTH - 1) / WIDTH;
            height = (rows + tiles - 1) / tiles, room = tiles * height;
        }
        const int64_t needed = (room * job.numbers_a_row() + WIDTH - 1) / WIDTH;
        if (int64_t(lines.size()) < needed) lines.resize(needed);
        if (height)
            in_tiles(job);
        else if (MULTIPLIED<W>)
            in_pairs(job);
        else
            widened(job);
    }

    template <class T> const T *as() const { return (const T *)lines.data(); }

  private:
    void widened(const Job &job) {
        const int64_t each = job.unit_numbers();
        float *out = (float *)lines.data();
        for (int64_t i = m; i < m + rows; i++)
            for (int64_t u = 0; u < job.w.n_units; u++, out += each) {
                const int64_t x = i * job.ldx + u * job.w.unit;
                for (int64_t at = 0; at < each; at += WIDTH)
                    store(out + at, at < job.w.unit ? job.numbers(job.x, x + at, job.w.unit - at) : all(0.0f));
            }
    }
    void in_pairs(const Job &job) {
#if DOTS
        const int64_t each = job.unit_numbers();
        uint32_t *out = (uint32_t *)lines.data();
        for (int64_t i = m; i < m + rows; i++)
            for (int64_t u = 0; u < job.w.n_units; u++, out += each / 2 * CHAINS)
                pair_up((const bf16 *)job.x + i * job.ldx + u * job.w.unit, job.w.unit, each, out);
#endif
    }
    void in_tiles(const Job &job) {
        const int64_t each = job.unit_numbers();
        bf16 *out = (bf16 *)lines.data();
        for (int64_t first = m; first < m + room; first += height)
            for (int64_t u = 0; u < job.w.n_units; u++)
                for (int64_t at = 0; at < each; at += GROUP)
                    for (int64_t i = first; i < first + height; i++, out += GROUP) {
                        const int64_t n = i < m + rows ? std::min(GROUP, job.w.unit - at) : 0;
                        if (n < GROUP) std::fill_n(out, GROUP, bf16{});
                        const bf16 *x = (const bf16 *)job.x + i * job.ldx + u * job.w.unit + at;
                        n == GROUP ? memcpy(out, x, GROUP * sizeof *x) : memcpy(out, x, n * sizeof *x);
                    }
    }
};

// The sums of some rows and panels, merged as units come: a node of the tree is (level, index at that level).
struct Roots {
    std::vector<Lanes> room;
    int64_t each = 0, index[MOST_ROOTS];
    int level[MOST_ROOTS], size = 0;

    void start(int64_t sums) { each = sums, size = 0; }
    Lanes *plane(int at) { return room.data() + at * each; }
    Lanes *next(bool zeros) {  // where a unit's sums are to be added up
        if (int64_t(room.size()) < (size + 1) * each) room.resize((size + 1) * each);
        if (zeros) std::fill_n(plane(size), each, all(0.0f));
        return plane(size);
    }
    void push(int64_t unit) {
        int l = 0;
        for (; size && level[size - 1] == l && (unit & 1) && index[size - 1] == unit - 1; l++, unit >>= 1, size--) {
            Lanes *left = plane(size - 1), *right = plane(size);
            for (int64_t i = 0; i < each; i++) left[i] = left[i] + right[i];
        }
        level[size] = l, index[size++] = unit;
    }
    void add() {  // no tree: a unit's sums to those of the units before
        for (int64_t i = 0; size && i < each; i++) plane(0)[i] = plane(0)[i] + plane(1)[i];
        size = 1;
    }
};

// What is called into the cache while numbers are multiplied: from `at` on, `step` bytes further with every number.
struct Ahead {
    const char *at;
    int64_t step;
};

// While tile t of several goes through k numbers of a panel, its share of the k numbers that come after.
template <class T> INLINE Ahead share_of(const T *after, int64_t k, int64_t t, int64_t tiles) {
    const int64_t bytes = WIDTH * sizeof(T), parts = std::min<int64_t>(tiles, 4);
    return {(const char *)after + std::min(t, parts) * k * bytes / parts, t < parts ? bytes / parts : 0};
}

// M rows of x along k numbers of P panels, added to sums[panel * stride + row].
template <class T, int M, int P>
INLINE void direct(const T *w, int64_t panel, const float *x, int64_t ldx, int64_t k, Ahead ahead, Lanes *sums, int64_t stride) {
    Lanes s[M][P];
    for (int i = 0; i < M; i++)
        for (int p = 0; p < P; p++) s[i][p] = all(0.0f);
    constexpr int N = AT_ONCE<T>;
    for (int64_t at = 0; at < k; at += N, x += N, w += N * WIDTH) {
#pragma GCC unroll 4
        for (int p = 0; p < P; p++) {
            Lanes numbers[N];
            take(w + p * panel, numbers);
            __builtin_prefetch(ahead.at + p * panel * int64_t(sizeof(T)), 0, KEEP);
#pragma GCC unroll 4
            for (int j = 0; j < N; j++)
#pragma GCC unroll 6
                for (int i = 0; i < M; i++) s[i][p] = fma(numbers[j], all(x[i * ldx + j]), s[i][p]);
        }
        ahead.at += N * ahead.step;
    }
    for (int i = 0; i < M; i++)
        for (int p = 0; p < P; p++) sums[p * stride + i] = sums[p * stride + i] + s[i][p];
}

// M rows of x along k numbers of a widened panel [k][16], added to sums.
template <int M> INLINE void widened(const float *w, const float *x, int64_t ldx, int64_t k, Ahead ahead, Lanes *sums) {
    Lanes s[M];
    for (int i = 0; i < M; i++) s[i] = all(0.0f);
#pragma GCC unroll 4
    for (int64_t at = 0; at < k; at++, x++, w += WIDTH) {
        const Lanes numbers = load(w);
        __builtin_prefetch(ahead.at);
        ahead.at += ahead.step;
#pragma GCC unroll 6
        for (int i = 0; i < M; i++) s[i] = fma(numbers, all(x[i * ldx]), s[i]);
    }
    for (int i = 0; i < M; i++) sums[i] = sums[i] + s[i];
}

INLINE const float *widen(const float *w, int64_t, float *) { return w; }
template <class T> INLINE const float *widen(const T *w, int64_t k, float *room) {
    widen_panel(w, k, room);
    return room;
}

// `rows` rows in groups of at most `most`, as even as can be: call(with, row, t, tiles), where tile t has with.value rows from `row` on.
template <class Call> INLINE void by_tiles(int64_t rows, int64_t most, Call call) {
    const int64_t tiles = (rows + most - 1) / most;
    for (int64_t t = 0, row = 0; t < tiles; t++) {
        const int64_t end = rows * (t + 1) / tiles;
        switch (end - row) {
            case 1: call(std::integral_constant<int, 1>{}, row, t, tiles); break;
            case 2: call(std::integral_constant<int, 2>{}, row, t, tiles); break;
            case 3: call(std::integral_constant<int, 3>{}, row, t, tiles); break;
            case 4: call(std::integral_constant<int, 4>{}, row, t, tiles); break;
            case 5: call(std::integral_constant<int, 5>{}, row, t, tiles); break;
            default: call(std::integral_constant<int, 6>{}, row, t, tiles); break;
        }
        row = end;
    }
}

template <class W, class To> INLINE void put(To *to, Lanes v, int64_t left) {
#if DOTS
    if constexpr (MULTIPLIED<W> && sizeof(To) == 2)
        if (left >= WIDTH) return narrow(to, v);
#endif
    store(to, v, left);
}

// Sums [panel][stride] of `rows` rows from row m on -> a plane of y, from panel n on.
template <class W, int P, class To>
void put_rows(const Job &job, int64_t m, int64_t rows, int64_t n, int64_t apart, const Lanes *sums, int64_t stride, To *y) {
    for (int64_t i = 0; i < rows; i++) {
        Lanes v[P];
        for (int p = 0; p < P; p++) {
            const int64_t at = (n + p * apart) * WIDTH;
            v[p] = sums[p * stride + i];
            if (job.bias) v[p] = v[p] + job.numbers(job.bias, at, job.n - at);
        }
        To *row = y + (m + i) * job.ldy;
#if DOTS
        if constexpr (MULTIPLIED<W> && P == 2 && sizeof(To) == 2)
            if (apart == 1 && (n + 2) * WIDTH <= job.n) {
                narrow(row + n * WIDTH, v[0], v[1]);
                continue;
            }
#endif
        for (int p = 0; p < P; p++) {
            const int64_t at = (n + p * apart) * WIDTH;
            put<W>(row + at, v[p], job.n - at);
        }
    }
}

// The same of all planes that there are, in y's type.
template <class W, int P>
void put_planes(const Job &job, int64_t m, int64_t rows, int64_t n, int64_t apart, Roots &roots, int64_t stride) {
    for (int plane = 0; plane < (job.first < 0 ? 1 : roots.size); plane++) {
        const int64_t at = plane * job.plane;
        if (job.y_f32 || !job.is_bf16)
            put_rows<W, P>(job, m, rows, n, apart, roots.plane(plane), stride, (float *)job.y + at);
        else
            put_rows<W, P>(job, m, rows, n, apart, roots.plane(plane), stride, (bf16 *)job.y + at);
    }
}

// All rows of `x`, from number `at` of each on, by P panels, by the instructions of dots.h; fresh sums are not added to.
#if DOTS
template <int P>
INLINE void multiplied(const Wide &x, int64_t ldx, int64_t at, const bf16 *w, int64_t panel, int64_t k, Lanes *sums,
                       bool fresh) {
#if TILES
    if (x.height) {  // one tile
        const char *nothing = nullptr;
        by_tiles_of_rows<1, P>(w, panel, x.as<bf16>() + at * x.height, 0, x.height, k, nothing, 0, sums, x.room, fresh);
        return;
    }
#endif
    const int64_t words = ldx / 2 * CHAINS;
    const uint32_t *pairs = x.as<uint32_t>() + at / 2 * CHAINS;
    constexpr int MOST = P == 4 ? FEW_PAIRED : P == 2 && DOTS == 2 ? TILE / 2 : TILE;
    by_tiles(x.rows, MOST, [&](auto with, int64_t row, int64_t t, int64_t) {
        constexpr int M = std::min(decltype(with)::value, MOST);
        t ? by_pairs<M, P, false>(w, panel, pairs + row * words, words, k, sums + row, x.room)
          : by_pairs<M, P, true>(w, panel, pairs + row * words, words, k, sums + row, x.room);
    });
}
#endif

// The rows of `x` by P panels of W: panel n, n + apart ... Several panels at once are for few rows, or for tiles.
template <class W, int P> void stripe(const Job &job, const Wide &x, int64_t n, int64_t apart, Roots &roots) {
    constexpr bool FACTORS = std::is_same_v<W, e4m3>;
    const bool whole = job.first < 0;
    const int64_t unit = job.unit_numbers(), ldx = job.numbers_a_row(), panel = job.w.block_groups * GROUP * WIDTH;
    const W *w = (const W *)job.w.codes + n * panel;
    const float *numbers = x.as<float>();
    alignas(64) float room[K_BLOCK * WIDTH];
    roots.start(P * x.room);
    const bool zeros = !x.height;  // tiles begin with zeros of their own
    Lanes *sums = roots.next(zeros);
    for (int64_t u = 0; u < job.w.n_units; u++) {
#if DOTS
        if constexpr (MULTIPLIED<W>) {
            multiplied<P>(x, ldx, u * unit, w, apart * panel, unit, sums, !whole || !u);
            w += unit * WIDTH;
        }
#endif
        for (int64_t at = 0; !MULTIPLIED<W> && at < unit; at += K_BLOCK) {
            const int64_t k = std::min(K_BLOCK, unit - at);
            if (x.rows > FEW<W>) {
                const float *wide = widen(w, k, room);
                by_tiles(x.rows, TILE, [&](auto with, int64_t row, int64_t t, int64_t tiles) {
                    const Ahead ahead = share_of(w + k * WIDTH, k, t, tiles);
                    widened<decltype(with)::value>(wide, numbers + row * ldx, ldx, k, ahead, sums + row);
                });
            } else {
                constexpr int MOST = P == 1 ? FEW_TILE : TILE / P;
                by_tiles(x.rows, MOST, [&](auto with, int64_t row, int64_t t, int64_t tiles) {
                    constexpr int M = decltype(with)::value;
                    const Ahead ahead =
                        tiles > 1 ? share_of(w + k * WIDTH, k, t, tiles) : Ahead{(const char *)w + AHEAD, WIDTH * sizeof(W)};
                    if constexpr (M <= MOST)
                        direct<W, M, P>(w, apart * panel, numbers + row * ldx, ldx, k, ahead, sums + row, x.room);
                });
            }
            w += k * WIDTH;
            numbers += k;
        }
        for (int p = 0; FACTORS && p < P; p++) {
            const Lanes factor = load(job.w.factors + ((n + p * apart) * job.w.block_units + u) * WIDTH);
            for (int64_t i = p * x.room; i < (p + 1) * x.room; i++) sums[i] = sums[i] * factor;
        }
        if (whole && !FACTORS) continue;
        whole ? roots.add() : roots.push(job.first + u);
        if (u + 1 < job.w.n_units) sums = roots.next(zeros);
    }
    put_planes<W, P>(job, x.m, x.rows, n, apart, roots, x.room);
}

#if TILES

// The rows of `x`, several tiles of them, by panels n ... n + P - 1, two tiles at a time. They go through all units at once, so
// that their sums stay in the first cache; or if the panels are long all rows through a unit. What comes next is called in.
template <int P> void tiled(const Job &job, const Wide &x, int64_t n, Roots &roots) {
    constexpr int64_t SHORT = 2048;
    const int64_t unit = job.unit_numbers(), ldx = job.numbers_a_row(), panel = job.w.block_groups * GROUP * WIDTH;
    const int64_t height = x.height, tile = height * ldx, tiles = x.room / height, pairs = (tiles + 1) / 2;
    const int64_t lines = (P * GROUP / 2 + pairs - 1) / pairs, together = ldx > SHORT ? tiles : 2;
    const bool whole = job.first < 0;
    const bf16 *after = (const bf16 *)job.w.codes + (n + P) * panel;
    const char *ahead = (const char *)after;
    for (int64_t first = 0; first < tiles; first += together) {
        const int64_t end = std::min(first + together, tiles), rows = (end - first) * height;
        const bf16 *w = (const bf16 *)job.w.codes + n * panel, *numbers = x.as<bf16>();
        roots.start(P * rows);
        for (int64_t u = 0; u < job.w.n_units; u++, w += unit * WIDTH, numbers += unit * height) {
            const bool fresh = !whole || !u;
            Lanes *sums = fresh ? roots.next(false) : roots.plane(0);
            for (int64_t t = first; t < end; t += 2, sums += 2 * height) {
                if (together > 2) {  // a pair's share of the panels' next unit
                    const int64_t share = t / 2 * lines * unit * 2, in = unit * WIDTH * 2;
                    ahead = (const char *)((u + 1 < job.w.n_units ? w + unit * WIDTH : after) + share / in * panel) + share % in;
                }
                t + 1 < end ? by_tiles_of_rows<2, P>(w, panel, numbers + t * tile, tile, height, unit, ahead, lines, sums, rows, fresh)
                            : by_tiles_of_rows<1, P>(w, panel, numbers + t * tile, tile, height, unit, ahead, lines, sums, rows, fresh);
            }
            if (!whole) roots.push(job.first + u);
        }
        put_planes<bf16, P>(job, x.m + first * height, std::min(rows, x.rows - first * height), n, 1, roots, rows);
    }
}

#endif

// The rows of `x` by `count` panels from panel n on. Several at once are not neighbours: each goes through a run of its own,
// so that what is called into the cache at a panel's end is what is read next.
template <class W> void panels_from(const Job &job, const Wide &x, int64_t n, int64_t count, Roots &roots) {
    const bool one_tile = x.height && x.room == x.height;
#if TILES
    if (x.height && !one_tile) {
        for (; count > 1; n += 2, count -= 2) tiled<2>(job, x, n, roots);
        if (count) tiled<1>(job, x, n, roots);
        return;
    }
#endif
    auto runs = [&](auto with) {
        constexpr int P = decltype(with)::value;
        const int64_t apart = count / P;
        for (int64_t i = 0; i < apart; i++) stripe<W, P>(job, x, n + i, apart, roots);
        n += apart * P, count -= apart * P;
    };
    if (x.rows <= (MULTIPLIED<W> ? FEW_PAIRED : 1) || one_tile) runs(std::integral_constant<int, 4>{});
    if (x.rows <= 3 || MULTIPLIED<W>) runs(std::integral_constant<int, 2>{});
    runs(std::integral_constant<int, 1>{});
}

// Called by every thread of a team. Each takes its share of the panels, by all rows if there are panels for all threads, and
// widens the rows of x for itself.
template <class W> void run(const Job &job, int threads) {
    const bool tiles = MULTIPLIED<W> && job.m > WIDTH && has_tiles();
    const int64_t panels = (job.n + WIDTH - 1) / WIDTH, each = tiles ? 2 : 1, most = tiles ? rows_together(job) : M_BLOCK;
    const int64_t blocks = (job.m + most - 1) / most, all = blocks * ((panels + each - 1) / each);
    static thread_local Wide x;
    static thread_local Roots roots;
#pragma omp for schedule(static, 1) nowait
    for (int64_t t = 0; t < threads; t++) {
        const int64_t begin = all * t / threads, end = all * (t + 1) / threads;
        for (int64_t block = 0; block < blocks; block++) {
            auto first = [=](int64_t at) { return std::min(panels, (std::max<int64_t>(0, at - block) + blocks - 1) / blocks * each); };
            const int64_t n = first(begin), count = first(end) - n;
            if (count <= 0) continue;
            x.take<W>(job, job.m * block / blocks, job.m * (block + 1) / blocks);
            if (x.height) set_up_tiles(x.height);
            panels_from<W>(job, x, n, count, roots);
            if (x.height) let_tiles_go();
        }
    }
}

template <class T>
void lay_out(const T *w, int64_t ldw, int64_t rows, int64_t columns, int64_t unit, int64_t n_units, T *to, int threads) {
    const int64_t blocks = (rows + WIDTH - 1) / WIDTH, groups = (unit + GROUP - 1) / GROUP;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t b = 0; b < blocks; b++)
        for (int64_t g = 0; g < n_units * groups; g++) {
            T *group = to + (b * n_units * groups + g) * GROUP * WIDTH;
            const int64_t in_unit = g % groups * GROUP, start = g / groups * unit + in_unit;
            const int64_t n = std::max<int64_t>(0, std::min({GROUP, unit - in_unit, columns - start}));
            const int64_t height = std::min<int64_t>(WIDTH, rows - b * WIDTH);
            if (n == GROUP && height == WIDTH) {
                turn(w + b * WIDTH * ldw + start, ldw, GROUP, group);
                continue;
            }
            std::fill_n(group, GROUP * WIDTH, T{});
            for (int64_t r = 0; r < height; r++) {
                const T *from = w + (b * WIDTH + r) * ldw + start;
                for (int64_t i = 0; i < n; i++)
                    group[in_panel<T>(r, i)] = from[i];
            }
        }
}

}  // namespace

void team::panels(int is_bf16, const void *x, int64_t ldx, const Packed &w, const void *bias, void *y, int64_t ldy,
                  int64_t plane, int y_f32, int64_t m, int64_t n, int64_t first, int threads) {
    const Job job{is_bf16 != 0, x, ldx, w, bias, y, ldy, plane, y_f32 != 0, m, n, first};
    if (w.bits == E4M3) return run<e4m3>(job, threads);
    is_bf16 ? run<bf16>(job, threads) : run<float>(job, threads);
}

// What the sums of bf16 depend on: 3 AMX, 2 AVX-512's products of pairs, 1 AVX-512, 0 what every processor has.
extern "C" int llama_dist_instructions() { return DOTS ? DOTS + 1 : LANES == 2; }

// w [rows, columns] of bf16 or floats, rows ldw apart, into panels of n_units units; what is beyond w is zero.
extern "C" int llama_dist_lay_out(int is_bf16, const void *w, int64_t ldw, int64_t rows, int64_t columns, int64_t unit,
                                  int64_t n_units, void *to, int threads) {
    if (is_bf16)
        lay_out((const bf16 *)w, ldw, rows, columns, unit, n_units, (bf16 *)to, threads);
    else
        lay_out((const float *)w, ldw, rows, columns, unit, n_units, (float *)to, threads);
    return 0;
}
