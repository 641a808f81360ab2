// A decoder's whole pass over a few tokens: one parallel region, with a barrier between the steps of a block.
//
// What stands between the products (norms, rotations, attention, gates, residuals) is computed in float32, and rounded
// to 16 bits where it enters a product or the cache. Letters: T tokens of the pass, D head size.

#pragma once

#include <omp.h>

#include <cmath>
#include <vector>

#include "attention.h"
#include "choices.h"
#include "codes.h"
#include "rows.h"

namespace quasar {

constexpr int MOST_PARTS = 3;
constexpr int PIECE = 512;  // inputs that a thread prepares at a time: a multiple of every group of codes

// A linear layer: row after row in 16 or 32 bits, or a stream of codes of 2, 4 or 8 bits.
struct Product {
    const void* weight;
    const float* bias;  // [out], or null
    int bits, in, out, groups;
};

// Products of one input, whose outputs stand beside one another.
struct FusedWeight {
    Product parts[MOST_PARTS];
    int count, in, out;
};

struct Layer {
    const float *input_norm, *mlp_norm;  // [hidden]
    const float* head_norms;             // [query heads + key heads, D], or null
    FusedWeight qkv, out, gate_up, down;
    int window;   // positions that a token sees, its own included; 0 is all of them
    int rotates;  // 0 or 1
};

struct Model {
    int hidden, heads, kv_heads, head_size, layers, is_bfloat16;
    float eps;
    const void* embedding;  // [vocabulary, hidden]
    const float* norm;      // [hidden]
    FusedWeight head;
    const Layer* layer;
};

// The activations that a product takes, in the form that its weights ask for: 8-bit codes, bfloat16 or float32.
class ProductInput {
public:
    void reserve(const Product& product, int count) {
        const size_t size = size_t(count) * product.in;
        if (product.bits == 16) grow(halves, size);
        if (product.bits == 32) grow(singles, size);
        if (product.bits < 16) grow(values, size), grow(scales, size / LANES), grow(sums, size / LANES);
    }

    // Inputs [begin, end) of row t, from x [in]; both are multiples of PIECE, or the end of the row.
    void take(const Product& product, int t, const float* x, int begin, int end) {
        const size_t row = size_t(t) * product.in;
        if (product.bits == 16)
            for (int i = begin; i < end; i += LANES) store(halves.data() + row + i, load(x + i));
        else if (product.bits == 32)
            for (int i = begin; i < end; i += LANES) store(singles.data() + row + i, load(x + i));
        else {
            const CodedRows rows = coded(product);
            for (int g = begin / rows.group; g < end / rows.group; ++g) quantize_group(x, rows, t, g);
        }
    }

    // A thread's share of the product for all rows of the pass.
    template <typename Put>
    void multiply(const Product& product, int count, int thread, int threads, Put put) {
        auto with_bias = [&](int t, int o, __mmask16 lanes, __m512 value) {
            if (product.bias) value = _mm512_add_ps(value, _mm512_maskz_loadu_ps(lanes, product.bias + o));
            put(t, o, lanes, value);
        };
        if (product.bits < 16) {
            Range blocks((product.out + BLOCK - 1) / BLOCK, thread, threads);
            return multiply_codes(product.bits, product.weight, coded(product), blocks, 0, count, product.out,
                                  with_bias);
        }
        Range strips((product.out + STRIP - 1) / STRIP, thread, threads);
        if (product.bits == 16)
            multiply_strips<uint16_t>(product.weight, halves.data(), product.in, strips, 0, count, product.out,
                                    with_bias);
        else
            multiply_strips<float>(product.weight, singles.data(), product.in, strips, 0, count, product.out,
                                     with_bias);
    }

private:
    Buffer<uint16_t> halves;
    Buffer<int8_t> values;
    Buffer<float> singles, scales, sums;

    CodedRows coded(const Product& product) {
        return {values.data(), scales.data(), sums.data(), product.in, product.groups, product.in / product.groups};
    }
};

inline void normalise(const float* x, const float* weight, int size, float eps, float* y) {
    __m512 squares = _mm512_setzero_ps();
    for (int i = 0; i < size; i += LANES) squares = _mm512_fmadd_ps(load(x + i), load(x + i), squares);
    __m512 inverse = _mm512_set1_ps(1 / std::sqrt(_mm512_reduce_add_ps(squares) / size + eps));
    for (int i = 0; i < size; i += LANES)
        store(y + i, _mm512_mul_ps(_mm512_mul_ps(load(x + i), inverse), load(weight + i)));
}

// In place: x · cos + (x rolled by D/2) · sin. The first half of every row of sines is negated.
inline void rotate(float* x, const float* cos, const float* sin, int size) {
    const int half = size / 2;
    for (int d = 0; d < half; ++d) {
        const float low = x[d], high = x[d + half];
        x[d] = low * cos[d] + high * sin[d];
        x[d + half] = high * cos[d + half] + low * sin[d + half];
    }
}

// Threads, and which of them runs this.
struct Team {
    int thread = omp_get_thread_num(), threads = omp_get_num_threads();
    Range share(int count) const { return Range(count, thread, threads); }
};

template <typename X>  // of embedding and cache
class Pass {
public:
    explicit Pass(const Model& model) : m(model), layers(model.layer, model.layer + model.layers) {}

