// Has memory that was not used before given to this process by all threads at once: the kernel clears each page when
// it is first written to, and in a virtual machine the host may have to find it first.
#include <sys/mman.h>

#include <algorithm>
#include <cstdint>

#ifndef MADV_POPULATE_WRITE  // Linux 5.14; before it there is only writing, which what is there already would not survive
#define MADV_POPULATE_WRITE 23
#endif

// All pages of `bytes` from p on; what they hold stays. Each thread takes one run of large pages, as the threads that multiply
// take one run of a weight. Returns 0, or 1 where the kernel cannot.
extern "C" int llama_dist_touch(char *p, int64_t bytes, int threads) {
    constexpr uintptr_t PAGE = 4096, LARGE = 1 << 21;
    const uintptr_t begin = uintptr_t(p), end = begin + uintptr_t(bytes);
    int failed = 0;
#pragma omp parallel for schedule(static, 1) num_threads(threads) reduction(| : failed) if (threads > 1)
    for (int t = 0; t < threads; t++) {
        auto cut = [&](int64_t t) { return std::clamp((begin + bytes * t / threads) / LARGE * LARGE, begin / PAGE * PAGE, end); };
        const uintptr_t from = cut(t), to = t + 1 < threads ? cut(t + 1) : end;
        if (from < to) failed |= madvise((void *)from, to - from, MADV_POPULATE_WRITE) != 0;
    }
    return failed;
}
