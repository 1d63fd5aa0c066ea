// Products of bf16 by instructions made for them. DOTS 2: in AMX's order, 1: in that of AVX-512's products of pairs, 0: none.
//
// AMX (Intel's manual, TDPBF16PS) takes 32 numbers along K at a time: those at even places and those at odd ones are summed
// apart, then added to each other, then to the sum so far. AVX-512's VDPBF16PS adds the two products of a pair to the sum so
// far, one after the other; with one of the pair zero it does AMX's work too, to the same bits. So a few rows, for which
// reading the weights is all that counts, and a process that may not use AMX, have the sums of many.
#pragma once

#include <algorithm>

#include "pairs.h"

#ifndef DOTS
#if LANES == 2 && defined(__AVX512BF16__) && defined(__AMX_BF16__) && defined(__AMX_TILE__)
#define DOTS 2
#elif LANES == 2 && defined(__AVX512BF16__)
#define DOTS 1
#else
#define DOTS 0
#endif
#endif

#ifndef TILES  // 0 in a test: AMX's sums without it
#define TILES (DOTS == 2)
#endif
#define BY_TILES (TILES || DOTS == 1)  // whether many rows may go by tiles

#if TILES
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {

#if DOTS

constexpr int TOGETHER = 32;             // numbers along K that AMX takes at a time, and a step of others
constexpr int64_t CALLED = 4096;         // bytes of weights called into the second cache before they are read
constexpr int CHAINS = DOTS == 2 ? 2 : 1;  // sums of a row that run side by side, and words of x for a pair of numbers
constexpr int64_t HEIGHT = DOTS == 2 ? 16 : 8;  // rows of a tile, at most

// Two tiles of rows of bf16: rows are row_bytes apart, 32 numbers of each and the next ones `step` numbers.
struct Tiles {
    const bf16 *first, *second;
    int64_t row_bytes, step;
};

// Sixteen numbers as bf16; one below the normal numbers becomes zero.
INLINE void narrow(bf16 *p, Lanes a) { _mm256_storeu_si256((__m256i *)p, (__m256i)_mm512_cvtneps_pbh(a.v)); }

// The same as numbers again.
INLINE Lanes narrowed(Lanes a) {
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(a.v)), 16))};
}

// Twice sixteen.
INLINE void narrow(bf16 *p, Lanes a, Lanes b) { _mm512_storeu_si512(p, (__m512i)_mm512_cvtne2ps_pbh(b.v, a.v)); }

// n numbers of x, then zeros up to `room`, as words that meet pairs of weights.
INLINE void pair_up(const bf16 *x, int64_t n, int64_t room, uint32_t *to) {
    if (CHAINS == 1) {
        memcpy(to, x, n * sizeof *x);
        memset((bf16 *)to + n, 0, (room - n) * sizeof *x);
        return;
    }
    for (int64_t at = 0; at < room; at += 2, to += CHAINS) {
        uint32_t pair = 0;
        if (at < n) memcpy(&pair, x + at, at + 1 < n ? 4 : 2);
        to[0] = pair & 0xffffu, to[CHAINS - 1] = pair & 0xffff0000u;
    }
}

// 2^x, within an ulp or two; the polynomial is for what x is above a whole number.
INLINE __m512 power_of_two(__m512 x) {
    const __m512 r = _mm512_reduce_ps(x, 1);
    __m512 p = _mm512_set1_ps(0x1.e974fap-10f);
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0x1.277856p-7f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0x1.c91ce6p-5f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0x1.ebdb56p-3f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0x1.62e4bap-1f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f));
    return _mm512_scalef_ps(p, x);
}