    // tokens [T] at `position`; cos and sin [T, D]; states: of each layer, keys then values, [2, heads, capacity, D];
    // logits [T, vocabulary], or null where nobody reads them; of each row the best token and its margin.
    void run(const int64_t* tokens, int count, int position, const float* cos, const float* sin, void* const* states,
             int capacity, float* logits, int64_t* chosen, float* margins, int threads) {
        reserve(count, threads);
        seen.assign(size_t(threads) * count, Best());
        const Place place{count, position, capacity, cos, sin};
        const double start = omp_get_wtime();
#pragma omp parallel num_threads(threads)
        {
            const Team team;
            embed(tokens, count, team);
            for (size_t i = 0; i < layers.size(); ++i) {
                const Layer& layer = layers[i];
                auto keys = static_cast<X*>(states[i]);
                auto values = keys + size_t(m.kv_heads) * capacity * m.head_size;
                prepare_normed(layer.qkv, layer.input_norm, count, team);
                multiply_into(layer.qkv, mixed.data(), count, team);
                place_heads(layer, keys, values, place, team);
                attend_heads(layer, keys, values, place, team);
                prepare_input(layer.out, attended.data(), count, team);
                multiply_onto_hidden(layer.out, count, team);
                prepare_normed(layer.gate_up, layer.mlp_norm, count, team);
                multiply_into(layer.gate_up, mixed.data(), count, team);
                prepare_gated(layer.down, count, team);
                multiply_onto_hidden(layer.down, count, team);
            }
            prepare_normed(m.head, m.norm, count, team);
            multiply(m.head, count, team, [&](int t, int o, __mmask16 lanes, __m512 value) {
                if (logits) store(logits + size_t(t) * m.head.out + o, value, lanes);
                seen[size_t(team.thread) * count + t].see(o, lanes, value);
            });
        }
        for (int t = 0; t < count; ++t) {
            for (int thread = 1; thread < threads; ++thread) seen[t].merge(seen[size_t(thread) * count + t]);
            const Choice choice = seen[t].choose();
            chosen[t] = choice.token, margins[t] = choice.margin;
        }
        seconds += omp_get_wtime() - start;
    }

    double seconds = 0, seconds_in_products = 0;  // of all passes so far; waiting for other threads included

private:
    struct Place {
        int count, position, capacity;
        const float *cos, *sin;
    };

    Model m;
    std::vector<Layer> layers;
    Buffer<float> hidden, normed, mixed, attended, rooms;
    Buffer<X> queries;
    Buffer<Best> seen;
    ProductInput inputs[MOST_PARTS];

    void reserve(int count, int threads) {
        int widest = 0;
        auto make_room = [&](const FusedWeight& weight) {
            for (int i = 0; i < weight.count; ++i) inputs[i].reserve(weight.parts[i], count);
        };
        for (const Layer& layer : layers) {
            widest = std::max({widest, layer.qkv.out, layer.gate_up.out});
            make_room(layer.qkv), make_room(layer.out), make_room(layer.gate_up), make_room(layer.down);
        }
        make_room(m.head);
        const size_t rows = count, heads = size_t(m.heads) * m.head_size;
        grow(hidden, rows * m.hidden), grow(normed, rows * m.hidden), grow(mixed, rows * widest);
        grow(queries, rows * heads), grow(attended, rows * heads);
        grow(rooms, size_t(threads) * LANES * m.head_size);
    }

    void embed(const int64_t* tokens, int count, const Team& team) {
        const Range rows = team.share(count);
        for (int t = rows.begin; t < rows.end; ++t) {
            auto row = static_cast<const X*>(m.embedding) + size_t(tokens[t]) * m.hidden;
            for (int i = 0; i < m.hidden; i += LANES) store(hidden.data() + size_t(t) * m.hidden + i, load(row + i));
        }
#pragma omp barrier
    }

