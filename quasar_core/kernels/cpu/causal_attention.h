// Attention of many queries in bfloat16, as of a prompt: a few of them over the keys that they see, scores and sums in float32.
//
// A query's sums depend neither on the queries beside it nor on the number of threads.

#pragma once

#include <vector>

#include "elementwise.h"
#include "token_sums.h"

namespace quasar {

// Tensors [texts, heads, tokens, size], by their strides in numbers; a head's numbers lie beside one another.
struct Heads {
    uint16_t* first;
    int64_t text, head, token;
    uint16_t* at(int64_t t, int64_t h) const { return first + t * text + h * head; }
};

struct AttentionShape {
    int heads, kv_heads;
    int queries, keys;  // the last query sees the last key, each one before it a key less
    int size;
    int window;        // keys that a query sees; 0: all before it, and its own
    float scale, cap;  // scores stay below a soft cap where it is not 0
};

constexpr int VALUE_PARTS = 2, VALUE_COLUMNS = VALUE_PARTS * WIDTH;
constexpr int WHOLE = std::max(TILE_COLUMNS, LANES);  // keys
static_assert(WHOLE % TILE_COLUMNS == 0 && WHOLE % LANES == 0 && WHOLE % Terms<uint16_t>::TOKENS == 0);

inline int steps_of(int numbers) { return int(Panels<uint16_t, 1>::steps_of(numbers)); }

// Keys and values of one head, in the order in which tiles read them.
struct PackedHead {
    int padded;  // keys, to whole tiles and whole registers
    std::vector<uint32_t> keys, values;

    explicit PackedHead(const AttentionShape& shape)
        : padded((shape.keys + WHOLE - 1) / WHOLE * WHOLE), keys(size_t(padded) * steps_of(shape.size)),
          values(size_t(steps_of(padded)) * shape.size) {}

    // With the keys and values from `begin` on, a multiple of WHOLE, to `end`.
    void fill(const AttentionShape& shape, int begin, int end, const uint16_t* key, int64_t key_token,
              const uint16_t* value, int64_t value_token) {
        const int steps = steps_of(shape.size);
        for (int k = begin; k < end; ++k) {
            uint32_t* to = keys.data() + size_t(k / TILE_COLUMNS) * steps * TILE_COLUMNS + k % TILE_COLUMNS;
            for (int step = 0; step < steps; ++step)
                to[step * TILE_COLUMNS] = Terms<uint16_t>::of(key + k * key_token + step * Terms<uint16_t>::TOKENS, true, 1);
        }
        for (int k = begin; k < end; k += Terms<uint16_t>::TOKENS) {
            const uint16_t* from = value + k * value_token;
            for (int i = 0; i < shape.size; i += VALUE_COLUMNS) {
                uint32_t* to = values.data() + size_t(i) * steps_of(padded) + k / Terms<uint16_t>::TOKENS * VALUE_COLUMNS;
                for (int j = 0; j < VALUE_COLUMNS; ++j)
                    to[j] = Terms<uint16_t>::of(from + i + j, k + 1 < shape.keys, int(value_token));
            }
        }
    }
};

// Queries of one head over its keys and values.
class HeadAttention {
public:
    HeadAttention(const AttentionShape& shape, const PackedHead& head)
        : shape(shape), head(head), scores(size_t(TILE_ROWS) * head.padded), shares(scores.size()),
          share_words(size_t(steps_of(head.padded)) * TILE_ROWS),
          query_words(size_t(steps_of(shape.size)) * TILE_ROWS) {}

