// Layers with a state in the place of attention: a causal convolution, then a state that every token changes.
//
// The gated delta rule, Mamba-2 and the short convolution, as `recurrent/rules.py` has them. Sums are taken in one
// order, token after token: channels of a convolution tap by tap, columns of a state row by row, each column by itself.
// So a token's result depends neither on the tokens of its pass nor on the threads, and running the rule again over what
// it has read gives the same state to the last bit. Letters: T tokens of a pass, C channels, K taps, Hv heads of values,
// Dk and Dv the sizes of keys and values.

#pragma once

#include <cmath>

#include "elementwise.h"
#include "numbers.h"
#include "team.h"

namespace quasar {

enum RecurrenceKind { DELTA, MAMBA, CONV };  // in the order of `compiled_rule.KINDS`

struct Recurrence {
    int kind, taps, key_heads, value_heads, key_size, value_size, channels, values;
    float eps;
    const float *weights, *bias;        // of the convolution: [K, C] and [C], or null
    const float *fading, *step_bias;    // [Hv]
    const float *passed_by, *norm;      // [Hv], or null; [Dv], or [values]

    int keys() const { return key_heads * key_size; }
    bool corrects() const { return kind == DELTA; }
};

// What a layer keeps: its state in front of the pass and behind it, and between them what the rule reads of each token.
struct StatePlace {
    const void* window;      // [K − 1, C]
    const float* matrices;   // [Hv, Dk, Dv], or null
    void* window_after;
    float* matrices_after;
    void* channels;          // [T, C]
    float* rates;            // [T, 2, Hv]: what is left of the state, and how much of the token is written
};

// log(1 + e^x); x itself where nothing of the 1 is left.
inline float softplus_of(float x) { return x > 20 ? x : std::log1p(std::exp(x)); }

template <typename X>  // of channels
class Recurring {
public:
    void reserve(const Recurrence& rule, int count) { grow(convolved, size_t(count) * rule.channels); }

    // What the first product gives of T tokens, rows of `stride` → what the last one reads [T, values]. Ends with a
    // barrier, as all of these do.
    void pass(const Recurrence& rule, const float* projected, int stride, int count, const StatePlace& place,
              float* outputs, const Team& team) {
        read(rule, projected, stride, count, place, team);
        run(rule, count, place, outputs, team);
        gate(rule, projected, stride, count, outputs, team);
    }

    // The rule over what it reads of T tokens → outputs [T, values], without gates, and the state behind them.
    void run(const Recurrence& rule, int count, const StatePlace& place, float* outputs, const Team& team) {
        if (rule.kind == CONV)
            convolve_alone(rule, count, place, outputs, team);
        else {
            convolve_heads(rule, count, place, team);
            change_states(rule, count, place, outputs, team);
        }
    }

private:
    static constexpr int STRIP_WIDTH = 4, PIECE_WIDTH = 16 * LANES;  // registers of a state's columns; channels
    Buffer<float> convolved;                                         // [T, C]

    // Channels and rates of each token.
    static void read(const Recurrence& rule, const float* projected, int stride, int count, const StatePlace& place,
                     const Team& team) {
        const int pieces = (rule.channels + PIECE_WIDTH - 1) / PIECE_WIDTH;
        const Range share = team.share(count * (pieces + 1));
        for (int at = share.begin; at < share.end; ++at) {
            const int t = at / (pieces + 1), begin = at % (pieces + 1) * PIECE_WIDTH;
            const float* row = projected + size_t(t) * stride;
            if (begin < rule.channels)
                read_channels(rule, row, begin, std::min(begin + PIECE_WIDTH, rule.channels),
                              static_cast<X*>(place.channels) + size_t(t) * rule.channels);
            else if (rule.kind != CONV)
                read_rates(rule, row, place.rates + size_t(t) * 2 * rule.value_heads);
        }
        team.barrier();
    }

    static void read_channels(const Recurrence& rule, const float* row, int begin, int end, X* to) {
        if (rule.kind == MAMBA) row += rule.values;  // behind the gates
        for (int c = begin; c < end; c += LANES) {
            Floats value = load(row + c);
            if (rule.kind == CONV) value = value * load(row + 2 * rule.channels + c);
            store(to + c, value);
        }
    }

