// A decoder's whole pass over a few tokens: one parallel region, with a barrier between the steps of a block.
//
// What stands between the products (norms, rotations, attention, gates, residuals) is computed in float32, and rounded
// to 16 bits where it enters a product or the cache. Letters: T tokens of the pass, D head size.

#pragma once

#include <vector>

#include "choices.h"
#include "elementwise.h"
#include "heads.h"
#include "model.h"
#include "team.h"

namespace quasar {

template <typename X>  // of embedding and cache
class Pass {
public:
    explicit Pass(const Model& model) : m(model), heads(model), layers(model.layer, model.layer + model.layers) {}

    // tokens [T] at `position`, one behind the other, or where `parents` [T] are given each behind its parent, which
    // stands before it (−1 for the first): keys and values lie in the order of the tokens, and each sees its own
    // ancestors alone. From `position` on cos and sin [places, D], for each rotary embedding; of each token growth of
    // queries [T], or null. states: of each layer, keys then values, [2, heads, capacity, D]; recurrent: of each layer,
    // where some have a state; given [T, hidden]: what a joint reads; rows [T, hidden] behind the last norm, or null. Of
    // R `shown` tokens, the last (all with rows): logits [R, vocabulary], or null; best, margin, `wanted` likeliest [R, wanted].
    // It may run in parts, layers [begin, end) at a time, between which weights may come and go: the first embeds the
    // tokens, the last has the results, and each but the first goes on where the one before it ended.
    void run(int begin, int end, const int64_t* tokens, const int* parents, int count, int shown, int position,
             const float* const* cos, const float* const* sin, const float* growth, void* const* states,
             const StatePlace* recurrent, int capacity, const void* given, void* rows, float* logits, int64_t* chosen,
             float* margins, int wanted, int32_t* likeliest, int threads) {
        const bool is_last = end == int(layers.size());
        reserve(count, position, threads);
        if (is_last) seen.assign(size_t(threads) * shown, Leaders(std::max(wanted, 2)));
        paths = trace_paths(parents, count, position);
        const Place place{count, position, capacity, cos, sin, growth, paths};
        const double start = now();
        in_parallel(threads, [&](const Team& team) {
            if (begin == 0) embed(tokens, count, team);
            if (begin == 0 && m.joint.count) join(static_cast<const X*>(given), count, team);
            if (begin == 0 && m.inputs_size) make_inputs(tokens, count, team);
            Waiting waiting = begin == 0 ? Waiting() : left;
            for (int i = begin; i < end; ++i) {
                const Layer& layer = layers[i];
                prepare_normed(layer.qkv, waiting, layer.input_norm, count, team);
                multiply_into(layer.qkv, mixed.data(), count, team);
                if (layer.recurrence)
                    recurring.pass(*layer.recurrence, mixed.data(), layer.qkv.out, count, recurrent[i], attended.data(),
                                   team);
                else
                    heads.attend(layer, mixed.data(), static_cast<X*>(states[i]), place, attended.data(), team);
                prepare_mix(layer, count, team);
                waiting = multiply_onto_hidden(layer.out, layer.out_norm, count, team);
                if (!layer.experts)
                    waiting = run_mlp(layer, waiting, count, team);
                else if (!layer.experts->mlp_out_norm)
                    waiting = mix_experts(layer, waiting, count, team);
                else
                    waiting = run_both(layer, waiting, count, team);
                if (m.inputs_size) {
                    prepare_normed(layer.input_gate, waiting, nullptr, count, team);
                    multiply_into(layer.input_gate, mixed.data(), count, team);
                    prepare_own_input(layer, i, count, team);
                    waiting = multiply_onto_hidden(layer.input_out, layer.input_out_norm, count, team);
                }
                waiting.scalar = layer.scalar;
            }
            if (team.thread == 0) left = waiting;  // the same on every thread
            if (is_last) make_logits(waiting, count, shown, static_cast<X*>(rows), logits, team);
        });
        for (int t = 0; is_last && t < shown; ++t) {
            for (int thread = 1; thread < threads; ++thread) seen[t].merge(seen[size_t(thread) * shown + t]);
            const Choice choice = seen[t].choose(m.head_tokens);
            chosen[t] = choice.token, margins[t] = choice.margin;
            seen[t].list(wanted, likeliest + size_t(t) * wanted, m.head_tokens);
        }
        seconds += now() - start;
    }

    double seconds = 0, seconds_in_products = 0;  // of all passes so far; waiting for other threads included

private:
    // What is to become of the residual stream before it is read: `delta` comes on top behind its norm, then a factor.
    struct Waiting {
        const float* norm = nullptr;
        float scalar = 1;
    };

