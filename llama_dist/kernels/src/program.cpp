// A list of kernels run by one team of threads in one call: the forward pass of a few rows, without a Python call, a new
// tensor or a new parallel region for each of its operations.
#include "program.h"

#include <omp.h>

#include <algorithm>
#include <chrono>
#include <vector>

#include "coming.h"
#include "meet.h"
#include "rows.h"
#include "shared.h"
#include "team.h"
#include "tree.h"

namespace {

constexpr int64_t FEW = 16;  // rows of products that take as long as weights are read

// y = the sum of planes [n_planes][n, dim] of floats in the tree of tree.py, whose nodes they are, in its type.
template <class T>
void add_planes(const float *planes, long plane, const int64_t *nodes, long n_planes, T *y, long numbers) {
    constexpr long PART = 4096;
#pragma omp for schedule(static) nowait
    for (long part = 0; part < (numbers + PART - 1) / PART; part++)
        for (long at = part * PART; at < std::min(numbers, (part + 1) * PART); at += WIDTH) {
            auto value = [&](long p) { return load(planes + p * plane + at, numbers - at); };
            store(y + at, tree(nodes, n_planes, value), numbers - at);
        }
}

// How each attention is dealt out: alike ones have one plan.
struct Plans {
    std::vector<std::pair<const Op *, std::shared_ptr<const team::Plan>>> plans;

    Plans(const Op *ops, int64_t n_ops, const Step &step, int threads) {
        for (const Op *op = ops; op < ops + n_ops; op++)
            if (op->kind == Op::ATTEND && !find(*op))
                plans.emplace_back(op, team::plan_attention(int(step.is_bf16), step.tables, int(step.max_pages), step.starts,
                                                            step.lengths, int(step.spans), of_query(*op), int(op->v[5]),
                                                            int(op->v[6]), int(op->v[7]), int(op->v[8]), threads));
    }
    static const int *of_query(const Op &op) { return reinterpret_cast<const int *>(op.v[4]); }
    const team::Plan *find(const Op &op) const {
        for (const auto &[other, plan] : plans)  // heads, KV heads, their size and window, and who reads what
            if (std::equal(op.v + 5, op.v + 9, other->v + 5) &&
                std::equal(of_query(op), of_query(op) + op.v[5], of_query(*other)))
                return plan.get();
        return nullptr;
    }
    const team::Plan &of(const Op &op) const { return *find(op); }
};

// Called by every thread of the team. `fault` is what a round among ranks ended with; after one there is no other.
void run_one(const Op &op, const Step &step, const Plans &plans, int threads, int &fault, Coming &coming) {
    const int64_t *v = op.v;
    auto p = [&](int i) { return reinterpret_cast<void *>(v[i]); };
    const int bf16s = int(step.is_bf16);
    switch (op.kind) {
        case Op::NORM: {
            float eps;
            memcpy(&eps, &v[9], sizeof eps);
            team::rms_norm(bf16s, p(0), v[1], p(2), v[3], p(4), p(5), p(6), v[7], step.n, v[8], v[10], eps);
            break;
        }
        case Op::PACKED:
            team::quantized(bf16s, p(0), v[1], *static_cast<const team::Packed *>(p(2)), p(3), p(4), v[5], v[6], int(v[7]),
                            step.n, v[8], v[9], threads, &coming);
            break;
        case Op::ROPE:
            team::rope_write(bf16s, p(0), v[1], p(2), v[3], p(4), v[5], step.cos, step.sin, step.angles, p(6), p(7),
                             step.n_slots, step.slots, step.n, v[8], v[9], v[10]);
            break;
        case Op::ATTEND:
            team::attend(plans.of(op), p(0), v[1], p(2), p(3), step.n_slots, p(9));
            break;
        case Op::GATE:
            team::silu_mul(bf16s, p(0), v[1], p(2), v[3], p(4), step.n, v[5]);
            break;
        case Op::PLANES:
            if (bf16s)
                add_planes(static_cast<const float *>(p(0)), v[1], static_cast<const int64_t *>(p(2)), v[3],
                           static_cast<bf16 *>(p(4)), step.n * v[5]);
            else
                add_planes(static_cast<const float *>(p(0)), v[1], static_cast<const int64_t *>(p(2)), v[3],
                           static_cast<float *>(p(4)), step.n * v[5]);
            break;
        case Op::SHARED_SUM:
#pragma omp single nowait
            if (!fault) fault = shared_sum(p(0), int(v[1]), bf16s, p(2), step.n * v[3], &coming);
            break;
        case Op::SHARED_PLANES:
#pragma omp single nowait
            if (!fault)
                fault = shared_planes(p(0), int(v[1]), static_cast<const float *>(p(2)), v[3], static_cast<const int64_t *>(p(4)),
                                      static_cast<const int64_t *>(p(5)), bf16s, p(6), step.n * v[7], &coming);
            break;
        case Op::EMBED:
            team::look_up(bf16s, p(0), v[1], v[2], v[3], v[4], v[5], step.tokens, step.n, v[6], p(7));
            break;
        case Op::LIKELIEST:
            team::likeliest(bf16s, p(0), v[1], step.n, v[2], static_cast<int64_t *>(p(3)));
            break;
        case Op::SHARED_LIKELIEST:
#pragma omp single nowait
            if (!fault)
                fault = shared_likeliest(p(0), int(v[1]), bf16s, p(2), v[3], step.n, v[4], v[5], static_cast<int64_t *>(p(6)),
                                         &coming);
            break;
    }
}

// Whether the first operation is a product of many rows and the second takes all that it makes: these may be done as one.
bool handed_on(const Op *ops, const Step &step, Op::Kind second) {
    const int64_t *v = ops[0].v;
    return ops[0].kind == Op::PACKED && ops[1].kind == second && ops[1].v[0] == v[4] && !v[3] &&
           team::in_tiles(int(step.is_bf16), *reinterpret_cast<const team::Packed *>(v[2]), step.n);
}

// Where the second is the gate of what the first makes: from which row of W on those are that it is multiplied by; else 0.
int64_t gate_of(const Op *ops, const Step &step) {
    if (!handed_on(ops, step, Op::GATE) || ops[0].v[9] >= 0) return 0;
    const int64_t up = (ops[1].v[2] - ops[1].v[0]) / int64_t(sizeof(bf16));
    return up % WIDTH ? 0 : up;
}

// What this thread reads first of the product after operation `at`, whose number `at` becomes; after the last product, what it
// reads first of the first one, as there is likely to be another run.
Coming coming_after(const Op *ops, int64_t n_ops, const Step &step, int threads, int64_t &at) {
    auto product = [&](int64_t from) {
        while (from < n_ops && ops[from].kind != Op::PACKED) from++;
        return from;
    };
    at = product(at + 1);
    const int64_t it = at < n_ops ? at : product(0);
    if (it == n_ops) return {};
    const int64_t *v = ops[it].v;
    const auto &w = *reinterpret_cast<const team::Packed *>(v[2]);
    const int thread = omp_get_thread_num();
    if (team::in_tiles(int(step.is_bf16), w, step.n)) {
        const int64_t up = it + 1 < n_ops ? std::max<int64_t>(0, gate_of(ops + it, step)) : 0;
        return team::coming_tiles(w, step.n, up ? ops[it + 1].v[5] : v[8], v[9], up, thread, threads);
    }
    return step.n > FEW ? Coming{} : team::coming(w, step.n, v[8], thread, threads);
}

// Whether the first two operations are done as one, which they are here: a product of many rows with the sum of its planes, or
// with the gate. What the one hands to the other is not written then; nothing else may read it.
bool run_two(const Op *ops, const Step &step, int threads, Coming &coming) {
    const int64_t *v = ops[0].v, *next = ops[1].v;
    auto p = [](int64_t at) { return reinterpret_cast<void *>(at); };
    auto w = [&]() -> const team::Packed & { return *static_cast<const team::Packed *>(p(v[2])); };
    if (handed_on(ops, step, Op::PLANES)) {
        team::total(p(v[0]), v[1], w(), p(next[4]), next[5], step.n, v[8], v[9], threads, &coming);
        return true;
    }
    const int64_t up = gate_of(ops, step);
    if (up > 0) team::gated(p(v[0]), v[1], w(), up, p(next[4]), next[5], step.n, next[5], threads, &coming);
    return up > 0;
}

}  // namespace

