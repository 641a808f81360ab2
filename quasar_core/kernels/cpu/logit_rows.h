// What quantizing asks of whole rows of logits in float32: how two models' distributions differ, the likeliest tokens, and a
// draw.

#pragma once

#include <cmath>
#include <limits>
#include <vector>

#include "lanes.h"

namespace quasar {

constexpr float LEAST_LOGIT = -std::numeric_limits<float>::max();

// A row's logits, sixteen at a time; beyond its end stands what no logit is below.
struct LogitRow {
    const float* logits;
    int size;
    Floats at(int i) const {
        if (i + LANES <= size) return load(logits + i);
        const Lanes there = first_lanes(size - i);
        return select(there, load(logits + i, there), LEAST_LOGIT);
    }
};

// The best logit, the first place that has it, and the next best: equal to it where two share the first place.
struct Best {
    float first, second;
    int place = 0;
    explicit Best(const LogitRow& row) {
        Floats firsts = LEAST_LOGIT, seconds = LEAST_LOGIT;
        for (int i = 0; i < row.size; i += LANES) {
            const Floats x = row.at(i);
            seconds = larger(seconds, smaller(firsts, x));
            firsts = larger(firsts, x);
        }
        float each[2][LANES];
        store(each[0], firsts), store(each[1], seconds);
        first = second = LEAST_LOGIT;
        for (const auto& lanes : each)
            for (float x : lanes) second = std::max(second, std::min(first, x)), first = std::max(first, x);
        while (place + 1 < row.size && row.logits[place] != first) ++place;
    }
};

// Logits less the best, none so low that its exponential is none.
inline Floats below(const LogitRow& row, int i, const Best& best) { return larger(-104.0f, row.at(i) - best.first); }

constexpr int COMPARED = 7;  // numbers of a row

// Of target p and verifier q at one position: KL(p ‖ q), Σ min(p, q), the negative log of both for `token`, the best place of
// either, and by how much q's best logit leads.
inline void compare_rows(const LogitRow& p, const LogitRow& q, int64_t token, float* to) {
    const Best best_p(p), best_q(q);
    Floats sums_p = 0.0f, sums_q = 0.0f, weighed = 0.0f;
    for (int i = 0; i < p.size; i += LANES) {
        const Floats x = below(p, i, best_p), y = below(q, i, best_q), own = exponential(x);
        sums_p = sums_p + own;
        sums_q = sums_q + exponential(y);
        weighed = fused(own, x - y, weighed);
    }
    const float sum_p = sum_of(sums_p), sum_q = sum_of(sums_q);
    const float log_p = std::log(sum_p), log_q = std::log(sum_q);
    Floats shared = 0.0f;
    for (int i = 0; i < p.size; i += LANES)
        shared = shared + smaller(exponential(below(p, i, best_p)) * (1 / sum_p), exponential(below(q, i, best_q)) * (1 / sum_q));
    to[0] = sum_of(weighed) / sum_p - log_p + log_q;
    to[1] = sum_of(shared);
    to[2] = best_p.first - p.logits[token] + log_p;
    to[3] = best_q.first - q.logits[token] + log_q;
    to[4] = float(best_p.place), to[5] = float(best_q.place);
    to[6] = best_q.first - best_q.second;
}

// The likeliest tokens of a row, best first and of equals the first, and their chances.
inline void likeliest(const LogitRow& row, int width, int64_t* tokens, float* chances) {
    int held = 0;
    float least = -std::numeric_limits<float>::infinity();
    for (int i = 0; i < row.size; i += LANES) {
        const Floats x = row.at(i);
        if (held == width && !is_less(least, x)) continue;
        for (int place = i; place < std::min(i + LANES, row.size); ++place) {
            const float logit = row.logits[place];
            if (held == width && !(logit > least)) continue;
            int at = held < width ? held++ : width - 1;
            for (; at > 0 && chances[at - 1] < logit; --at) chances[at] = chances[at - 1], tokens[at] = tokens[at - 1];
            chances[at] = logit, tokens[at] = place;
            if (held == width) least = chances[width - 1];
        }
    }
    const float best = chances[0];
    Floats sums = 0.0f;
    for (int i = 0; i < row.size; i += LANES) sums = sums + exponential(row.at(i) - best);
    const float scale = 1 / sum_of(sums);
    for (int at = 0; at < width; ++at) chances[at] = std::exp(chances[at] - best) * scale;
}

constexpr int SUMMED = 256;  // tokens whose chances are summed by themselves

// Σ exp(x − best) over the tokens of a span.
inline double span_sum(const LogitRow& row, int begin, float best) {
    Floats sums = 0.0f;
    for (int i = begin; i < std::min(begin + SUMMED, row.size); i += LANES) sums = sums + exponential(row.at(i) - best);
    return sum_of(sums);
}

// The token at which the running sum of the softmax passes `chance`, in [0, 1). `sums` holds a number for each span.
inline int64_t draw(const LogitRow& row, double chance, std::vector<double>& sums) {
    Floats bests = LEAST_LOGIT;
    for (int i = 0; i < row.size; i += LANES) bests = larger(bests, row.at(i));
    float each[LANES], best = LEAST_LOGIT;
    store(each, bests);
    for (float x : each) best = std::max(best, x);

    double total = 0;
    for (size_t span = 0; span < sums.size(); ++span) total += sums[span] = span_sum(row, int(span) * SUMMED, best);
    double left = chance * total;  // of a goal: what spans and tokens in front of a place leave of it
    size_t span = 0, last = 0;
    for (size_t i = 0; i < sums.size(); ++i)
        if (sums[i] > 0) last = i;
    for (; span < last && left >= sums[span]; ++span) left -= sums[span];

    int64_t token = 0;
    for (int i = int(span) * SUMMED; i < std::min(int(span + 1) * SUMMED, row.size); i += LANES) {
        store(each, exponential(row.at(i) - best));
        for (int lane = 0; lane < LANES && i + lane < row.size; ++lane) {
            if (!(each[lane] > 0)) continue;
            token = i + lane;  // no further than the last that adds something
            if (left < each[lane]) return token;
            left -= each[lane];
        }
    }
    return token;
}

}  // namespace quasar