    Model m;
    LayerHeads<X> heads;
    Waiting left;  // of the part before
    std::vector<Layer> layers;
    Buffer<float> hidden, normed, delta, mixed, attended, own_inputs, from_mlp;
    Buffer<Leaders> seen;
    std::vector<std::vector<int>> paths;  // of each token of a tree, from the first one to itself: where states lie
    ProductInput inputs[MOST_PARTS];
    Mixing mixing;
    Recurring<X> recurring;

    void reserve(int count, int position, int threads) {
        size_t widest = 0, mixes = 0;
        auto make_room = [&](const FusedWeight& weight) {
            for (int i = 0; i < weight.count; ++i) inputs[i].reserve(weight.parts[i], count);
        };
        for (const Layer& layer : layers) {
            widest = std::max({widest, size_t(layer.qkv.out), size_t(layer.gate_up.out)});
            mixes = std::max({mixes, size_t(m.heads) * layer.head_size, size_t(layer.out.in)});
            if (layer.recurrence) recurring.reserve(*layer.recurrence, count);
            make_room(layer.qkv), make_room(layer.out), make_room(layer.gate_up), make_room(layer.down);
            make_room(layer.input_gate), make_room(layer.input_out);
            if (layer.experts) make_room(layer.experts->router), widest = std::max(widest, size_t(layer.experts->router.out));
            if (layer.experts && layer.experts->mlp_out_norm) grow(from_mlp, size_t(count) * m.hidden);
        }
        make_room(m.head), make_room(m.inputs_projection), make_room(m.joint);
        widest = std::max(widest, size_t(m.joint.in));
        const size_t rows = count;
        grow(hidden, rows * m.hidden), grow(normed, rows * m.hidden), grow(delta, rows * m.hidden);
        grow(mixed, rows * widest), grow(attended, rows * mixes);
        grow(own_inputs, rows * layers.size() * m.inputs_size);
        heads.reserve(layers, count, position + count, threads);
    }

    void embed(const int64_t* tokens, int count, const Team& team) {
        const Range rows = team.share(count);
        for (int t = rows.begin; t < rows.end; ++t) {
            auto from = static_cast<const X*>(m.embedding) + size_t(tokens[t]) * m.hidden;
            float* row = hidden.data() + size_t(t) * m.hidden;
            for (int i = 0; i < m.hidden; i += LANES) store(row + i, load(from + i) * m.embedding_scale);
            if (m.norms_embedding) normalise(row, nullptr, m.hidden, m.eps, row);
        }
        team.barrier();
    }

    // The residual stream of a head that goes on from another model's rows: of the embedding and of the row, both normed.
    void join(const X* given, int count, const Team& team) {
        const int size = m.hidden;
        const Range share = team.share(count);
        for (int t = share.begin; t < share.end; ++t) {
            float* both = mixed.data() + size_t(t) * 2 * size;
            normalise(hidden.data() + size_t(t) * size, m.joint_embedding_norm, size, m.eps, both);
            for (int i = 0; i < size; i += LANES) store(both + size + i, load(given + size_t(t) * size + i));
            normalise(both + size, m.joint_rows_norm, size, m.eps, both + size);
            for (int i = 0; i < m.joint.count; ++i) inputs[i].take(m.joint.parts[i], t, both, 0, 2 * size);
        }
        team.barrier();
        multiply_into(m.joint, hidden.data(), count, team);
    }

    // own_inputs [T, layers · P]: of the token's own embedding, and of a projection of the other, normed.
    void make_inputs(const int64_t* tokens, int count, const Team& team) {
        prepare_normed(m.inputs_projection, Waiting(), nullptr, count, team);
        multiply_into(m.inputs_projection, own_inputs.data(), count, team);
        const int blocks = int(layers.size()), size = m.inputs_size;
        const Floats shrink = 1 / std::sqrt(float(m.hidden)), scale = m.inputs_scale;
        const Range share = team.share(count * blocks);
        for (int at = share.begin; at < share.end; ++at) {
            float* row = own_inputs.data() + size_t(at) * size;
            auto own = static_cast<const X*>(m.inputs_embedding) + (size_t(tokens[at / blocks]) * blocks + at % blocks) * size;
            for (int i = 0; i < size; i += LANES) store(row + i, load(row + i) * shrink);
            normalise(row, m.inputs_norm, size, m.eps, row);
            for (int i = 0; i < size; i += LANES)
                store(row + i, fused(load(own + i), scale, load(row + i)) * 0.70710678f);
        }
        team.barrier();
    }

