// y = x W^T for weights that are floats, in panels: sixteen rows of W side by side, so that one load takes some numbers of each
// row, and each row's sum has a lane of its own. Floats of eight bits, e4m3, have a factor for each unit of a row.
//
// A lane's sum runs along K, K_BLOCK numbers at a time; these sums are added up in their order, then by unit in the binary tree
// over unit numbers. So the bits of an entry of y are a function of its row of x and its row of W, on any number of threads, in
// any batch, and the same on all processors that can multiply and add in one. Those with instructions for bf16 add up its
// products in an order of their own (dots.h), of which the same holds.
#include "panel_few.h"
#include "panel_tiles.h"

namespace {

constexpr int64_t K_BLOCK = 256;  // numbers of a panel that stay in the first cache as floats
constexpr int64_t M_BLOCK = 256;  // rows of x whose K_BLOCK numbers stay in the second cache
constexpr int TILE = 6;           // rows of x whose sums are in registers
constexpr int FEW_TILE = 4;       // the same where the weights that are taken apart need registers too
template <class W>
constexpr int64_t FEW = sizeof(W) == 1 ? 8 : 12;  // rows; for more of them a panel is widened first
constexpr int64_t ONE_BY_ONE = 1024;  // numbers of panels that a row or two are multiplied by one after another (Zen 4)
#if LANES == 2
constexpr int AHEAD = 4096, KEEP = 2;  // bytes of weights called in before they are read, and which caches keep them
#else
constexpr int AHEAD = 384, KEEP = 0;
#endif

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

// All rows of `x`, from number `at` of each on, by P panels, by the instructions of dots.h; fresh sums are not added to. A row
// or two come here in AMX's order only; for the other see panel_few.h.
#if DOTS
template <int P>
INLINE void multiplied(const Job &job, const Wide &x, int64_t ldx, int64_t at, const bf16 *w, int64_t panel, int64_t k,
                       Lanes *sums, bool fresh) {
#if TILES
    if (x.height)  // one tile
        return by_tiles_of_rows<1, P, true>(w, panel, x.tiles(job, 0, at), x.height, k, [] {}, sums, x.room, fresh);
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
    const int64_t unit = job.unit_numbers(), ldx = job.numbers_a_row(), panel = job.panel();
    const W *w = (const W *)job.w.codes + n * panel;
    const float *numbers = x.as<float>();
    alignas(64) float room[K_BLOCK * WIDTH];
    roots.start(P * x.room);
    const bool zeros = !x.height;  // tiles begin with zeros of their own
    Lanes *sums = roots.next(zeros);
    for (int64_t u = 0; u < job.w.n_units; u++) {
#if DOTS
        if constexpr (MULTIPLIED<W>) {
            multiplied<P>(job, x, ldx, u * unit, w, apart * panel, unit, sums, !whole || !u);
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
    put_roots<W, P>(job, x, n, apart, roots);
}

// How many panels some rows are multiplied by at once, at most.
template <class W> int64_t together(const team::Packed &w, int64_t rows, bool tiles) {
    if (MULTIPLIED<W> && DOTS == 1 && rows <= FEW_PAIRED) return w.block_groups * GROUP <= ONE_BY_ONE ? 1 : 2;
    if (tiles || rows <= (MULTIPLIED<W> ? FEW_PAIRED : 1)) return 4;
    return rows <= 3 || MULTIPLIED<W> ? 2 : 1;
}

// The rows of `x` by `count` panels from panel n on. Several at once are not neighbours: each goes through a run of its own,
// so that what is called into the cache at a panel's end is what is read next.
template <class W> void panels_from(const Job &job, const Wide &x, int64_t n, int64_t count, Roots &roots) {
    auto runs = [&](auto with) {
        constexpr int P = decltype(with)::value;
        const int64_t apart = count / P;
        for (int64_t i = 0; i < apart; i++) {
#if DOTS == 1
            if constexpr (MULTIPLIED<W> && P <= 2)
                if (row_or_two<P>(job, x, n + i, apart, roots)) continue;
#endif
            stripe<W, P>(job, x, n + i, apart, roots);
        }
        n += apart * P, count -= apart * P;
    };
    const int64_t most = together<W>(job.w, x.rows, x.height);
    if (most >= 4) runs(std::integral_constant<int, 4>{});
    if (most >= 2) runs(std::integral_constant<int, 2>{});
    runs(std::integral_constant<int, 1>{});
}

// Called by every thread of a team. Each takes its share of the panels, and widens the rows of x for itself.
template <class W> void run(const Job &job, int threads) {
    const int64_t panels = (job.n + WIDTH - 1) / WIDTH, blocks = (job.m + M_BLOCK - 1) / M_BLOCK, all = blocks * panels;
    static thread_local Wide x;
    static thread_local Roots roots;
#pragma omp for schedule(static, 1) nowait
    for (int64_t t = 0; t < threads; t++) {
        const int64_t end = all * (t + 1) / threads;
        for (int64_t at = all * t / threads, block = -1; at < end;) {
            if (at / panels != block) {
                block = at / panels;
                const int64_t from = job.m * block / blocks, to = job.m * (block + 1) / blocks;
                x.take<W>(job, from, to, MULTIPLIED<W> && to - from > FEW_PAIRED && has_tiles());
                if (x.height) set_up_tiles(x.height);
            }
            const int64_t n = at % panels, count = std::min(end - at, panels - n);
            panels_from<W>(job, x, n, count, roots);
            at += count;
            if (at >= end && x.height) let_tiles_go();
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

Coming team::coming_panels(const Packed &w, int64_t m, int64_t n, int t, int threads) {
    const int64_t panels = (n + WIDTH - 1) / WIDTH, first = panels * t / threads, count = panels * (t + 1) / threads - first;
    if (m > M_BLOCK || !count) return {};
    auto of = [&](auto type) {
        using W = decltype(type);
        int64_t runs = together<W>(w, m, MULTIPLIED<W> && has_tiles());
        while (runs > count) runs /= 2;
        const int64_t panel = w.block_groups * GROUP * WIDTH * int64_t(sizeof(W)), apart = count / runs * panel;
        return Coming::of((const char *)w.codes + first * panel, int(runs), apart, apart);
    };
    return w.bits == E4M3 ? of(e4m3{}) : w.bits == 16 ? of(bf16{}) : of(float{});
}

bool team::in_tiles(int is_bf16, const Packed &w, int64_t m) {
    return BY_TILES && is_bf16 && w.bits == 16 && m > FEW_BY_TILES && (DOTS == 1 || has_tiles());
}

Coming team::coming_tiles(const Packed &w, int64_t m, int64_t n, int64_t first, int64_t up, int t, int threads) {
#if BY_TILES
    const End end = up ? End::GATED : End::PLANES;
    const Job job{true, nullptr, 0, w, nullptr, nullptr, 0, 0, false, m, n, first, end, up / WIDTH};
    return first_of(job, Deal(job, t, threads), 0);
#else
    return {};
#endif
}

void team::total(const void *x, int64_t ldx, const Packed &w, void *y, int64_t ldy, int64_t m, int64_t n, int64_t first,
                 int threads, Coming *coming) {
    by_tiles({true, x, ldx, w, nullptr, y, ldy, 0, false, m, n, first, End::TOTAL}, threads, coming);
}

void team::gated(const void *x, int64_t ldx, const Packed &w, int64_t up, void *y, int64_t ldy, int64_t m, int64_t n, int threads,
                 Coming *coming) {
    by_tiles({true, x, ldx, w, nullptr, y, ldy, 0, false, m, n, -1, End::GATED, up / WIDTH}, threads, coming);
}

void team::panels(int is_bf16, const void *x, int64_t ldx, const Packed &w, const void *bias, void *y, int64_t ldy,
                  int64_t plane, int y_f32, int64_t m, int64_t n, int64_t first, int threads, Coming *coming) {
    const Job job{is_bf16 != 0, x, ldx, w, bias, y, ldy, plane, y_f32 != 0, m, n, first};
    if (w.bits == E4M3) return run<e4m3>(job, threads);
    if (in_tiles(is_bf16, w, m)) return by_tiles(job, threads, coming);
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