    static void read_rates(const Recurrence& rule, const float* row, float* left) {
        const float* given = row + rule.channels + rule.values;
        float* written = left + rule.value_heads;
        for (int h = 0; h < rule.value_heads; ++h) {
            const float step = softplus_of(given[rule.corrects() ? rule.value_heads + h : h] + rule.step_bias[h]);
            written[h] = rule.corrects() ? 1 / (1 + std::exp(-given[h])) : step;
            left[h] = std::exp(-std::exp(rule.fading[h]) * step);
        }
    }

    // Of the channels before the convolution, row r of those in the window and behind it.
    static const X* seen(const Recurrence& rule, const StatePlace& place, int r) {
        const int kept = rule.taps - 1;
        if (r < kept) return static_cast<const X*>(place.window) + size_t(r) * rule.channels;
        return static_cast<const X*>(place.channels) + size_t(r - kept) * rule.channels;
    }

    static Floats convolve(const Recurrence& rule, const StatePlace& place, int t, int c) {
        Floats total = load(seen(rule, place, t) + c) * load(rule.weights + c);
        for (int tap = 1; tap < rule.taps; ++tap)
            total = fused(load(seen(rule, place, t + tap) + c), load(rule.weights + size_t(tap) * rule.channels + c), total);
        return rule.bias ? total + load(rule.bias + c) : total;
    }

    static void convolve_alone(const Recurrence& rule, int count, const StatePlace& place, float* outputs,
                               const Team& team) {
        const int pieces = (rule.channels + PIECE_WIDTH - 1) / PIECE_WIDTH;
        const Range share = team.share(count * pieces);
        for (int at = share.begin; at < share.end; ++at) {
            const int t = at / pieces, begin = at % pieces * PIECE_WIDTH;
            for (int c = begin; c < std::min(begin + PIECE_WIDTH, rule.channels); c += LANES)
                store(outputs + size_t(t) * rule.channels + c, convolve(rule, place, t, c));
        }
        keep_window(rule, count, place, team);
        team.barrier();
    }

    // Queries, keys and values of each head; those of a delta rule's queries and keys have length 1.
    void convolve_heads(const Recurrence& rule, int count, const StatePlace& place, const Team& team) {
        const int before = rule.corrects() ? 0 : rule.value_heads, shared = 2 * rule.key_heads;
        const int first_key = rule.corrects() ? 0 : rule.values, first_value = rule.corrects() ? 2 * rule.keys() : 0;
        const int all = shared + rule.value_heads;
        const Range share = team.share(count * all);
        for (int at = share.begin; at < share.end; ++at) {
            const int t = at / all, head = at % all - before;
            const bool is_key = head >= 0 && head < shared;
            const int size = is_key ? rule.key_size : rule.value_size;
            const int value = rule.corrects() ? head - shared : head + before;
            const int begin = is_key ? first_key + head * size : first_value + value * size;
            float* row = convolved.data() + size_t(t) * rule.channels;
            for (int c = begin; c < begin + size; c += LANES) store(row + c, silu(convolve(rule, place, t, c)));
            if (is_key && rule.corrects()) make_unit(row + begin, size, head < rule.key_heads);
        }
        keep_window(rule, count, place, team);
        team.barrier();
    }

    static void make_unit(float* x, int size, bool is_query) {
        Floats squares = 0.0f;
        for (int i = 0; i < size; i += LANES) squares = fused(load(x + i), load(x + i), squares);
        float factor = 1 / std::sqrt(sum_of(squares) + 1e-6f);
        if (is_query) factor /= std::sqrt(float(size));
        for (int i = 0; i < size; i += LANES) store(x + i, load(x + i) * factor);
    }

    static void keep_window(const Recurrence& rule, int count, const StatePlace& place, const Team& team) {
        const Range share = team.share(rule.taps - 1);
        for (int r = share.begin; r < share.end; ++r)
            std::memcpy(static_cast<X*>(place.window_after) + size_t(r) * rule.channels, seen(rule, place, count + r),
                        rule.channels * sizeof(X));
    }

    // Strips of columns are split among threads; each goes through all tokens, while it lies in the nearest cache.
    void change_states(const Recurrence& rule, int count, const StatePlace& place, float* outputs, const Team& team) {
        const int width = STRIP_WIDTH * LANES, strips = (rule.value_size + width - 1) / width;
        const Range share = team.share(rule.value_heads * strips);
        for (int at = share.begin; at < share.end; ++at) {
            const int head = at / strips, column = at % strips * width;
            switch (std::min(rule.value_size - column, width) / LANES) {
                case 4: change<4>(rule, count, place, head, column, outputs); break;
                case 3: change<3>(rule, count, place, head, column, outputs); break;
                case 2: change<2>(rule, count, place, head, column, outputs); break;
                default: change<1>(rule, count, place, head, column, outputs);
            }
        }
        team.barrier();
    }

