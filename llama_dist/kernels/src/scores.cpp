// Logprobs of rows of logits: of one token each, and of its likeliest. A row's bits are a function of its own numbers alone.
#include "likely.h"

namespace {

// As kernels/scores.py packs it.
struct Score {
    const void *row;
    int64_t is_bf16, token, top;
};

template <class T> void score(const Score &s, int64_t n, float *of_token, int64_t *tops, float *of_tops) {
    const T *x = static_cast<const T *>(s.row);
    const double greatest = number(x + likeliest_of(x, n).at);
    const double whole = std::log(weigh(x, n, greatest, 1.0, [](int64_t, Lanes) {}));
    auto logprob = [&](int64_t token) { return float(number(x + token) - greatest - whole); };
    *of_token = logprob(s.token);
    if (!s.top) return;
    for (int64_t token : likeliest_few(x, n, std::min(n, s.top))) *tops++ = token, *of_tops++ = logprob(token);
}

}  // namespace

// Of row i, n logits: of_token[i], and tops and of_tops [m, most], of which min(n, top) are written.
extern "C" int llama_dist_scores(const Score *scores, int64_t m, int64_t n, int64_t most, float *of_token, int64_t *tops,
                                 float *of_tops, int threads) {
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (threads > 1 && m > 1)
    for (int64_t i = 0; i < m; i++)
        scores[i].is_bf16 ? score<bf16>(scores[i], n, of_token + i, tops + i * most, of_tops + i * most)
                          : score<float>(scores[i], n, of_token + i, tops + i * most, of_tops + i * most);
    return 0;
}