// M rows of x, words as pair_up makes them, along k numbers of P panels, added to sums[panel * stride + row].
template <int M, int P, bool CALL>
INLINE void by_pairs(const bf16 *w, int64_t panel, const uint32_t *x, int64_t ldx, int64_t k, Lanes *sums, int64_t stride) {
    __m512 total[M][P], part[M][P][CHAINS];
    for (int i = 0; i < M; i++)
        for (int p = 0; p < P; p++) total[i][p] = sums[p * stride + i].v;
    for (int64_t at = 0; at < k; at += TOGETHER) {
        for (int i = 0; i < M; i++)
            for (int p = 0; p < P; p++)
                for (int c = 0; c < CHAINS; c++) part[i][p][c] = CHAINS == 1 ? total[i][p] : _mm512_setzero_ps();
#pragma GCC unroll 4
        for (int j = 0; j < TOGETHER / 2; j++, x += CHAINS, w += 2 * WIDTH)
#pragma GCC unroll 4
            for (int p = 0; p < P; p++) {
                const bf16 *line = w + p * panel;
                if (CALL) __builtin_prefetch((const char *)line + CALLED, 0, 2);
                const __m512bh weights = (__m512bh)_mm512_loadu_si512(line);
#pragma GCC unroll 6
                for (int i = 0; i < M; i++)
#pragma GCC unroll 2
                    for (int c = 0; c < CHAINS; c++)
                        part[i][p][c] = _mm512_dpbf16_ps(part[i][p][c], weights, (__m512bh)_mm512_set1_epi32(x[i * ldx + c]));
            }
        for (int i = 0; i < M; i++)
            for (int p = 0; p < P; p++)
                total[i][p] = CHAINS == 1 ? part[i][p][0] : _mm512_add_ps(total[i][p], _mm512_add_ps(part[i][p][0], part[i][p][CHAINS - 1]));
    }
    for (int i = 0; i < M; i++)
        for (int p = 0; p < P; p++) sums[p * stride + i] = {total[i][p]};
}

#endif

#if TILES

// Whether this process may use AMX, which it asks for once (Linux, Documentation/arch/x86/xstate.rst).
inline bool has_tiles() {
    constexpr int ASK_FOR_STATE = 0x1023, TILE_DATA = 18;
    static const bool granted = !syscall(SYS_arch_prctl, ASK_FOR_STATE, TILE_DATA);
    return granted;
}

// What comes before is in memory: a compiler may not know what a tile's instruction reads.
INLINE void written() { asm volatile("" ::: "memory"); }

// Of this thread, until it lets go of them: sums 0 to 3 and rows of x, 4 and 5, of `height` rows; weights, 6 and 7, of sixteen
// pairs.
inline void set_up_tiles(int64_t height) {
    struct alignas(64) {
        uint8_t palette = 1, start = 0, none[14] = {};
        uint16_t row_bytes[16] = {};
        uint8_t rows[16] = {};
    } all;
    for (int i = 0; i < 8; i++) all.row_bytes[i] = 64, all.rows[i] = uint8_t(i < 6 ? height : TOGETHER / 2);
    written();
    _tile_loadconfig(&all);
}
inline void let_tiles_go() { _tile_release(); }

// Tiles of sums, 0 to 3, from nothing; and n of them -> sums [rows][tile][16], rows `stride` apart.
INLINE void clear_tiles() {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
}
INLINE void store_tiles(int64_t n, float *sums, int64_t stride) {
    written();
    _tile_stored(0, sums, stride * 4);
    if (n > 1) _tile_stored(1, sums + WIDTH, stride * 4);
    if (n > 2) _tile_stored(2, sums + 2 * WIDTH, stride * 4);
    if (n > 3) _tile_stored(3, sums + 3 * WIDTH, stride * 4);
    written();
}