    // Token after token, S = left · S + k · w and q · S, where w is what is to be written of v: less k · S in a delta rule.
    template <int COUNT>
    void change(const Recurrence& rule, int count, const StatePlace& place, int head, int column, float* outputs) const {
        const size_t begin = size_t(head) * rule.key_size * rule.value_size + column;
        const int shared = head / (rule.value_heads / rule.key_heads) * rule.key_size;
        const int queries = rule.corrects() ? 0 : rule.values + rule.keys();
        const int keys = rule.corrects() ? rule.keys() : rule.values, values = rule.corrects() ? 2 * rule.keys() : 0;
        float* to = place.matrices_after + begin;
        for (int t = 0; t < count; ++t) {
            const float* token = convolved.data() + size_t(t) * rule.channels;
            const float *q = token + queries + shared, *k = token + keys + shared;
            const float* v = token + values + head * rule.value_size + column;
            const float* rates = place.rates + size_t(t) * 2 * rule.value_heads;
            const float left = rates[head], written = rates[rule.value_heads + head];
            const float* from = t ? to : place.matrices + begin;
            Floats writes[COUNT], sums[COUNT];
            for (int c = 0; c < COUNT; ++c) writes[c] = load(v + c * LANES);
            for (int c = 0; c < COUNT; ++c) sums[c] = rule.passed_by ? writes[c] * rule.passed_by[head] : Floats(0.0f);
            if (rule.corrects()) take_away_held<COUNT>(k, from, rule.key_size, rule.value_size, left, writes);
            for (int c = 0; c < COUNT; ++c) writes[c] = writes[c] * written;
            for (int i = 0; i < rule.key_size; ++i) {
                const size_t row = size_t(i) * rule.value_size;
                const Floats key = k[i], query = q[i];
#pragma GCC unroll 4
                for (int c = 0; c < COUNT; ++c) {
                    const Floats state = fused(key, writes[c], load(from + row + c * LANES) * left);
                    store(to + row + c * LANES, state);
                    sums[c] = fused(query, state, sums[c]);
                }
            }
            float* row = outputs + size_t(t) * rule.values + head * rule.value_size + column;
            for (int c = 0; c < COUNT; ++c) store(row + c * LANES, sums[c]);
        }
    }

    // v − left · k · S.
    template <int COUNT>
    static void take_away_held(const float* k, const float* states, int rows, int stride, float left,
                               Floats (&values)[COUNT]) {
        Floats held[COUNT];
        for (auto& sum : held) sum = 0.0f;
        for (int i = 0; i < rows; ++i) {
            const Floats key = k[i];
#pragma GCC unroll 4
            for (int c = 0; c < COUNT; ++c) held[c] = fused(key, load(states + size_t(i) * stride + c * LANES), held[c]);
        }
        for (int c = 0; c < COUNT; ++c) values[c] = values[c] - held[c] * left;
    }

    // Outputs behind their norm and gate, in place: the gate follows the norm in a delta rule, and precedes it in Mamba-2.
    static void gate(const Recurrence& rule, const float* projected, int stride, int count, float* outputs,
                     const Team& team) {
        const int groups = rule.kind == CONV ? 1 : rule.corrects() ? rule.value_heads : rule.key_heads;
        const int size = rule.values / groups, gates = rule.kind == MAMBA ? 0 : rule.channels;
        const Range share = team.share(count * groups);
        for (int at = share.begin; at < share.end; ++at) {
            const int t = at / groups, begin = at % groups * size;
            float* x = outputs + size_t(t) * rule.values + begin;
            const float* gate = projected + size_t(t) * stride + gates + begin;
            if (rule.corrects()) normalise(x, rule.norm, size, rule.eps, x);
            for (int i = 0; i < size; i += LANES) {
                const Floats by = load(gate + i);
                store(x + i, load(x + i) * (rule.kind == CONV ? by : silu(by)));
            }
            if (rule.kind == MAMBA) normalise(x, rule.norm + begin, size, rule.eps, x);
        }
        team.barrier();
    }
};

}  // namespace quasar
