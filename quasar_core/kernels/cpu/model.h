// A decoder as Python describes it: the tensors and switches of each block (`kernels/cpu/library.py`).

#pragma once

#include "experts.h"
#include "product_input.h"
#include "recurrence.h"

namespace quasar {

enum Gates { BEHIND_QUERIES = 1, BEHIND_VALUES };  // each head's behind its queries, or all behind the last values

struct Layer {
    const float *input_norm, *out_norm, *mlp_norm, *down_norm;  // [hidden], or null
    const float* head_norms;                                    // [query heads + key heads, D], or null
    const float* activation;                                    // its weights, or null
    FusedWeight qkv, out, gate_up, down;
    FusedWeight input_gate, input_out;  // of the block's own input, or without parts
    const float* input_out_norm;        // [hidden]
    float scalar;                       // times what the block gives
    int shares;                         // keys and values are an earlier block's
    int window;               // positions that a token sees, its own included; 0 is all of them
    int sinks;                // the text's first positions that it sees beside those of a window
    int rope;                 // which rotary embedding, or -1
    int channels;             // of a head that rotate
    int kv_heads, head_size;
    const Experts* experts;   // in the place of gate_up and down, or beside them, or null
    const Recurrence* recurrence;  // in the place of attention, or null: then qkv is what its rule reads
};

struct Model {
    int hidden, heads, layers, is_bfloat16;
    int activation, gated;             // of the MLP
    int norms_whole_rows, norms_last;  // of queries and keys: of all heads at once; after the rotation
    int interleaved;                   // partners in a rotation
    int gates_attention;               // the place of the gates of what heads mix, or 0
    int norms_embedding;               // without a weight
    float eps, behind_eps;             // of norms; of those behind attention and MLP
    float embedding_scale, residual_scale, scores_scale, scores_cap, logits_scale, logits_cap;  // a cap of 0: none
    const void* embedding;             // [vocabulary, hidden]
    const float* norm;                 // [hidden]
    FusedWeight head;
    const int32_t* head_tokens;        // whose logits the head gives, or null: then it gives all
    int vocabulary;                    // logits of a row
    int inputs_size, norms_values;   // P, of the inputs that each block has of its own, or 0; weightless norms of values
    const void* inputs_embedding;    // [vocabulary, layers · P]
    FusedWeight inputs_projection;   // hidden → layers · P
    const float* inputs_norm;        // [P]
    float inputs_scale;              // of that embedding
    FusedWeight joint;               // 2·hidden → hidden, of a head that goes on from a model's rows, or without parts
    const float *joint_embedding_norm, *joint_rows_norm;  // [hidden], of its two inputs
    const Layer* layer;

    // Where the gate of number i of what heads mix stands among a token's outputs of qkv.
    int gate_of(const Layer& layer, int i) const {
        const int size = layer.head_size;
        if (gates_attention == BEHIND_VALUES) return (heads + 2 * layer.kv_heads) * size + i;
        return (2 * (i / size) + 1) * size + i % size;
    }

    // Logits of the head's outputs from o on into a row; where it gives some tokens' the others stay as they are.
    void place_logits(float* row, int o, Lanes lanes, Floats value) const {
        if (!head_tokens) return store(row + o, value, lanes);
        alignas(64) float values[LANES];
        store(values, value);
        for (unsigned left = lanes; left; left &= left - 1) {
            const int lane = __builtin_ctz(left);
            row[head_tokens[o + lane]] = values[lane];
        }
    }
};

}  // namespace quasar
