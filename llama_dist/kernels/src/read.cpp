// Reads memory as fast as it can, to say how fast that is. A plain loop reads too low on many processors, so there are
// several ways; which is the fastest differs.
#include <cstdint>
#include <cstring>

namespace {

#if defined(__AVX512F__)
constexpr int REGISTER = 64;
#elif defined(__AVX__)
constexpr int REGISTER = 32;
#else
constexpr int REGISTER = 16;
#endif
typedef uint64_t Word __attribute__((vector_size(REGISTER)));

constexpr int LINE = 64;  // bytes, of the cache
constexpr int SUMS = 8;   // kept apart, so that none waits for another

// `bytes` from p on as STREAMS runs read side by side, each AHEAD bytes prefetched (0: not at all).
template <int STREAMS, int AHEAD> Word run(const char *p, int64_t bytes) {
    constexpr int STEP = STREAMS > 1 ? LINE : 4 * LINE;  // of a stream at a time
    const int64_t part = bytes / STREAMS / STEP * STEP;
    Word sums[SUMS] = {};
    for (int64_t i = 0; i < part; i += STEP) {
#pragma GCC unroll 8
        for (int s = 0; s < STREAMS; s++)
#pragma GCC unroll 16
            for (int j = 0; j < STEP; j += REGISTER) {
                const char *q = p + s * part + i + j;
                if (AHEAD && j % LINE == 0) __builtin_prefetch(q + AHEAD, 0, 0);
                Word word;
                memcpy(&word, q, REGISTER);
                sums[(s * STEP + j) / REGISTER % SUMS] ^= word;
            }
    }
    for (int i = 1; i < SUMS; i++) sums[0] ^= sums[i];
    return sums[0];
}

using Way = Word (*)(const char *, int64_t);
constexpr Way WAYS[] = {run<1, 0>, run<1, 1024>, run<1, 4096>, run<2, 2048>, run<4, 0>, run<4, 1024>, run<8, 512>};

}  // namespace

// How many ways there are. With a way given: reads nearly all of `bytes` at p by so many threads, a part each; what is
// read is folded into *out, so that no compiler leaves it out.
extern "C" int llama_dist_read(const void *p, int64_t bytes, int way, int threads, uint64_t *out) {
    constexpr int n_ways = sizeof WAYS / sizeof *WAYS;
    if (way < 0 || way >= n_ways) return n_ways;
    uint64_t folded = 0;
#pragma omp parallel for schedule(static, 1) num_threads(threads) reduction(^ : folded)
    for (int t = 0; t < threads; t++) {
        const int64_t part = bytes / threads / 4096 * 4096;
        const Word word = WAYS[way](static_cast<const char *>(p) + t * part, part);
        for (int i = 0; i < REGISTER / 8; i++) folded ^= word[i];
    }
    *out = folded;
    return n_ways;
}
