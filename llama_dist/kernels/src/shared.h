// Rounds among the ranks of one host, in a segment of memory that all of them have mapped.
//
// In a round each rank puts a piece into its slot, raises its flag, waits for the flags of all the others and reads what
// it wants of the slots. Two sets of slots take turns: who has entered a round has read the last but one to its end, so
// its slots are free again when all flags have been seen once more.
#pragma once
#include <linux/futex.h>
#include <sched.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <atomic>
#include <climits>
#include <cstdint>
#include <cstring>

#include "coming.h"
#include "pause.h"

namespace {

constexpr long LINE = 128;  // bytes that processors fetch together
constexpr int64_t SPIN = 50'000, YIELD = 500'000, SLEEP = 50'000'000;  // nanoseconds; see wait_long
constexpr int BROKEN_OFF = 1 << 20;

// What one rank tells the others.
struct alignas(LINE) Place {
    std::atomic<uint32_t> flag;      // the rounds it has entered
    std::atomic<uint32_t> sleepers;  // how many others sleep until the flag moves
    std::atomic<uint32_t> broken;    // it is not to wait any longer
    int64_t bytes[2];                // how much it has for this round and had for the last
};

struct alignas(LINE) Segment {
    int64_t n_ranks, capacity, timeout, spin, yield;  // bytes of a slot; nanoseconds

    Place *place(long rank) { return (Place *)(this + 1) + rank; }
    char *slot(uint32_t round, long rank) {
        return (char *)place(n_ranks) + ((round & 1) * n_ranks + rank) * capacity;
    }
};

static inline int64_t nanoseconds() {
    timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * int64_t(1'000'000'000) + t.tv_nsec;
}

static inline bool has_come(Place *other, uint32_t flag) {
    return int32_t(other->flag.load(std::memory_order_acquire) - flag) >= 0;
}

// Spin while the other is likely to be at work on another core; then let others have this one; then sleep. There may be
// more ranks than cores, and one may wait long for what only another does. While it spins, it calls in what is `coming`.
static int wait_long(Segment *s, int rank, int other, uint32_t flag, int64_t &deadline, Coming *coming) {
    Place *me = s->place(rank), *it = s->place(other);
    const int64_t began = nanoseconds();
    if (!deadline) deadline = began + s->timeout;
    for (;;) {
        for (int i = 0; i < 32; i++) {
            if (has_come(it, flag)) return 0;
            if (!coming || !coming->call()) pause_briefly();
        }
        const int64_t now = nanoseconds();
        if (now - began < s->spin) continue;
        if (me->broken.load(std::memory_order_relaxed)) return BROKEN_OFF;
        if (now > deadline) return 1 + other;
        if (now - began < s->yield) {
            sched_yield();
            continue;
        }
        it->sleepers.fetch_add(1);
        const uint32_t seen = it->flag.load();
        const timespec limit = {0, long(SLEEP)};
        if (int32_t(seen - flag) < 0) syscall(SYS_futex, &it->flag, FUTEX_WAIT, seen, &limit, nullptr, 0);
        it->sleepers.fetch_sub(1);
    }
}

// The round that this rank is about to enter, and where its piece goes.
static inline uint32_t next_round(Segment *s, int rank) { return s->place(rank)->flag.load(std::memory_order_relaxed); }

// Enter `round` with `bytes` in this rank's slot; return when all have: 0, or 1 + the rank that has not come in time, or
// BROKEN_OFF. The slots of the round may be read until the next is entered.
static inline int enter(Segment *s, int rank, uint32_t round, long bytes, Coming *coming) {
    Place *me = s->place(rank);
    me->bytes[round & 1] = bytes;
    me->flag.exchange(round + 1);  // a full barrier: sleepers are looked at after it
    if (me->sleepers.load()) syscall(SYS_futex, &me->flag, FUTEX_WAKE, INT_MAX, nullptr, nullptr, 0);
    int64_t deadline = 0;  // for all of them together; set when the first wait is not over at once
    for (int other = 0; other < s->n_ranks; other++)
        if (!has_come(s->place(other), round + 1))
            if (int fault = wait_long(s, rank, other, round + 1, deadline, coming)) return fault;
    return 0;
}

// As enter; -1 - the first rank whose piece is of another size.
static inline int enter_alike(Segment *s, int rank, uint32_t round, long bytes, Coming *coming = nullptr) {
    if (int fault = enter(s, rank, round, bytes, coming)) return fault;
    for (int other = 0; other < s->n_ranks; other++)
        if (s->place(other)->bytes[round & 1] != bytes) return -1 - other;
    return 0;
}

}  // namespace

// x [n], of float or bf16, becomes the sum over the ranks: in float, in the order of ranks, rounded once. Every rank gets
// the same bits. Returns what enter_alike does; after a fault the segment is of no use any more.
int shared_sum(void *segment, int rank, int is_bf16, void *x, long n, Coming *coming);

// y [numbers], of float or bf16, becomes the sum of all ranks' planes [counts[rank], numbers], `plane` floats apart, in the
// tree of tree.py; nodes [sum of counts, 2] are what they hold, in the order of ranks. Returns as the other.
int shared_planes(void *segment, int rank, const float *planes, long plane, const int64_t *counts, const int64_t *nodes,
                  int is_bf16, void *y, long numbers, Coming *coming);

// found [m]: of each row's n numbers, this rank's, the first of the greatest, or -1; it becomes that of all ranks' numbers, one
// rank's after the other's, of which this one's are number `first` and on: -1 where a rank has -1. Returns as the others.
int shared_likeliest(void *segment, int rank, int is_bf16, const void *rows, long stride, long m, long n, long first,
                     int64_t *found, Coming *coming);

// out [rows, n_ranks, bytes] of each rank's x [rows, bytes]. Returns as the others.
extern "C" int llama_dist_shared_gather(void *segment, int rank, const char *x, long rows, long bytes, char *out);