    // Of the queries from `begin` on, as many as a tile has.
    void attend(int begin, const uint16_t* queries, int64_t query_token, uint16_t* to, int64_t to_token) {
        const int rows = std::min(TILE_ROWS, shape.queries - begin), position = shape.keys - shape.queries + begin;
        const int from = first_seen(position) / WHOLE * WHOLE, seen = position + rows, steps = steps_of(shape.size);
        for (int step = 0; step < steps; ++step)
            for (int row = 0; row < rows; ++row)
                query_words[step * TILE_ROWS + row] =
                    Terms<uint16_t>::of(queries + (begin + row) * query_token + step * Terms<uint16_t>::TOKENS, true, 1);
        for (int key = from; key < seen; key += TILE_COLUMNS)
            Tile<uint16_t, TILE_PARTS>(query_words.data(), head.keys.data() + size_t(key) * steps, steps)
                .put(scores.data() + key, head.padded);
        float sums[TILE_ROWS];
        for (int row = 0; row < rows; ++row) sums[row] = weigh(row, position + row, from, seen);
        const int skipped = steps_of(from);
        for (int step = skipped; step < steps_of(seen); ++step)
            for (int row = 0; row < rows; ++row)
                share_words[step * TILE_ROWS + row] =
                    Terms<uint16_t>::of(shares.data() + size_t(row) * head.padded + step * Terms<uint16_t>::TOKENS, true, 1);
        for (int i = 0; i < shape.size; i += VALUE_COLUMNS) {
            float mixed[TILE_ROWS * VALUE_COLUMNS];
            Tile<uint16_t, VALUE_PARTS>(share_words.data() + skipped * TILE_ROWS,
                              head.values.data() + size_t(i) * steps_of(head.padded) + skipped * VALUE_COLUMNS,
                              steps_of(seen) - skipped)
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
    const AttentionShape& shape;
    const PackedHead& head;
    std::vector<float> scores;
    std::vector<uint16_t> shares;
    std::vector<uint32_t> share_words, query_words;

    int first_seen(int position) const { return shape.window ? std::max(position + 1 - shape.window, 0) : 0; }

    // The exponentials of a row's scores over the keys that it sees, and 0 for others between `from` and `seen`; their sum.
    float weigh(int row, int position, int from, int seen) {
        float* own = scores.data() + size_t(row) * head.padded;
        const int first = first_seen(position), last = position + 1;
        Floats most = -std::numeric_limits<float>::infinity(), sum = 0.0f;
        for (int key = from; key < last; key += LANES) {
            Floats score = load(own + key) * shape.scale;
            if (shape.cap) score = capped(score, shape.cap);
            store(own + key, score);
            most = larger(most, select(between(first - key, last - key), score, most));
        }
        const float top = largest_of(most);
        for (int key = from; key < seen + 1 && key < head.padded; key += LANES) {
            const Floats share = select(between(first - key, last - key), exponential(load(own + key) - top), 0.0f);
            sum = sum + share;
            store(shares.data() + size_t(row) * head.padded + key, share);
        }
        return sum_of(sum);
    }

    static Lanes between(int first, int last) { return Lanes(first_lanes(last) & ~first_lanes(first)); }
};

constexpr int QUERIES_AT_ONCE = 8 * TILE_ROWS, KEYS_AT_ONCE = 4 * WHOLE;  // of a thread, before it looks for more
constexpr size_t PACKED_BYTES = size_t(32) << 20;                          // of heads whose queries attend side by side

// Heads `first` to `last` of keys and values, packed, and all queries over them.
inline void attend_to_heads(const AttentionShape& shape, const Heads& queries, const Heads& keys, const Heads& values,
                            const Heads& to, int64_t text, int first, int last, std::vector<PackedHead>& packed,
                            int threads) {
    const int64_t stretches = (shape.keys + KEYS_AT_ONCE - 1) / KEYS_AT_ONCE;
    for_each(threads, (last - first) * stretches, 1, [&](int64_t unit) {
        const int64_t kv = first + unit / stretches;
        const int begin = int(unit % stretches) * KEYS_AT_ONCE, end = std::min(begin + KEYS_AT_ONCE, shape.keys);
        packed[kv - first].fill(shape, begin, end, keys.at(text, kv), keys.token, values.at(text, kv), values.token);
    });
    const int64_t group = shape.heads / shape.kv_heads, heads = (last - first) * group;
    const int64_t parts = (shape.queries + QUERIES_AT_ONCE - 1) / QUERIES_AT_ONCE;
    for_each(threads, heads * parts, 1, [&](int64_t unit) {
        const int64_t head = first * group + unit % heads, part = parts - 1 - unit / heads;  // those that see most first
        HeadAttention own(shape, packed[head / group - first]);
        const int begin = int(part) * QUERIES_AT_ONCE, end = std::min(begin + QUERIES_AT_ONCE, shape.queries);
        for (int row = begin; row < end; row += TILE_ROWS)
            own.attend(row, queries.at(text, head), queries.token, to.at(text, head), to.token);
    });
}

inline void attend_causally(const AttentionShape& shape, const Heads& queries, const Heads& keys, const Heads& values,
                            const Heads& to, int64_t texts, int threads) {
    const PackedHead empty(shape);
    const size_t bytes = (empty.keys.size() + empty.values.size()) * sizeof(uint32_t);
    const int at_once = int(std::clamp<size_t>(PACKED_BYTES / std::max<size_t>(bytes, 1), 1, shape.kv_heads));
    std::vector<PackedHead> packed(at_once, empty);
    for (int64_t text = 0; text < texts; ++text)
        for (int first = 0; first < shape.kv_heads; first += at_once)
            attend_to_heads(shape, queries, keys, values, to, text, first, std::min(first + at_once, shape.kv_heads),
                            packed, threads);
}

}  // namespace quasar
