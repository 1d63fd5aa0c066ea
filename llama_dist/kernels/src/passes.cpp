// Several runs of a program in one call, each of the tokens that the last has found or drawn.
#include <algorithm>
#include <vector>

#include "draw.h"
#include "program.h"
#include "rows.h"
#include "shared.h"

namespace {

constexpr int64_t LEFT = -2;  // in a token's place: to be drawn by the sampler

// How a sequence's tokens are drawn: what of the noise's key is its seed's, the rest as in draw.h. As kernels/program.py packs
// it.
struct Chance {
    uint64_t key;
    int64_t top_k;
    double temperature, top_p, min_p;
};

// Where the program leaves logits: rows of `width` numbers of this rank's, and room for the rows of all of n_ranks, `whole`.
struct Logits {
    const char *rows;
    int64_t width, n_ranks;
    char *whole;
    void *segment;
    int64_t rank;
};

// As kernels/program.py packs it. With `chances`, one a row, tokens are drawn; else they are the likeliest.
struct Onward {
    int64_t passes;
    const int64_t *likeliest;  // where the program leaves them
    const int64_t *stops;
    int64_t n_stops;
    int64_t *tokens;  // [passes, n], what is found
    const Chance *chances;
    Logits logits;
};

// Draws of all rows whose likeliest token is one; returns what a round among ranks ended with. All ranks must be unsure of the
// same rows: they are of one host, with the same code and the same bits of all logits.
int draw_rows(const Step &step, const Onward &on, int64_t *tokens, int threads) {
    const Logits &logits = on.logits;
    const int64_t size = step.is_bf16 ? 2 : 4, n = step.n;
    const int64_t width = logits.width * size;  // bytes
    const bool parts = logits.n_ranks > 1;
    if (parts)
        if (int fault = llama_dist_shared_gather(logits.segment, logits.rank, logits.rows, n, width, logits.whole)) return fault;
    std::vector<Draw> draws;
    std::vector<int64_t> found(n);
    for (int64_t i = 0; i < n; i++) {
        const Chance &c = on.chances[i];
        const char *row = parts ? logits.whole + i * width * logits.n_ranks : logits.rows + i * width;
        const uint64_t position = uint64_t(step.starts[i]) + 1;  // of the token that is drawn
        const uint64_t key = hash(c.key, position);
        draws.push_back({row, step.is_bf16, c.top_k, key, c.temperature, c.top_p, c.min_p});
    }
    llama_dist_draw(draws.data(), n, step.vocab, found.data(), threads);
    for (int64_t i = 0; i < n; i++)
        if (tokens[i] >= 0 && on.chances[i].temperature != 0) tokens[i] = found[i] == UNSURE ? LEFT : found[i];
    return 0;
}

}  // namespace

// As llama_dist_program, up to `passes` times, in which each span has one token: after the first that which was found. Ends
// early where a row has found none, or one of the stops. `done`: how many passes. The step's arrays are written over.
extern "C" int llama_dist_passes(const Op *ops, int64_t n_ops, const Step *step, const Onward *on, int threads, int *lost,
                                 int64_t *done) {
    const int64_t n = step->n, *stops = on->stops, *last = stops + on->n_stops;
    auto ends = [&](int64_t token) { return token < 0 || std::find(stops, last, token) != last; };
    for (*done = 0; *done < on->passes;) {
        if (int fault = llama_dist_program(ops, n_ops, step, threads, lost)) return fault;
        if (*lost) return 0;
        int64_t *tokens = on->tokens + *done * n;
        std::copy_n(on->likeliest, n, tokens);
        if (on->chances && (*lost = draw_rows(*step, *on, tokens, threads))) return 0;
        if (++*done == on->passes || std::any_of(tokens, tokens + n, ends)) return 0;
        for (int64_t i = 0; i < n; i++) {
            const int64_t at = ++step->starts[i];
            if (at / PAGE >= step->max_pages) return int(i) + 1;
            step->tokens[i] = tokens[i];
            step->angles[i] = at;
            step->slots[i] = step->tables[i * step->max_pages + at / PAGE] * PAGE + at % PAGE;
        }
    }
    return 0;
}