    void make_logits(const Waiting& waiting, int count, int shown, X* rows, float* logits, const Team& team) {
        prepare_normed(m.head, waiting, m.norm, shown, team, count - shown);
        const Range share = team.share(rows ? count * m.hidden / LANES : 0);
        for (int i = share.begin * LANES; i < share.end * LANES; i += LANES) store(rows + i, load(normed.data() + i));
        multiply(m.head, shown, team, [&](int t, int o, Lanes lanes, Floats value) {
            value = value * m.logits_scale;
            if (m.logits_cap) value = capped(value, m.logits_cap);
            if (logits) m.place_logits(logits + size_t(t) * m.vocabulary, o, lanes, value);
            seen[size_t(team.thread) * shown + t].see(o, lanes, value);
        });
    }

    // The gate of the block's own input stands in `mixed`.
    void prepare_own_input(const Layer& layer, int index, int count, const Team& team) {
        const int size = m.inputs_size;
        const Range share = team.share(count);
        for (int t = share.begin; t < share.end; ++t) {
            float* row = mixed.data() + size_t(t) * size;
            const float* own = own_inputs.data() + (size_t(t) * layers.size() + index) * size;
            for (int i = 0; i < size; i += LANES)
                store(row + i, activate(load(row + i), m.activation, nullptr) * load(own + i));
            for (int i = 0; i < layer.input_out.count; ++i) inputs[i].take(layer.input_out.parts[i], t, row, 0, size);
        }
        team.barrier();
    }

    // Settles what waits, then makes the inputs of a product, normed where they are: of `count` tokens from `first` on.
    void prepare_normed(const FusedWeight& weight, const Waiting& waiting, const float* norm, int count, const Team& team,
                        int first = 0) {
        const Range rows = team.share(count);
        for (int t = rows.begin; t < rows.end; ++t) {
            const size_t from = size_t(first + t) * m.hidden;
            float *row = normed.data() + from, *stream = hidden.data() + from;
            if (waiting.norm) {
                normalise(delta.data() + from, waiting.norm, m.hidden, m.behind_eps, row);
                for (int i = 0; i < m.hidden; i += LANES) store(stream + i, with_residual(stream + i, load(row + i)));
            }
            if (waiting.scalar != 1)
                for (int i = 0; i < m.hidden; i += LANES) store(stream + i, load(stream + i) * waiting.scalar);
            if (norm) normalise(stream, norm, m.hidden, m.eps, row);
            for (int i = 0; i < weight.count; ++i) inputs[i].take(weight.parts[i], t, norm ? row : stream, 0, m.hidden);
        }
        team.barrier();
    }

    Floats with_residual(const float* stream, Floats value, Lanes lanes = ALL) const {
        return fused(value, m.residual_scale, load(stream, lanes));
    }

    // x [T, in]; each piece of a row is made by `make` where it has to be.
    template <typename Make>
    void prepare_pieces(const FusedWeight& weight, float* x, int stride, int count, const Team& team, Make make) {
        const int pieces = (weight.in + PIECE - 1) / PIECE;
        const Range share = team.share(count * pieces);
        for (int at = share.begin; at < share.end; ++at) {
            const int t = at / pieces, begin = at % pieces * PIECE, end = std::min(begin + PIECE, weight.in);
            float* row = x + size_t(t) * stride;
            make(row, begin, end);
            for (int i = 0; i < weight.count; ++i) inputs[i].take(weight.parts[i], t, row, begin, end);
        }
        team.barrier();
    }

    void prepare_input(const FusedWeight& weight, float* x, int count, const Team& team) {
        prepare_pieces(weight, x, weight.in, count, team, [](float*, int, int) {});
    }

    Waiting run_mlp(const Layer& layer, const Waiting& waiting, int count, const Team& team) {
        prepare_normed(layer.gate_up, waiting, layer.mlp_norm, count, team);
        multiply_into(layer.gate_up, mixed.data(), count, team);
        prepare_activated(layer, count, team);
        return multiply_onto_hidden(layer.down, layer.down_norm, count, team);
    }

    Waiting mix_experts(const Layer& layer, const Waiting& waiting, int count, const Team& team) {
        const Experts& experts = *layer.experts;
        prepare_normed(experts.router, waiting, layer.mlp_norm, count, team);
        multiply_into(experts.router, mixed.data(), count, team);
        const float* x = layer.mlp_norm ? normed.data() : hidden.data();
        mixing.run(experts, m.activation, x, m.hidden, mixed.data(), count, delta.data(), team, seconds_in_products,
                   [&](int t, int begin, int end) {
                       if (layer.down_norm) return;
                       const size_t from = size_t(t) * m.hidden;
                       float *stream = hidden.data() + from, *row = delta.data() + from;
                       for (int i = begin; i < end; i += LANES) store(stream + i, with_residual(stream + i, load(row + i)));
                   });
        Waiting next;
        next.norm = layer.down_norm;
        return next;
    }

