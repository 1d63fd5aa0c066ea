// The token that engine/sampler.py draws from a row of logits, found without sorting the row and with next to no logarithms.
// What that file computes is the definition. Where rounding could decide otherwise here, the answer is UNSURE and it decides.
//
// The draw is the greatest of logit / temperature + noise among the tokens that the filters keep. Noise is found by bounds: a
// hash that ends v below the greatest gives at most -log(v), so most tokens are out by one product. Filters keep the likeliest
// tokens up to some place: the greatest of all is drawn if it is kept, else only tokens likelier than it are in question.
#include "draw.h"

#include "likely.h"

namespace {

constexpr int64_t MOST_K = 256;      // of top_k; for more the definition serves
constexpr double MASS = 1e-4;        // far more than a sum of floats is off
constexpr double NOISE = 1e-9;       // far more than two logarithms are off
constexpr double SMALLEST = 1e-6;    // of |logit / temperature|: of smaller ones two may differ and be as likely
constexpr float SLACK = 1.001f;      // more than a weight is off

double gumbel(uint64_t key, uint64_t token) {
    return -std::log(-std::log((double(hash(key, token) >> 11) + 0.5) * 0x1p-53));
}

// The greatest so far, and how far the next is below it.
struct Best {
    double value = -INFINITY, next = -INFINITY;
    int64_t token = UNSURE;

    void offer(int64_t at, double x) {
        if (x > value)
            next = value, value = x, token = at;
        else if (x > next)
            next = x;
    }
    bool sure() const { return value - next > NOISE + 1e-15 * std::fabs(value); }
};

template <class T> struct Row {
    const Draw &d;
    const T *x;
    int64_t n, likeliest = 0;
    double greatest;
    std::vector<float> &weights;  // exp((x - greatest) / temperature), then zeros up to whole lanes

    double scaled(int64_t at) const { return number(x + at) / d.temperature; }
    bool as_likely(int64_t at) const { return std::fabs(number(x + at)) < SMALLEST * d.temperature; }
    bool before(int64_t a, int64_t b) const { return likelier(x, a, b); }
    void offer(int64_t at, Best &best) const { best.offer(at, scaled(at) + gumbel(d.key, at)); }

    // The weight of all tokens before `token`.
    double weight_before(int64_t token) const {
        const Lanes here = all(float(number(x + token)));
        const int64_t low = token / WIDTH * WIDTH, high = low + WIDTH;
        double weight = 0;
        for (int64_t at = low; at < std::min(n, high); at++)
            if (before(at, token)) weight += weights[at];
        weight += lanes_total(0, low, [&](int64_t at) { return pick(load(x + at) < here, all(0.0f), load(weights.data() + at)); });
        return weight + lanes_total(high, n, [&](int64_t at) {
                   return pick(here < load(x + at, n - at), load(weights.data() + at), all(0.0f));
               });
    }

    // The greatest with noise, of all tokens or of those before `limit`.
    Best noisiest(int64_t limit) const {
        Best best;
        offer(likeliest, best);
        auto bar = [&] { return float(std::exp(best.value - greatest / d.temperature) * 0x1p-31); };
        float out = bar();
        for (int64_t start = 0; start < n; start += WIDTH) {
            const float *weight = weights.data() + start;
            int32_t below[WIDTH];  // the greatest hash, less this one's, in parts of 2^-31
            for (int i = 0; i < WIDTH; i++) below[i] = int32_t(~hash(d.key, start + i) >> 33);
            int any = 0;
            for (int i = 0; i < WIDTH; i++) any |= float(below[i]) * out <= weight[i] * SLACK;
            for (int i = 0; any && i < std::min<int64_t>(WIDTH, n - start); i++) {
                const int64_t at = start + i;
                if (!(float(below[i]) * out <= weight[i] * SLACK) || at == likeliest) continue;
                if (limit >= 0 && !before(at, limit)) continue;
                offer(at, best);
                out = bar();
            }
        }
        return best;
    }

    // Whether min_p keeps the token: 1, 0 or UNSURE.
    int64_t is_likely(int64_t at) const {
        if (d.min_p <= 0 || number(x + at) == greatest) return 1;
        const double share = std::exp(scaled(at) - greatest / d.temperature);
        if (!(std::fabs(share - d.min_p) > NOISE)) return UNSURE;
        return share > d.min_p;
    }

    int64_t among_all() {
        weights.resize((n + WIDTH - 1) / WIDTH * WIDTH);
        const double whole = weigh(x, n, greatest, d.temperature, [&](int64_t at, Lanes e) { store(weights.data() + at, e); });
        for (int64_t limit = -1;;) {
            const Best best = noisiest(limit);
            if (!best.sure()) return UNSURE;
            if (best.token == likeliest) return likeliest;
            int64_t kept = is_likely(best.token);
            if (d.top_p < 1 && kept == 1) {
                const double mass = weight_before(best.token) / whole;
                if (as_likely(best.token) || !(std::fabs(mass - d.top_p) > MASS)) return UNSURE;
                kept = mass < d.top_p;
            }
            if (kept) return kept == UNSURE ? UNSURE : best.token;
            limit = best.token;
        }
    }

    int64_t among_few() const {
        const std::vector<int64_t> few = likeliest_few(x, n, d.top_k);
        double whole = 0, mass = 0;
        std::vector<double> share;
        for (int64_t at : few) {
            share.push_back(std::exp(scaled(at) - greatest / d.temperature));
            whole += share.back();
            if (as_likely(at)) return UNSURE;
        }
        Best best;
        for (size_t i = 0; i < few.size(); mass += share[i++]) {
            if (d.top_p < 1 && i) {
                if (!(std::fabs(mass / whole - d.top_p) > NOISE)) return UNSURE;
                if (mass / whole > d.top_p) break;
            }
            const int64_t likely = is_likely(few[i]);
            if (likely == UNSURE) return UNSURE;
            if (!likely) break;
            offer(few[i], best);
        }
        return best.sure() ? best.token : UNSURE;
    }

    int64_t draw() {
        likeliest = likeliest_of(x, n).at;
        greatest = number(x + likeliest);
        if (d.temperature == 0) return likeliest;
        if (!(std::fabs(greatest) < INFINITY)) return UNSURE;
        if (d.top_k <= 0 || d.top_k >= n) return among_all();
        return d.top_k <= MOST_K ? among_few() : UNSURE;
    }
};

template <class T> int64_t draw(const Draw &d, int64_t n) {
    static thread_local std::vector<float> weights;
    return Row<T>{d, static_cast<const T *>(d.row), n, 0, 0, weights}.draw();
}

}  // namespace

extern "C" int llama_dist_draw(const Draw *draws, int64_t m, int64_t n, int64_t *found, int threads) {
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (threads > 1 && m > 1)
    for (int64_t i = 0; i < m; i++) found[i] = draws[i].is_bf16 ? draw<bf16>(draws[i], n) : draw<float>(draws[i], n);
    return 0;
}
