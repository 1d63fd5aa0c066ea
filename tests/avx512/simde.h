// Read before a kernel's source: AVX-512 by SIMDe (Debian's libsimde-dev) on a processor that has AVX2, so that what such
// processors run is tested on others too. What SIMDe 0.7.4 lacks stands here.
#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstring>

#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx512.h>

#define __m512 simde__m512
#define __m512i simde__m512i
#define __m512d simde__m512d
#define __m512bh simde__m512bh

#define __AVX512F__ 1
#define __AVX512BW__ 1
#define __AVX512VL__ 1
#define __AVX512DQ__ 1
#ifndef FIRST_AVX512  // Skylake's: neither products of bytes nor of bfloat16
#define __AVX512VNNI__ 1
#define __AVX512BF16__ 1
#endif

namespace lanes_by_hand {

// to[i] = f(from[i]) for the N numbers of a register.
template <int N, class To, class From, class R, class X, class F> inline R each(X x, F f) {
    From from[N];
    To to[N];
    R result;
    static_assert(sizeof from == sizeof x && sizeof to == sizeof result, "registers are full");
    memcpy(from, &x, sizeof from);
    for (int i = 0; i < N; i++) to[i] = To(f(from[i]));
    memcpy(&result, to, sizeof to);
    return result;
}

template <class T, int N, class R> inline R masked(uint32_t mask, const void *p) {
    T x[N];
    R result;
    for (int i = 0; i < N; i++) x[i] = mask >> i & 1 ? static_cast<const T *>(p)[i] : T(0);
    memcpy(&result, x, sizeof x);
    return result;
}

inline __m512i widen16(__m256i x) {
    return each<16, int32_t, uint16_t, __m512i>(x, [](uint16_t v) { return v; });
}
inline __m512i widen8(__m128i x) {
    return each<16, int32_t, uint8_t, __m512i>(x, [](uint8_t v) { return v; });
}
inline __m256i narrow16(__m512i x) {
    return each<16, int16_t, int32_t, __m256i>(x, [](int32_t v) { return v; });
}
inline __m512 floats(__m512i x) {
    return each<16, float, int32_t, __m512>(x, [](int32_t v) { return v; });
}
inline __m512i shifted(__m512i x, int by) {
    return each<16, int32_t, int32_t, __m512i>(x, [by](int32_t v) { return v >> by; });
}

inline float greatest(__m512 x) {
    float v[16];
    memcpy(v, &x, sizeof v);
    for (int i = 1; i < 16; i++) v[0] = v[i] > v[0] ? v[i] : v[0];
    return v[0];
}

// Quarters: two of a, then two of b, each named by two bits.
inline __m512 quarters(__m512 a, __m512 b, int names) {
    float from[32], to[16];
    memcpy(from, &a, 64), memcpy(from + 16, &b, 64);
    for (int i = 0; i < 4; i++) memcpy(to + 4 * i, from + (i < 2 ? 0 : 16) + 4 * (names >> 2 * i & 3), 16);
    __m512 result;
    memcpy(&result, to, 64);
    return result;
}

// Pairs of bfloat16, of each first the second (SIMDe 0.7.4 begins with the first).
inline __m512 dot_pairs(__m512 sums, __m512bh a, __m512bh b) {
    float s[16];
    uint32_t x[16], y[16];
    memcpy(s, &sums, 64), memcpy(x, &a, 64), memcpy(y, &b, 64);
    auto number = [](uint32_t bits) {
        float f;
        memcpy(&f, &bits, 4);
        return f;
    };
    for (int i = 0; i < 16; i++) {
        s[i] += number(x[i] & 0xffff0000u) * number(y[i] & 0xffff0000u);
        s[i] += number(x[i] << 16) * number(y[i] << 16);
    }
    memcpy(&sums, s, 64);
    return sums;
}

// Sixteen floats as bfloat16, to the nearest, ties to even; below the normal numbers zero.
inline __m256i bf16_of(__m512 x) {
    return each<16, uint16_t, uint32_t, __m256i>(x, [](uint32_t bits) -> uint32_t {
        if ((bits & 0x7fffffffu) > 0x7f800000u) return bits >> 16 | 0x40;
        if ((bits & 0x7f800000u) == 0) return bits >> 16 & 0x8000u;
        return (bits + 0x7fffu + (bits >> 16 & 1)) >> 16;
    });
}

// What x is above the whole number below it.
inline __m512 above_whole(__m512 x, int) {
    return each<16, float, float, __m512>(x, [](float v) { return v - v == 0 ? v - floorf(v) : 0.0f; });
}

// x times 2 to the whole number below y
inline __m512 scaled(__m512 x, __m512 y) {
    float a[16], b[16];
    memcpy(a, &x, 64), memcpy(b, &y, 64);
    for (int i = 0; i < 16; i++) a[i] = b[i] < -1000 ? 0.0f : b[i] - b[i] == 0 ? ldexpf(a[i], int(floorf(std::min(b[i], 1000.0f)))) : a[i] * b[i];
    memcpy(&x, a, 64);
    return x;
}

// 1 / x to fourteen bits
inline __m512 about_inverse(__m512 x) {
    return each<16, float, float, __m512>(x, [](float v) {
        const float inverse = 1 / v;
        uint32_t bits;
        memcpy(&bits, &inverse, 4);
        bits &= ~0x1ffu;
        memcpy(&v, &bits, 4);
        return v;
    });
}

inline __m256 half(__m512 x, int i) {
    __m256 halves[2];
    memcpy(halves, &x, 64);
    return halves[i];
}

inline __m512i both_bf16(__m512 high, __m512 low) {
    __m256i halves[2] = {bf16_of(low), bf16_of(high)};
    __m512i result;
    memcpy(&result, halves, 64);
    return result;
}

}  // namespace lanes_by_hand

