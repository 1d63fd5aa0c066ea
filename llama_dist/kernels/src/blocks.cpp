// Blocks of GGUF files to floats. How they lie: https://github.com/ggml-org/ggml, ggml-common.h; `d` and `m` are float16.
//
// Each number is rounded as the `gguf` package rounds it, in the same order, so that it does not matter which of both reads.
#include <cstdint>
#include <cstring>

namespace {

float half(const uint8_t *p) {
    uint16_t h;
    memcpy(&h, p, 2);
    const uint32_t sign = uint32_t(h & 0x8000) << 16, exponent = h >> 10 & 31, fraction = h & 0x3ff;
    if (exponent == 0) return (sign ? -1.0f : 1.0f) * float(fraction) * 0x1p-24f;
    const uint32_t bits = sign | (exponent == 31 ? 255u : exponent + 112) << 23 | fraction << 13;
    float f;
    memcpy(&f, &bits, 4);
    return f;
}

// Blocks of 32: numbers i and i + 16 share a byte.
struct Small {
    static constexpr int NUMBERS = 32;
};

struct Q4_0 : Small {
    static constexpr int BYTES = 18;
    static void read(const uint8_t *p, float *to) {
        const float d = half(p);
        for (int i = 0; i < 16; i++) to[i] = d * float((p[2 + i] & 15) - 8), to[i + 16] = d * float((p[2 + i] >> 4) - 8);
    }
};

struct Q4_1 : Small {
    static constexpr int BYTES = 20;
    static void read(const uint8_t *p, float *to) {
        const float d = half(p), m = half(p + 2);
        for (int i = 0; i < 16; i++) to[i] = d * float(p[4 + i] & 15) + m, to[i + 16] = d * float(p[4 + i] >> 4) + m;
    }
};

// Numbers of five bits: the fifth ones stand before the others.
inline void five(const uint8_t *p, int *to) {
    uint32_t fifth;
    memcpy(&fifth, p, 4);
    for (int i = 0; i < 16; i++) {
        to[i] = (p[4 + i] & 15) | int(fifth >> i & 1) << 4;
        to[i + 16] = p[4 + i] >> 4 | int(fifth >> (i + 16) & 1) << 4;
    }
}

struct Q5_0 : Small {
    static constexpr int BYTES = 22;
    static void read(const uint8_t *p, float *to) {
        const float d = half(p);
        int q[32];
        five(p + 2, q);
        for (int i = 0; i < 32; i++) to[i] = d * float(q[i] - 16);
    }
};

struct Q5_1 : Small {
    static constexpr int BYTES = 24;
    static void read(const uint8_t *p, float *to) {
        const float d = half(p), m = half(p + 2);
        int q[32];
        five(p + 4, q);
        for (int i = 0; i < 32; i++) to[i] = d * float(q[i]) + m;
    }
};

struct Q8_0 : Small {
    static constexpr int BYTES = 34;
    static void read(const uint8_t *p, float *to) {
        const float d = half(p);
        for (int i = 0; i < 32; i++) to[i] = float(int8_t(p[2 + i])) * d;
    }
};

// Blocks of 256: eight rows of 32 numbers, whose bits of one kind share bytes. Parts of 16 or 32 have scales of their own.
struct Large {
    static constexpr int NUMBERS = 256;
};

struct Q2_K : Large {
    static constexpr int BYTES = 84;
    static void read(const uint8_t *p, float *to) {
        const uint8_t *scales = p, *q = p + 16;
        const float d = half(p + 80), m = half(p + 82);
        for (int row = 0; row < 8; row++)
            for (int i = 0; i < 32; i++, to++) {
                const int scale = scales[2 * row + i / 16];
                *to = d * float(scale & 15) * float(q[row / 4 * 32 + i] >> row % 4 * 2 & 3) - m * float(scale >> 4);
            }
    }
};

struct Q3_K : Large {
    static constexpr int BYTES = 110;
    static void read(const uint8_t *p, float *to) {
        const uint8_t *third = p, *q = p + 32, *packed = p + 96;
        const float d = half(p + 108);
        float scales[16];
        for (int s = 0; s < 16; s++) {
            const int low = packed[s % 8] >> s / 8 * 4 & 15, high = packed[8 + s % 4] >> s / 4 * 2 & 3;
            scales[s] = d * float((low | high << 4) - 32);
        }
        for (int row = 0; row < 8; row++)
            for (int i = 0; i < 32; i++, to++) {
                const int low = q[row / 4 * 32 + i] >> row % 4 * 2 & 3;
                *to = scales[2 * row + i / 16] * float(low - (third[i] >> row & 1 ? 0 : 4));
            }
    }
};

// Eight scales and eight minima of six bits each, in twelve bytes.
inline void sixes(const uint8_t *p, float *scales, float *minima) {
    for (int i = 0; i < 4; i++) {
        scales[i] = float(p[i] & 63), scales[i + 4] = float((p[8 + i] & 15) | (p[i] >> 2 & 0x30));
        minima[i] = float(p[4 + i] & 63), minima[i + 4] = float(p[8 + i] >> 4 | (p[4 + i] >> 2 & 0x30));
    }
}

struct Q4_K : Large {
    static constexpr int BYTES = 144;
    static void read(const uint8_t *p, float *to) {
        const float d = half(p), m = half(p + 2);
        const uint8_t *q = p + 16;
        float scales[8], minima[8];
        sixes(p + 4, scales, minima);
        for (int row = 0; row < 8; row++) {
            const float scale = d * scales[row], low = m * minima[row];
            for (int i = 0; i < 32; i++, to++) *to = scale * float(q[row / 2 * 32 + i] >> row % 2 * 4 & 15) - low;
        }
    }
};

struct Q5_K : Large {
    static constexpr int BYTES = 176;
    static void read(const uint8_t *p, float *to) {
        const float d = half(p), m = half(p + 2);
        const uint8_t *fifth = p + 16, *q = p + 48;
        float scales[8], minima[8];
        sixes(p + 4, scales, minima);
        for (int row = 0; row < 8; row++) {
            const float scale = d * scales[row], low = m * minima[row];
            for (int i = 0; i < 32; i++, to++)
                *to = scale * float((q[row / 2 * 32 + i] >> row % 2 * 4 & 15) | (fifth[i] >> row & 1) << 4) - low;
        }
    }
};

struct Q6_K : Large {
    static constexpr int BYTES = 210;
    static void read(const uint8_t *p, float *to) {
        const uint8_t *low = p, *high = p + 128, *scales = p + 192;
        const float d = half(p + 208);
        for (int row = 0; row < 8; row++)
            for (int i = 0; i < 32; i++, to++) {
                const int four = low[row / 4 * 64 + row % 2 * 32 + i] >> row % 4 / 2 * 4 & 15;
                const int two = high[row / 4 * 32 + i] >> row % 4 * 2 & 3;
                *to = d * float(int8_t(scales[2 * row + i / 16])) * float((four | two << 4) - 32);
            }
    }
};

template <class Kind>
int read(const uint8_t *from, int64_t blocks, float *to, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t b = 0; b < blocks; b++) Kind::read(from + b * Kind::BYTES, to + b * Kind::NUMBERS);
    return 0;
}

}  // namespace

// `blocks` blocks of GGUF's type number `kind` -> `to`, as many numbers as they hold. Returns 1 where no such type is known.
extern "C" int llama_dist_blocks(int kind, const uint8_t *from, int64_t blocks, float *to, int threads) {
    switch (kind) {
        case 2: return read<Q4_0>(from, blocks, to, threads);
        case 3: return read<Q4_1>(from, blocks, to, threads);
        case 6: return read<Q5_0>(from, blocks, to, threads);
        case 7: return read<Q5_1>(from, blocks, to, threads);
        case 8: return read<Q8_0>(from, blocks, to, threads);
        case 10: return read<Q2_K>(from, blocks, to, threads);
        case 11: return read<Q3_K>(from, blocks, to, threads);
        case 12: return read<Q4_K>(from, blocks, to, threads);
        case 13: return read<Q5_K>(from, blocks, to, threads);
        case 14: return read<Q6_K>(from, blocks, to, threads);
        default: return 1;
    }
}
