// The heads of a layer in a pass: queries and keys are normed and rotated, keys and values written to the cache, then
// queries attend to it. Letters: T tokens of the pass, D head size.

#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "elementwise.h"
#include "model.h"
#include "pass_attention.h"
#include "team.h"

namespace quasar {

// Where the tokens of a pass stand: from `position` on, in a cache of that capacity. `cos` and `sin` [places, D] begin
// there, for each rotary embedding; `growth` of queries [T], or null. Of a tree, `paths` lead from its first token to each.
struct Place {
    int count, position, capacity;
    const float *const *cos, *const *sin, *growth;
    const std::vector<std::vector<int>>& paths;

    // How many tokens of the pass stand before this one in the text.
    int depth_of(int t) const { return paths.empty() ? t : int(paths[t].size()) - 1; }
};

template <typename X>  // of the cache
class LayerHeads {
public:
    explicit LayerHeads(const Model& model) : m(model) {}

    // projected [T, qkv.out]: queries, keys and values of the tokens, and states [2, kv_heads, capacity, D], keys then
    // values → mixes [T, heads, D].
    void attend(const Layer& layer, float* projected, X* states, const Place& place, float* mixes, const Team& team) {
        X *keys = states, *values = states + size_t(layer.kv_heads) * place.capacity * layer.head_size;
        if (layer.head_norms && m.norms_whole_rows) norm_rows(layer, projected, place.count, team);
        place_heads(layer, projected, keys, values, place, team);
        attending.run({m.heads, layer.kv_heads, layer.head_size, place.count, place.position, place.capacity, layer.window,
                       layer.sinks, m.scores_cap, place.paths, queries.data(), keys, values, mixes},
                      team);
    }

    // Make room for passes of `count` tokens over so many positions.
    void reserve(const std::vector<Layer>& layers, int count, int positions, int threads) {
        int size = 0;
        for (const Layer& layer : layers) size = std::max(size, layer.head_size);
        grow(queries, size_t(count) * m.heads * size);
        attending.reserve(count * m.heads, size, positions, threads);
    }

private:
    const Model m;
    Buffer<X> queries;
    Attending<X> attending;

    // The norm of all queries of a token as one row, and of all its keys.
    void norm_rows(const Layer& layer, float* projected, int count, const Team& team) {
        const int queries = m.heads * layer.head_size, keys = layer.kv_heads * layer.head_size;
        const Range share = team.share(2 * count);
        for (int at = share.begin; at < share.end; ++at) {
            const int begin = at % 2 ? queries : 0;
            float* x = projected + size_t(at / 2) * (queries + 2 * keys) + begin;
            normalise(x, layer.head_norms + begin, at % 2 ? keys : queries, m.eps, x);
        }
        team.barrier();
    }

    // Norm and rotate queries and keys as the layer has it; keys and values go to the cache.
    void place_heads(const Layer& layer, float* projected, X* keys, X* values, const Place& place, const Team& team) {
        const int all = m.heads + (layer.shares ? 0 : 2 * layer.kv_heads), size = layer.head_size;
        const int gates = m.gates_attention == BEHIND_QUERIES ? m.heads : 0;
        const Range share = team.share(place.count * all);
        for (int at = share.begin; at < share.end; ++at) {
            const int t = at / all, head = at % all;
            float* x = projected + size_t(t) * layer.qkv.out + (head + std::min(head, gates)) * size;
            const size_t position = place.position + t;
            if (head >= m.heads + layer.kv_heads) {
                if (m.norms_values) normalise(x, nullptr, size, m.eps, x);
                keep(x, 1, size, values + (size_t(head - m.heads - layer.kv_heads) * place.capacity + position) * size);
                continue;
            }
            const float* norm = m.norms_whole_rows ? nullptr : layer.head_norms;
            if (norm && !m.norms_last) normalise(x, norm + head * size, size, m.eps, x);
            if (layer.rope >= 0) {
                const size_t row = size_t(place.depth_of(t)) * size;
                rotate(x, place.cos[layer.rope] + row, place.sin[layer.rope] + row, layer.channels, m.interleaved);
            }
            if (norm && m.norms_last) normalise(x, norm + head * size, size, m.eps, x);
            if (head >= m.heads)
                keep(x, 1, size, keys + (size_t(head - m.heads) * place.capacity + position) * size);
            else
                keep(x, scale_of_queries(size, place, t), size, queries.data() + (size_t(t) * m.heads + head) * size);
        }
        team.barrier();
    }

    float scale_of_queries(int size, const Place& place, int t) const {
        return (m.scores_scale ? m.scores_scale : 1 / std::sqrt(float(size))) * (place.growth ? place.growth[t] : 1);
    }

    static void keep(const float* x, float factor, int size, X* to) {
        for (int d = 0; d < size; d += LANES) store(to + d, load(x + d) * factor);
    }
};

}  // namespace quasar
