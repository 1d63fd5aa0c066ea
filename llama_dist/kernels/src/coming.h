// Weights that a thread is to read next, called into the second cache, and through it into the third, while it waits for
// others, when memory is idle, or by the product that it does before.
#pragma once

#include <cstdint>

struct Coming {
    static constexpr int MOST = 8;
    static constexpr int64_t BYTES = 1 << 20;  // of all runs: longer waits than for these are rare

    const char *at[MOST] = {};  // runs that are read side by side, and what is left of each
    int runs = 0;
    int64_t bytes = 0;

    // `runs` of `bytes` each, `apart` bytes from the first's to the next's beginning.
    static Coming of(const void *first, int runs, int64_t apart, int64_t bytes) {
        Coming coming;
        coming.runs = runs;
        coming.bytes = bytes < BYTES / runs ? bytes : BYTES / runs;
        for (int i = 0; i < runs; i++) coming.at[i] = static_cast<const char *>(first) + i * apart;
        return coming;
    }

    // The next line of each; false where there is none.
    bool call() {
        if (bytes <= 0) return false;
        for (int i = 0; i < runs; i++, at[i - 1] += 64) __builtin_prefetch(at[i], 0, 2);
        bytes -= 64;
        return true;
    }
};