#undef _mm512_maskz_loadu_ps
#define _mm512_cvtepu16_epi32 lanes_by_hand::widen16
#define _mm512_cvtepu8_epi32 lanes_by_hand::widen8
#define _mm512_cvtepi32_epi16 lanes_by_hand::narrow16
#define _mm512_cvtepi32_ps lanes_by_hand::floats
#define _mm512_srai_epi32 lanes_by_hand::shifted
#undef _mm512_cvtneps_pbh
#define _mm512_cvtneps_pbh lanes_by_hand::bf16_of
#undef _mm512_cvtne2ps_pbh
#define _mm512_cvtne2ps_pbh lanes_by_hand::both_bf16
#undef _mm512_extractf32x8_ps
#define _mm512_extractf32x8_ps lanes_by_hand::half
#define _mm512_reduce_ps lanes_by_hand::above_whole
#define _mm512_rcp14_ps lanes_by_hand::about_inverse
#undef _mm512_scalef_ps
#define _mm512_scalef_ps lanes_by_hand::scaled
#undef _mm512_dpbf16_ps
#define _mm512_dpbf16_ps lanes_by_hand::dot_pairs
#define _mm512_reduce_max_ps lanes_by_hand::greatest
#define _mm512_shuffle_f32x4 lanes_by_hand::quarters
#define _mm512_maskz_loadu_epi16 lanes_by_hand::masked<uint16_t, 32, __m512i>
#define _mm512_maskz_loadu_ps lanes_by_hand::masked<float, 16, __m512>

#ifdef AMX  // by hand, as Intel's manual has it; the system's permission is one that is always granted
#include <sched.h>
#include <sys/syscall.h>

#define __AMX_TILE__ 1
#define __AMX_BF16__ 1
#undef SYS_arch_prctl
#define SYS_arch_prctl SYS_sched_yield

namespace tiles_by_hand {

struct Tile {
    int rows, row_bytes;
    unsigned char bytes[16][64];
};
inline thread_local Tile tiles[8];

inline void configure(const void *p) {
    const unsigned char *from = static_cast<const unsigned char *>(p);
    memset(tiles, 0, sizeof tiles);
    for (int t = 0; t < 8; t++) {
        uint16_t row_bytes;
        memcpy(&row_bytes, from + 16 + 2 * t, 2);
        tiles[t].rows = from[48 + t], tiles[t].row_bytes = row_bytes;
    }
}
inline void load(Tile &tile, const void *p, long stride) {
    for (int i = 0; i < tile.rows; i++) memcpy(tile.bytes[i], static_cast<const char *>(p) + i * stride, tile.row_bytes);
}
inline void store(const Tile &tile, void *p, long stride) {
    for (int i = 0; i < tile.rows; i++) memcpy(static_cast<char *>(p) + i * stride, tile.bytes[i], tile.row_bytes);
}
inline float number(const Tile &tile, int row, int at) {
    uint32_t bits = 0;
    memcpy(reinterpret_cast<char *>(&bits) + 2, tile.bytes[row] + 2 * at, 2);
    float x;
    memcpy(&x, &bits, 4);
    return x;
}
inline void multiply(Tile &sums, const Tile &a, const Tile &b) {
    for (int m = 0; m < sums.rows; m++)
        for (int n = 0; n < sums.row_bytes / 4; n++) {
            float even = 0, odd = 0, sum;
            for (int k = 0; k < a.row_bytes / 4; k++) {
                even += number(a, m, 2 * k) * number(b, k, 2 * n);
                odd += number(a, m, 2 * k + 1) * number(b, k, 2 * n + 1);
            }
            memcpy(&sum, sums.bytes[m] + 4 * n, 4);
            sum += even + odd;
            memcpy(sums.bytes[m] + 4 * n, &sum, 4);
        }
}

}  // namespace tiles_by_hand

#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbf16ps
#define _tile_loadconfig tiles_by_hand::configure
// What was in them is gone, and what comes next has to set them up.
#define _tile_release() memset(tiles_by_hand::tiles, 0, sizeof tiles_by_hand::tiles)
#define _tile_zero(t) memset(tiles_by_hand::tiles[t].bytes, 0, sizeof tiles_by_hand::tiles[t].bytes)
#define _tile_loadd(t, p, stride) tiles_by_hand::load(tiles_by_hand::tiles[t], p, stride)
#define _tile_stored(t, p, stride) tiles_by_hand::store(tiles_by_hand::tiles[t], p, stride)
#define _tile_dpbf16ps(c, a, b) tiles_by_hand::multiply(tiles_by_hand::tiles[c], tiles_by_hand::tiles[a], tiles_by_hand::tiles[b])
#endif