// R tiles of rows of x by P panels along k numbers, added to sums[panel * stride + tile * height + row], or in their place where
// they are fresh. With every 32 numbers `meanwhile` is called; lines further on of each panel are called in where CALL.
template <int R, int P, bool CALL, class Meanwhile>
INLINE void by_tiles_of_rows(const bf16 *w, int64_t panel, Tiles x, int64_t height, int64_t k, Meanwhile meanwhile, Lanes *sums,
                             int64_t stride, bool fresh) {
    auto sum = [&](int i) { return sums + i % P * stride + i / P * height; };
    auto line = [&](int p) {
        const bf16 *from = w + p * panel;
        if (CALL)
            for (int64_t at = 0; at < TOGETHER * WIDTH * 2; at += 64) __builtin_prefetch((const char *)from + CALLED + at, 0, 2);
        return from;
    };
    written();
    clear_tiles();
    if (!fresh) {
        _tile_loadd(0, sum(0), 64);
        if (R * P > 1) _tile_loadd(1, sum(1), 64);
        if (R * P > 2) {
            _tile_loadd(2, sum(2), 64);
            _tile_loadd(3, sum(3), 64);
        }
    }
    for (int64_t at = 0; at < k; at += TOGETHER, w += TOGETHER * WIDTH, x.first += x.step, x.second += x.step) {
        _tile_loadd(4, x.first, x.row_bytes);
        _tile_loadd(6, line(0), 64);
        _tile_dpbf16ps(0, 4, 6);
        if (P > 1) {
            _tile_loadd(7, line(1), 64);
            _tile_dpbf16ps(1, 4, 7);
        }
        if (P > 2) {
            _tile_loadd(6, line(2), 64);
            _tile_dpbf16ps(2, 4, 6);
            _tile_loadd(7, line(3), 64);
            _tile_dpbf16ps(3, 4, 7);
        }
        if (R > 1) {
            _tile_loadd(5, x.second, x.row_bytes);
            if (P == 1) _tile_dpbf16ps(1, 5, 6);
            if (P == 2) _tile_dpbf16ps(2, 5, 6);
            if (P == 2) _tile_dpbf16ps(3, 5, 7);
        }
        meanwhile();
    }
    _tile_stored(0, sum(0), 64);
    if (R * P > 1) _tile_stored(1, sum(1), 64);
    if (R * P > 2) {
        _tile_stored(2, sum(2), 64);
        _tile_stored(3, sum(3), 64);
    }
    written();
}

// N panels, one or two, by a tile of rows of x, k apart, from nothing: sums [rows][N][16], rows `stride` apart. Tiles 0 and 1 stay
// as they are.
template <int N> INLINE void tile_by_panels(const bf16 *x, const bf16 *const *w, int64_t k, float *sums, int64_t stride) {
    written();
    _tile_zero(2);
    if (N > 1) _tile_zero(3);
    for (int64_t at = 0; at < k; at += TOGETHER) {
        _tile_loadd(4, x + at, k * 2);
        _tile_loadd(6, w[0] + at * WIDTH, 64);
        _tile_dpbf16ps(2, 4, 6);
        if (N == 1) continue;
        _tile_loadd(7, w[1] + at * WIDTH, 64);
        _tile_dpbf16ps(3, 4, 7);
    }
    _tile_stored(2, sums, stride * 4);
    if (N > 1) _tile_stored(3, sums + WIDTH, stride * 4);
    written();
}

// To the sums of tiles FIRST, 0 or 2, and the next, for numbers that are sums of two: x has 32 numbers of a row, `row_bytes` from
// the next row's, first [32] then second [32]. The products of the first ones come first, then those of the second.
template <int FIRST> INLINE void add_halves(const bf16 *x, int64_t row_bytes, const bf16 *w) {
    written();
    _tile_loadd(4, x, row_bytes);
    _tile_loadd(6, w, 64);
    _tile_loadd(7, w + TOGETHER * WIDTH, 64);
    _tile_loadd(5, x + TOGETHER, row_bytes);
    if (FIRST) {
        _tile_dpbf16ps(2, 4, 6);
        _tile_dpbf16ps(3, 4, 7);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    } else {
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(0, 5, 6);
        _tile_dpbf16ps(1, 5, 7);
    }
    written();  // x and w may be written anew
}

#else

inline bool has_tiles() { return false; }
inline void set_up_tiles(int64_t) {}
inline void let_tiles_go() {}
inline void clear_tiles() {}
inline void store_tiles(int64_t, float *, int64_t) {}
template <int> inline void tile_by_panels(const bf16 *, const bf16 *const *, int64_t, float *, int64_t) {}
template <int> inline void add_halves(const bf16 *, int64_t, const bf16 *) {}

#endif

}  // namespace
