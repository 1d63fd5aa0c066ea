// The one binary tree in which sums by unit are taken; tree.py says which.
#pragma once
#include "rows.h"

namespace {

constexpr int DEEPEST = 64;  // more values never wait for their neighbours

// The sum of n values, nodes [n, 2] of the tree, in order: value(i) gives the lanes of the i-th.
template <class F>
INLINE Lanes tree(const int64_t *nodes, long n, F value) {
    Lanes values[DEEPEST];
    int64_t level[DEEPEST], index[DEEPEST];
    int size = 0;
    auto merge = [&](bool end) {
        while (size > 1) {
            int64_t &low = level[size - 1], &high = level[size - 2];
            if (end) index[size - 1] >>= high - low, low = high;  // without a right sibling it stands for its parent
            if (low != high || index[size - 1] % 2 == 0 || index[size - 2] != index[size - 1] - 1) return;
            values[size - 2] = values[size - 2] + values[size - 1];
            size--;
            level[size - 1]++, index[size - 1] >>= 1;
        }
    };
    for (long i = 0; i < n; i++) {
        values[size] = value(i);
        level[size] = nodes[2 * i], index[size] = nodes[2 * i + 1], size++;
        merge(false);
    }
    while (size > 1) merge(true);
    return values[0];
}

}  // namespace
