// A mixture of experts, in the place of an MLP or beside it: only the weights of experts that some token chose are read.
//
// Each token goes through a few places: its chosen experts, best first, and the expert of every token, where there is
// one. Rows of an expert stand beside one another in slots. A row's product does not depend on the rows beside it, and
// a token's outputs are added in the order of its places, so its result is the same whatever else is in the pass.

#pragma once

#include <array>
#include <cmath>
#include <limits>
#include <vector>

#include "elementwise.h"
#include "product_input.h"
#include "team.h"

namespace quasar {

enum Scores { SOFTMAX, CHOSEN, SIGMOID };  // in the order of `cpu_pass.SCORES`

struct Experts {
    int count, chosen, shared;        // experts to choose from, of a token, and of every token (0 or 1)
    int scores, normalised;           // what shares are, and whether those of a token sum to 1
    float scale, added;               // of shares; to the sum that shares which sum to 1 are divided by
    FusedWeight router;               // hidden → count, and one more: the share of the expert of every token
    const float* correction;          // [count], added where experts are chosen, or null
    const FusedWeight *gate_up, *down;  // [count + shared]
    // Beside an MLP, else null: norms [hidden] of what that gives, of what the router and the experts read of the
    // residual stream, and of what they give; factors [count] of shares.
    const float *mlp_out_norm, *router_norm, *norm, *out_norm, *factors;
};

class Routing {
public:
    std::vector<int> active;       // experts that some token goes through, in order
    std::vector<int> first;        // slot of each of them, and the end
    std::vector<int> token, owner;  // of each slot: its token, and its expert's place in `active`
    std::vector<int> slot;         // of each token's places
    std::vector<float> share;      // of each token's places

    void reserve(const Experts& experts, int count) {
        places = experts.chosen + experts.shared;
        const size_t all = size_t(count) * places;
        chosen.resize(all), slot.resize(all), share.resize(all), token.resize(all), owner.resize(all);
    }

    // scores [count, and one more where a share of the expert of every token is learned].
    void choose(const Experts& experts, const float* scores, int t) {
        std::vector<float> odds(scores, scores + experts.count);
        if (experts.scores == SOFTMAX) make_softmax(odds);
        if (experts.scores == SIGMOID)
            for (float& value : odds) value = sigmoid_of(value);
        int* best = chosen.data() + size_t(t) * places;
        float* shares = share.data() + size_t(t) * places;
        find_best(odds, experts.correction, best, experts.chosen);
        for (int j = 0; j < experts.chosen; ++j) shares[j] = odds[best[j]];
        std::vector<float> own(shares, shares + experts.chosen);
        if (experts.scores == CHOSEN) make_softmax(own);
        float sum = 0;
        for (float value : own) sum += value;
        const bool divided = experts.scores != CHOSEN && experts.normalised;
        const float factor = divided ? experts.scale / (sum + experts.added) : experts.scale;
        for (int j = 0; j < experts.chosen; ++j)
            shares[j] = own[j] * factor * (experts.factors ? experts.factors[best[j]] : 1);
        if (experts.shared) {
            best[experts.chosen] = experts.count;
            shares[experts.chosen] = experts.router.out > experts.count ? sigmoid_of(scores[experts.count]) : 1;
        }
    }

    // Gives every place its slot: the rows of an expert in the order of the tokens.
    void group(const Experts& experts, int count) {
        std::vector<int> rows(experts.count + experts.shared, 0), next(rows.size(), 0), place(rows.size(), 0);
        for (int at = 0; at < count * places; ++at) ++rows[chosen[at]];
        active.clear(), first.assign(1, 0);
        for (size_t e = 0; e < rows.size(); ++e)
            if (rows[e]) {
                next[e] = first.back(), place[e] = int(active.size());
                active.push_back(int(e)), first.push_back(next[e] + rows[e]);
            }
        for (int at = 0; at < count * places; ++at) {
            const int e = chosen[at];
            slot[at] = next[e]++;
            token[slot[at]] = at / places, owner[slot[at]] = place[e];
        }
    }

    int rows(size_t i) const { return first[i + 1] - first[i]; }

    int places = 0;

private:
    std::vector<int> chosen;  // experts of each token's places

    static float sigmoid_of(float x) { return 1 / (1 + std::exp(-x)); }

    static void make_softmax(std::vector<float>& values) {
        float largest = -std::numeric_limits<float>::infinity(), sum = 0;
        for (float value : values) largest = std::max(largest, value);
        for (float& value : values) sum += value = std::exp(value - largest);
        for (float& value : values) value /= sum;
    }