extern "C" int llama_dist_program(const Op *ops, int64_t n_ops, const Step *step, int threads, int *lost) {
    auto within = [](int64_t at, int64_t size) { return at >= 0 && at < size; };
    for (int64_t i = 0; i < step->n; i++)
        if (!within(step->tokens[i], step->vocab) || !within(step->slots[i], step->n_slots) ||
            !within(step->angles[i], step->n_angles))
            return -int(i) - 1;
    if (int bad = team::bad_span(step->n_slots, step->tables, int(step->max_pages), step->starts, step->lengths,
                                 int(step->spans)))
        return bad;
    const Plans plans(ops, n_ops, *step, threads);
    int fault = 0;
    Meeting meeting;
    auto since = std::chrono::steady_clock::now();
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        Coming coming;
        for (int64_t i = 0, next = 0; i < n_ops; i++) {
            if (i >= next) coming = coming_after(ops, n_ops, *step, threads, next);
            const int64_t clock = ops[i].clock;
            if (i + 1 < n_ops && run_two(ops + i, *step, threads, coming))
                i++;
            else
                run_one(ops[i], *step, plans, threads, fault, coming);
            meet(meeting, omp_get_num_threads(), coming);
            if (!step->seconds) continue;
#pragma omp master
            {
                const auto now = std::chrono::steady_clock::now();
                step->seconds[clock] += std::chrono::duration<double>(now - since).count();
                since = now;
            }
        }
    }
    *lost = fault;
    return 0;
}
