// Has memory that was not used before given to this process by all threads at once: the kernel clears each page when
// it is first written to, and in a virtual machine the host may have to find it first.
#include <cstdint>

// A byte of each page from p on is written, with what it holds; each thread takes one run of pages, as the threads that
// multiply take one run of a weight.
extern "C" int llama_dist_touch(char *p, int64_t bytes, int threads) {
    constexpr int64_t PAGE = 4096;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t at = 0; at < bytes; at += PAGE) {
        volatile char *byte = p + at;
        *byte = *byte;
    }
    return 0;
}