    // The largest, the first of equal ones first; where none is a number, the first that are left.
    static void find_best(const std::vector<float>& odds, const float* correction, int* best, int wanted) {
        std::vector<char> taken(odds.size(), 0);
        for (int j = 0; j < wanted; ++j) {
            int found = -1;
            float highest = 0;
            for (int i = 0; i < int(odds.size()); ++i) {
                const float value = odds[i] + (correction ? correction[i] : 0);
                if (!taken[i] && (found < 0 || value > highest)) found = i, highest = value;
            }
            best[j] = found, taken[found] = 1;
        }
    }
};

class Mixing {
public:
    // x [T, hidden] and the router's scores [T, router.out] → y [T, hidden]; `finish(t, begin, end)` goes on with a
    // piece of y. Of one layer after the other, with the whole team; it ends with a barrier.
    template <typename Finish>
    void run(const Experts& experts, int activation, const float* x, int hidden, const float* scores, int count, float* y,
             const Team& team, double& seconds, Finish finish) {
        if (team.thread == 0) routing.reserve(experts, count);
        team.barrier();
        const Range tokens = team.share(count);
        for (int t = tokens.begin; t < tokens.end; ++t) routing.choose(experts, scores + size_t(t) * experts.router.out, t);
        team.barrier();
        if (team.thread == 0) routing.group(experts, count), reserve(experts, hidden, count);
        team.barrier();
        const double start = now();
        take_inputs(experts, x, hidden, count, team);
        multiply(experts.gate_up, inputs, gates.data(), widest, team);
        take_activated(experts, activation, count, team);
        multiply(experts.down, inner, results.data(), hidden, team);
        if (team.thread == 0) seconds += now() - start;
        add_up(hidden, count, y, team, finish);
    }

private:
    using Inputs = std::vector<std::array<ProductInput, MOST_PARTS>>;  // of each active expert
    Routing routing;
    Inputs inputs, inner;
    Buffer<float> gates, results;  // of each slot
    int widest = 0;                // of the gates

    void reserve(const Experts& experts, int hidden, int count) {
        const size_t slots = size_t(count) * routing.places, wanted = routing.active.size();
        if (inputs.size() < wanted) inputs.resize(wanted), inner.resize(wanted);
        widest = 0;
        for (size_t i = 0; i < wanted; ++i) {
            const FusedWeight &up = experts.gate_up[routing.active[i]], &down = experts.down[routing.active[i]];
            widest = std::max(widest, up.out);
            for (int p = 0; p < up.count; ++p) inputs[i][p].reserve(up.parts[p], routing.rows(i));
            for (int p = 0; p < down.count; ++p) inner[i][p].reserve(down.parts[p], routing.rows(i));
        }
        grow(gates, slots * widest), grow(results, slots * hidden);
    }

    void take_inputs(const Experts& experts, const float* x, int hidden, int count, const Team& team) {
        const int pieces = (hidden + PIECE - 1) / PIECE;
        const Range share = team.share(count * routing.places * pieces);
        for (int at = share.begin; at < share.end; ++at) {
            const int slot = at / pieces, begin = at % pieces * PIECE, i = routing.owner[slot];
            const FusedWeight& weight = experts.gate_up[routing.active[i]];
            for (int p = 0; p < weight.count; ++p)
                inputs[i][p].take(weight.parts[p], slot - routing.first[i], x + size_t(routing.token[slot]) * hidden, begin,
                                  std::min(begin + PIECE, hidden));
        }
        team.barrier();
    }

    // Every active expert's product with its rows, to y [slots, stride]; threads begin at another part of each.
    void multiply(const FusedWeight* weights, Inputs& from, float* y, int stride, const Team& team) {
        for (size_t i = 0; i < routing.active.size(); ++i) {
            const FusedWeight& weight = weights[routing.active[i]];
            const int thread = int((team.thread + i) % team.threads);
            int before = 0;
            for (int p = 0; p < weight.count; before += weight.parts[p++].out)
                from[i][p].multiply(weight.parts[p], routing.rows(i), thread, team.threads,
                                    [&](int t, int o, auto lanes, auto value) {
                                        store(y + size_t(routing.first[i] + t) * stride + before + o, value, lanes);
                                    });
        }
        team.barrier();
    }

    void take_activated(const Experts& experts, int activation, int count, const Team& team) {
        const int pieces = (widest / 2 + PIECE - 1) / PIECE;
        const Range share = team.share(count * routing.places * pieces);
        for (int at = share.begin; at < share.end; ++at) {
            const int slot = at / pieces, begin = at % pieces * PIECE, i = routing.owner[slot];
            const FusedWeight& weight = experts.down[routing.active[i]];
            const int end = std::min(begin + PIECE, weight.in);
            if (begin >= end) continue;
            float* row = gates.data() + size_t(slot) * widest;
            for (int c = begin; c < end; c += LANES)
                store(row + c, activate(load(row + c), activation, nullptr) * load(row + weight.in + c));
            for (int p = 0; p < weight.count; ++p)
                inner[i][p].take(weight.parts[p], slot - routing.first[i], row, begin, end);
        }
        team.barrier();
    }

    template <typename Finish>
    void add_up(int hidden, int count, float* y, const Team& team, Finish finish) {
        const int pieces = (hidden + PIECE - 1) / PIECE;
        const Range share = team.share(count * pieces);
        for (int at = share.begin; at < share.end; ++at) {
            const int t = at / pieces, begin = at % pieces * PIECE, end = std::min(begin + PIECE, hidden);
            float* row = y + size_t(t) * hidden;
            for (int c = begin; c < end; ++c) row[c] = 0;
            for (int j = 0; j < routing.places; ++j) {
                const float part = routing.share[size_t(t) * routing.places + j];
                const float* result = results.data() + size_t(routing.slot[size_t(t) * routing.places + j]) * hidden;
                for (int c = begin; c < end; ++c) row[c] += part * result[c];
            }
            finish(t, begin, end);
        }
        team.barrier();
    }
};

}  // namespace quasar