    // The MLP, and the experts beside it, which read the residual stream behind norms of their own.
    Waiting run_both(const Layer& layer, const Waiting& waiting, int count, const Team& team) {
        const Experts& experts = *layer.experts;
        prepare_normed(layer.gate_up, waiting, layer.mlp_norm, count, team);
        multiply_into(layer.gate_up, mixed.data(), count, team);
        prepare_activated(layer, count, team);
        multiply_into(layer.down, from_mlp.data(), count, team);
        prepare_normed(experts.router, Waiting(), experts.router_norm, count, team);
        multiply_into(experts.router, mixed.data(), count, team);
        const Range rows = team.share(count);
        for (int t = rows.begin; t < rows.end; ++t) {
            const size_t from = size_t(t) * m.hidden;
            normalise(hidden.data() + from, experts.norm, m.hidden, m.eps, normed.data() + from);
        }
        mixing.run(experts, m.activation, normed.data(), m.hidden, mixed.data(), count, delta.data(), team,
                   seconds_in_products, [](int, int, int) {});
        for (int t = rows.begin; t < rows.end; ++t) {
            float *row = delta.data() + size_t(t) * m.hidden, *other = from_mlp.data() + size_t(t) * m.hidden;
            normalise(row, experts.out_norm, m.hidden, m.eps, row);
            normalise(other, experts.mlp_out_norm, m.hidden, m.eps, other);
            for (int i = 0; i < m.hidden; i += LANES) store(row + i, load(row + i) + load(other + i));
        }
        team.barrier();
        Waiting next;
        next.norm = layer.down_norm;
        return next;
    }

    // Gates and what they gate stand beside one another in `mixed`; without gates, what is activated stands alone.
    void prepare_activated(const Layer& layer, int count, const Team& team) {
        const int inner = layer.down.in;
        prepare_pieces(layer.down, mixed.data(), layer.gate_up.out, count, team, [&](float* row, int begin, int end) {
            for (int i = begin; i < end; i += LANES) {
                Floats value = activate(load(row + i), m.activation, layer.activation);
                if (m.gated) value = value * load(row + inner + i);
                store(row + i, value);
            }
        });
    }

    template <typename Put>
    void multiply(const FusedWeight& weight, int count, const Team& team, Put put) {
        const double start = now();
        int before = 0;
        for (int i = 0; i < weight.count; before += weight.parts[i++].out)
            inputs[i].multiply(weight.parts[i], count, team.thread, team.threads,
                               [&](int t, int o, Lanes lanes, Floats value) { put(t, before + o, lanes, value); });
        team.barrier();
        if (team.thread == 0) seconds_in_products += now() - start;
    }

    void multiply_into(const FusedWeight& weight, float* y, int count, const Team& team) {
        multiply(weight, count, team, [&](int t, int o, Lanes lanes, Floats value) {
            store(y + size_t(t) * weight.out + o, value, lanes);
        });
    }

    // Onto the residual stream, or to where it waits for its norm.
    Waiting multiply_onto_hidden(const FusedWeight& weight, const float* norm, int count, const Team& team) {
        if (norm) {
            multiply_into(weight, delta.data(), count, team);
            return Waiting{norm, 1};
        }
        multiply(weight, count, team, [&](int t, int o, Lanes lanes, Floats value) {
            float* to = hidden.data() + size_t(t) * m.hidden + o;
            store(to, with_residual(to, value, lanes), lanes);
        });
        return Waiting();
    }

    // What attention or a state gives, behind the gates that stand in `mixed`.
    void prepare_mix(const Layer& layer, int count, const Team& team) {
        if (layer.recurrence || !m.gates_attention) return prepare_input(layer.out, attended.data(), count, team);
        const int inner = layer.out.in;
        prepare_pieces(layer.out, attended.data(), inner, count, team, [&](float* row, int begin, int end) {
            const float* token = mixed.data() + (row - attended.data()) / inner * layer.qkv.out;
            for (int i = begin; i < end; i += LANES)
                store(row + i, load(row + i) * sigmoid(load(token + m.gate_of(layer, i))));
        });
    }
};

}  // namespace quasar
