// The partial sums of one tile, merged as units come: a node of the tree is (level, index at that level).
#pragma once
#include <cstdint>

constexpr int MAX_ROOTS = 64;

template <class V> struct TreeOf {
    V values[MAX_ROOTS];
    int level[MAX_ROOTS];
    int64_t index[MAX_ROOTS];
    int size = 0;

    inline void push(V v, int64_t unit) {
        int l = 0;
        while (size && level[size - 1] == l && (unit & 1) && index[size - 1] == unit - 1) {
            v = values[--size] + v;
            unit >>= 1;
            l++;
        }
        values[size] = v, level[size] = l, index[size++] = unit;
    }
};
