// Causal attention of whole rows in bfloat16: a few queries over the keys that they see, scores and sums in float32.

#pragma once

#include <vector>

#include "token_sums.h"

namespace quasar {

// Tensors [texts, heads, length, size], by their strides in numbers; a head's numbers lie beside one another.
struct Heads {
    uint16_t* first;
    int64_t text, head, token;
    uint16_t* at(int64_t t, int64_t h) const { return first + t * text + h * head; }
};

struct AttentionShape {
    int heads, kv_heads, length, size;
    float scale;
};

// Queries of one head of one text over its keys and values.
class HeadAttention {
public:
    HeadAttention(const AttentionShape& shape, const uint16_t* keys, int64_t key_token, const uint16_t* values,
                  int64_t value_token)
        : shape(shape), padded((shape.length + WHOLE - 1) / WHOLE * WHOLE),
          key_words(size_t(padded) * steps(shape.size)), value_words(size_t(steps(padded)) * shape.size),
          scores(size_t(TILE_ROWS) * padded), shares(scores.size()), share_words(size_t(steps(padded)) * TILE_ROWS),
          query_words(size_t(steps(shape.size)) * TILE_ROWS) {
        for (int key = 0; key < shape.length; ++key)
            for (int step = 0; step < steps(shape.size); ++step)
                key_words[(size_t(key / TILE_COLUMNS) * steps(shape.size) + step) * TILE_COLUMNS + key % TILE_COLUMNS] =
                    Terms::of(keys + key * key_token + step * Terms::TOKENS, true, 1);
        for (int key = 0; key < shape.length; key += Terms::TOKENS)
            for (int i = 0; i < shape.size; ++i)
                value_words[(size_t(i / VALUE_COLUMNS) * steps(padded) + key / Terms::TOKENS) * VALUE_COLUMNS +
                            i % VALUE_COLUMNS] =
                    Terms::of(values + key * value_token + i, key + 1 < shape.length, int(value_token));
    }

    // Of the queries from `begin` on, as many as a tile has.
    void attend(int begin, const uint16_t* queries, int64_t query_token, uint16_t* to, int64_t to_token) {
        const int rows = std::min(TILE_ROWS, shape.length - begin), seen = begin + rows;
        for (int step = 0; step < steps(shape.size); ++step)
            for (int row = 0; row < rows; ++row)
                query_words[step * TILE_ROWS + row] =
                    Terms::of(queries + (begin + row) * query_token + step * Terms::TOKENS, true, 1);
        for (int key = 0; key < seen; key += TILE_COLUMNS)
            Tile<TILE_PARTS>(query_words.data(), key_words.data() + size_t(key) * steps(shape.size), steps(shape.size))
                .put(scores.data() + key, padded);
        float sums[TILE_ROWS];
        for (int row = 0; row < rows; ++row) sums[row] = weigh(row, begin + row + 1, seen);
        for (int step = 0; step < steps(seen); ++step)
            for (int row = 0; row < rows; ++row)
                share_words[step * TILE_ROWS + row] =
                    Terms::of(shares.data() + size_t(row) * padded + step * Terms::TOKENS, true, 1);
        for (int i = 0; i < shape.size; i += VALUE_COLUMNS) {
            float mixed[TILE_ROWS * VALUE_COLUMNS];
            Tile<VALUE_PARTS>(share_words.data(), value_words.data() + size_t(i) * steps(padded), steps(seen))
                .put(mixed, VALUE_COLUMNS);
            for (int row = 0; row < rows; ++row)
                for (int j = 0; j < VALUE_COLUMNS; j += LANES) {
                    const Lanes there = first_lanes(VALUE_COLUMNS - j);
                    store(to + (begin + row) * to_token + i + j,
                          load(mixed + row * VALUE_COLUMNS + j, there) * (1 / sums[row]), there);
                }
        }
    }

private:
    static constexpr int VALUE_PARTS = 2, VALUE_COLUMNS = VALUE_PARTS * WIDTH;

    static constexpr int WHOLE = std::max(TILE_COLUMNS, LANES);
    static_assert(WHOLE % TILE_COLUMNS == 0 && WHOLE % LANES == 0);

    AttentionShape shape;
    int padded;  // keys, to whole tiles and whole registers
    std::vector<uint32_t> key_words, value_words;
    std::vector<float> scores;
    std::vector<uint16_t> shares;
    std::vector<uint32_t> share_words, query_words;

    static int steps(int numbers) { return int(Panels<1>::steps_of(numbers)); }

    // The exponentials of a row's scores over the keys that it sees, and 0 for the others; their sum.
    float weigh(int row, int sees, int seen) {
        const float* own = scores.data() + size_t(row) * padded;
        Floats most = -std::numeric_limits<float>::infinity(), sum = 0.0f;
        for (int key = 0; key < sees; key += LANES) {
            const Lanes there = first_lanes(sees - key);
            most = larger(most, select(there, load(own + key, there), most));
        }
        const float top = largest_of(most);
        for (int key = 0; key < seen + 1 && key < padded; key += LANES) {
            const Lanes there = first_lanes(sees - key);
            const Floats share = select(there, exponential((load(own + key, there) - top) * shape.scale), 0.0f);
            sum = sum + share;
            store(shares.data() + size_t(row) * padded + key, share);
        }
        return sum_of(sum);
    }
};

inline void attend_causally(const AttentionShape& shape, const Heads& queries, const Heads& keys, const Heads& values,
                            const Heads& to, int64_t texts, int threads) {
    for_each(threads, texts * shape.heads, 1, [&](int64_t unit) {
        const int64_t text = unit / shape.heads, head = unit % shape.heads, kv = head * shape.kv_heads / shape.heads;
        HeadAttention own(shape, keys.at(text, kv), keys.token, values.at(text, kv), values.token);
        for (int begin = 0; begin < shape.length; begin += TILE_ROWS)
            own.attend(begin, queries.at(text, head), queries.token, to.at(text, head), to.token);
    });
}

}  // namespace quasar
