// Where the threads of a team wait for each other between two operations: for so short a time that spinning is cheapest.
#pragma once

#include <sched.h>

#include <atomic>

#include "coming.h"
#include "pause.h"

namespace {

constexpr int SPINS = 1000;  // of some 30 ns; from then on others may have this core
constexpr int CALLS = 512;    // of lines called in while waiting, of some 25 to 200 ns; likewise

struct Meeting {
    alignas(128) std::atomic<int> here{0};
    alignas(128) std::atomic<unsigned> turn{0};
};

// Return when all `threads` have come; each then sees what the others wrote before. Meanwhile `coming` is called in.
inline void meet(Meeting &m, int threads, Coming &coming) {
    const unsigned turn = m.turn.load(std::memory_order_relaxed);
    if (m.here.fetch_add(1, std::memory_order_acq_rel) + 1 == threads) {
        m.here.store(0, std::memory_order_relaxed);
        m.turn.store(turn + 1, std::memory_order_release);
        return;
    }
    for (int spins = 0, calls = 0; m.turn.load(std::memory_order_acquire) == turn;)
        if (coming.call()) {
            if (++calls % CALLS == 0) sched_yield();
        } else {
            spins++ < SPINS ? pause_briefly() : (void)sched_yield();
        }
}

}  // namespace
