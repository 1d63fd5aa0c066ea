// Room for rows of x and for the sums of many rows and panels, in lines of the cache.
#pragma once

#include <algorithm>
#include <vector>

#include "rows.h"

namespace {

constexpr int MOST_ROOTS = 64;

struct alignas(64) Line {  // of the cache: AMX takes twice as long for rows that share two
    float numbers[WIDTH];
};

// The sums of some rows and panels, merged as units come: a node of the tree is (level, index at that level).
struct Roots {
    std::vector<Lanes> room;
    int64_t each = 0, index[MOST_ROOTS];
    int level[MOST_ROOTS], size = 0;

    void start(int64_t sums) { each = sums, size = 0; }
    Lanes *plane(int at) { return room.data() + at * each; }
    Lanes *next(bool zeros) {  // where a unit's sums are to be added up
        if (int64_t(room.size()) < (size + 1) * each) room.resize((size + 1) * each);
        if (zeros) std::fill_n(plane(size), each, all(0.0f));
        return plane(size);
    }
    void push(int64_t unit) {
        int l = 0;
        for (; size && level[size - 1] == l && (unit & 1) && index[size - 1] == unit - 1; l++, unit >>= 1, size--) {
            Lanes *left = plane(size - 1), *right = plane(size);
            for (int64_t i = 0; i < each; i++) left[i] = left[i] + right[i];
        }
        level[size] = l, index[size++] = unit;
    }
    void add() {  // no tree: a unit's sums to those of the units before
        for (int64_t i = 0; size && i < each; i++) plane(0)[i] = plane(0)[i] + plane(1)[i];
        size = 1;
    }
};

}  // namespace