    void prepare_normed(const FusedWeight& weight, const float* norm, int count, const Team& team) {
        const Range rows = team.share(count);
        for (int t = rows.begin; t < rows.end; ++t) {
            float* row = normed.data() + size_t(t) * m.hidden;
            normalise(hidden.data() + size_t(t) * m.hidden, norm, m.hidden, m.eps, row);
            for (int i = 0; i < weight.count; ++i) inputs[i].take(weight.parts[i], t, row, 0, m.hidden);
        }
#pragma omp barrier
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
#pragma omp barrier
    }

    void prepare_input(const FusedWeight& weight, float* x, int count, const Team& team) {
        prepare_pieces(weight, x, weight.in, count, team, [](float*, int, int) {});
    }

    // Gates and what they gate stand beside one another in `mixed`.
    void prepare_gated(const FusedWeight& weight, int count, const Team& team) {
        const int inner = weight.in;
        prepare_pieces(weight, mixed.data(), 2 * inner, count, team, [inner](float* row, int begin, int end) {
            for (int i = begin; i < end; i += LANES)
                store(row + i, _mm512_mul_ps(silu(load(row + i)), load(row + inner + i)));
        });
    }

    template <typename Put>
    void multiply(const FusedWeight& weight, int count, const Team& team, Put put) {
        const double start = omp_get_wtime();
        int before = 0;
        for (int i = 0; i < weight.count; before += weight.parts[i++].out)
            inputs[i].multiply(weight.parts[i], count, team.thread, team.threads,
                               [&](int t, int o, __mmask16 lanes, __m512 value) { put(t, before + o, lanes, value); });
#pragma omp barrier
        if (team.thread == 0) seconds_in_products += omp_get_wtime() - start;
    }

    void multiply_into(const FusedWeight& weight, float* y, int count, const Team& team) {
        multiply(weight, count, team, [&](int t, int o, __mmask16 lanes, __m512 value) {
            store(y + size_t(t) * weight.out + o, value, lanes);
        });
    }

    void multiply_onto_hidden(const FusedWeight& weight, int count, const Team& team) {
        multiply(weight, count, team, [&](int t, int o, __mmask16 lanes, __m512 value) {
            float* to = hidden.data() + size_t(t) * m.hidden + o;
            store(to, _mm512_add_ps(_mm512_maskz_loadu_ps(lanes, to), value), lanes);
        });
    }

    // Norm and rotate queries and keys as the layer has it; keys and values go to the cache.
    void place_heads(const Layer& layer, X* keys, X* values, const Place& place, const Team& team) {
        const int all = m.heads + 2 * m.kv_heads, size = m.head_size;
        const Range share = team.share(place.count * all);
        for (int at = share.begin; at < share.end; ++at) {
            const int t = at / all, head = at % all;
            float* x = mixed.data() + size_t(at) * size;
            const size_t position = place.position + t;
            if (head >= m.heads + m.kv_heads) {
                keep(x, 1, values + (size_t(head - m.heads - m.kv_heads) * place.capacity + position) * size);
                continue;
            }
            if (layer.head_norms) normalise(x, layer.head_norms + head * size, size, m.eps, x);
            if (layer.rotates) rotate(x, place.cos + size_t(t) * size, place.sin + size_t(t) * size, size);
            if (head >= m.heads)
                keep(x, 1, keys + (size_t(head - m.heads) * place.capacity + position) * size);
            else
                keep(x, 1 / std::sqrt(float(size)), queries.data() + (size_t(t) * m.heads + head) * size);
        }
#pragma omp barrier
    }

    void keep(const float* x, float factor, X* to) const {
        for (int d = 0; d < m.head_size; d += LANES) store(to + d, _mm512_mul_ps(load(x + d), _mm512_set1_ps(factor)));
    }

    // The queries of a key-value head share its keys and values; they are split where threads outnumber these heads.
    void attend_heads(const Layer& layer, const X* keys, const X* values, const Place& place, const Team& team) {
        const int group = m.heads / m.kv_heads, rows = place.count * group, size = m.head_size;
        const int splits = std::clamp((team.threads + m.kv_heads - 1) / m.kv_heads, 1, rows);
        const Range share = team.share(m.kv_heads * splits);
        std::vector<Query<X>> some;
        for (int at = share.begin; at < share.end; ++at) {
            const int head = at / splits;
            const Range part(rows, at % splits, splits);
            some.clear();
            for (int row = part.begin; row < part.end; ++row) {
                const int last = place.position + row / group;
                const size_t from = (size_t(row / group) * m.heads + head * group + row % group) * size;
                const int first = layer.window ? std::max(0, last - layer.window + 1) : 0;
                some.push_back({queries.data() + from, last, first, attended.data() + from});
            }
            const size_t begin = size_t(head) * place.capacity * size;
            attend(some, keys + begin, values + begin, size, rooms.data() + size_t(team.thread) * LANES * size);
        }
#pragma omp barrier
    }
};

}  // namespace quasar
