// Grouped-query attention of a pass over its cache: one key-value head at a time, a few queries, all positions seen.
//
// Spans are summed in their order with a running maximum (Milakov and Gimelshein, 2018). Queries come in tiles whose sums
// fill the registers, or in tiles of AMX.

#pragma once

#include <optional>

#include "span.h"
#ifdef QUASAR_TILES
#include "attention_tiles.h"
#endif

namespace quasar {

// Of a tile: queries, sixteens of keys, registers of a value's channels.
constexpr int QUERIES = 4, BESIDE = WIDTH == LANES ? SIXTEENS : 1, CHANNELS = WIDTH == 8 ? 2 : 4;
constexpr int POSITIONS_AHEAD = LANES;  // positions that are fetched before they are read: measured

#ifdef QUASAR_TILES
template <typename X>
constexpr bool TILED = std::is_same_v<X, uint16_t>;
constexpr int MOST_QUERIES = MOST_IN_TILE;
#else
template <typename X>
constexpr bool TILED = false;
constexpr int MOST_QUERIES = QUERIES;
#endif
// 32-bit lanes for each channel of a head, of what a thread works in: a span, queries, and what they mix.
constexpr int ROOM = 2 * SPAN + 2 * MOST_QUERIES;

// The products of COUNT queries with BESIDE sixteens of keys.
template <typename X, int COUNT>
void score(const Span<X>& span, int sixteen, Floats (*scores)[SIXTEENS]) {
    constexpr int REGISTERS = BESIDE * PARTS;
    Part sums[COUNT][REGISTERS];
    for (auto& some : sums)
        for (auto& sum : some) sum = spread(0);
    const float *keys = span.keys + sixteen * LANES, *queries = span.queries;
    for (int word = 0; word < span.words; ++word, keys += SPAN, ++queries) {
        Part key[REGISTERS];
#pragma GCC unroll 4
        for (int k = 0; k < REGISTERS; ++k) key[k] = load_part(keys + k * WIDTH);
#pragma GCC unroll 4
        for (int q = 0; q < COUNT; ++q) {
            const Part query = spread(queries[q * span.words]);
#pragma GCC unroll 4
            for (int k = 0; k < REGISTERS; ++k) sums[q][k] = Numbers<X>::add_words(sums[q][k], query, key[k]);
        }
    }
    for (int q = 0; q < COUNT; ++q)
        for (int k = 0; k < REGISTERS; ++k) scores[q][sixteen + k / PARTS].part[k % PARTS] = sums[q][k];
}

// out · fade + values, each times its share, of COUNT queries in REGISTERS of channels from channel `d` on.
template <typename X, int COUNT, int REGISTERS>
void weigh(const Span<X>& span, const float (*shares)[SPAN], const Lanes* seen, const float* fades, int d, Query<X>* queries) {
    using Kind = Numbers<X>;
    Part sums[COUNT][REGISTERS];
    for (int q = 0; q < COUNT; ++q)
        for (int c = 0; c < REGISTERS; ++c)
            sums[q][c] = load_part(queries[q].out + d + c * WIDTH) * spread(fades[q]);
    for (int i = 0; i < SIXTEENS; ++i) {
        if (!seen[i]) continue;
        const float* values = span.values_of(i) + d;
        for (int step = 0; step < Kind::STEPS; ++step, values += span.size) {
            Part value[REGISTERS];
#pragma GCC unroll 4
            for (int c = 0; c < REGISTERS; ++c) value[c] = load_part(values + c * WIDTH);
#pragma GCC unroll 4
            for (int q = 0; q < COUNT; ++q) {
                const Part share = spread(shares[q][i * LANES + step]);
#pragma GCC unroll 4
                for (int c = 0; c < REGISTERS; ++c) sums[q][c] = Kind::add_words(sums[q][c], share, value[c]);
            }
        }
    }
    for (int q = 0; q < COUNT; ++q)
        for (int c = 0; c < REGISTERS; ++c) store_part(queries[q].out + d + c * WIDTH, sums[q][c]);
}

// COUNT queries over the span from `start` on.
template <typename X, int COUNT>
void attend_to(const Span<X>& span, int start, float cap, Query<X>* queries) {
    Lanes seen[SIXTEENS] = {};
    for (int q = 0; q < COUNT; ++q) {
        Numbers<X>::put_words(queries[q].q, span.size, span.queries + q * span.words);
        for (int i = 0; i < SIXTEENS; ++i) seen[i] |= seen_by(queries[q], start + i * LANES);
    }
    Floats scores[COUNT][SIXTEENS];
    for (int i = 0; i < SIXTEENS; i += BESIDE)
        if (BESIDE > 1 || seen[i]) score<X, COUNT>(span, i, scores);
    alignas(64) float shares[COUNT][SPAN];
    float fades[COUNT];
    for (int q = 0; q < COUNT; ++q) fades[q] = to_shares(queries[q], scores[q], start, cap, shares[q]);
    int d = 0;
    for (; d + CHANNELS * WIDTH <= span.size; d += CHANNELS * WIDTH)
        weigh<X, COUNT, CHANNELS>(span, shares, seen, fades, d, queries);
    for (; d < span.size; d += WIDTH) weigh<X, COUNT, 1>(span, shares, seen, fades, d, queries);
}

template <typename X>
void attend_tile(const Span<X>& span, int start, float cap, Query<X>* queries, int count) {
#ifdef QUASAR_TILES
    if constexpr (TILED<X>) return attend_in_tiles(span, start, cap, queries, count);
#endif
    switch (count) {
        case 1: return attend_to<X, 1>(span, start, cap, queries);
        case 2: return attend_to<X, 2>(span, start, cap, queries);
        case 3: return attend_to<X, 3>(span, start, cap, queries);
        default: return attend_to<X, QUERIES>(span, start, cap, queries);
    }
}

// The sixteens of a span of which some positions stand on a query's own path: keys and values are copied in the order of
// positions, so that the sums are those of a pass over that path alone. `own` has place for 2 · 16 rows of the cache.
template <typename X>
void follow_path(const Query<X>& query, const X* keys, const X* values, int start, const Span<X>& span, X* own) {
    const int size = span.size;
    for (int i = 0; i < SIXTEENS; ++i) {
        const int begin = start + i * LANES, left = std::min(query.last + 1 - begin, LANES);
        if (begin + LANES <= query.branch || left <= 0) continue;
        for (int p = 0; p < left; ++p) {
            const int position = begin + p;
            const size_t from = size_t(position < query.branch ? position : query.path[position - query.branch]) * size;
            std::memcpy(own + p * size, keys + from, size * sizeof(X));
            std::memcpy(own + (LANES + p) * size, values + from, size * sizeof(X));
        }
        span.fill(i, own, own + LANES * size, left);
    }
}

// Sets out for the sixteen positions from `states` on, which later reads will find near.
template <typename X>
void fetch(const X* states, int size) {
    auto from = reinterpret_cast<const char*>(states);
    for (size_t byte = 0; byte < LANES * size * sizeof(X); byte += 64) __builtin_prefetch(from + byte);
}

// Some queries over those `positions` of the keys and values [.., D] of one head, scores below a soft cap where it is not 0:
// to their sums, which are not divided by the shares' total yet. `room` has place
// for ROOM · D numbers, `own` for 2 · 16 rows of the cache where queries stand in a tree.
template <typename X>
void attend(std::vector<Query<X>>& queries, Range positions, const X* keys, const X* values, int size, float cap,
            float* room, X* own) {
    int first = std::numeric_limits<int>::max(), last = 0;
    for (auto& query : queries) {
        first = std::min(first, query.first), last = std::max(last, query.last);
        query.largest = LEAST, query.total = 0;
        std::fill(query.out, query.out + size, 0.0f);
    }
    last = std::min(last, positions.end - 1);
    const int count = int(queries.size()), most = TILED<X> ? MOST_QUERIES : QUERIES;
#ifdef QUASAR_TILES
    std::optional<Configured> configured;
    if (TILED<X>) configured.emplace(shapes_of_attention(Tiles(count, most).next()));
#endif
    const Span<X> span(size, room);
    const int sinks = queries.front().sinks, branch = queries.front().branch;  // of them all
    const int begin = std::max(positions.begin, first / SPAN * SPAN);
    for (int start = positions.begin < sinks ? positions.begin : begin; start <= last; start = std::max(start + SPAN, begin)) {
        for (int i = 0; i < SIXTEENS; ++i) {
            const int at = start + i * LANES;
            const size_t from = size_t(at) * size, ahead = size_t(at + POSITIONS_AHEAD) * size;
            if (at > last || at + LANES > branch || (at + LANES <= first && at >= sinks)) continue;
            if (at + POSITIONS_AHEAD <= last) fetch(keys + ahead, size), fetch(values + ahead, size);
            span.fill(i, keys + from, values + from, std::min(last + 1 - at, LANES));
        }
        Query<X>* next = queries.data();
        for (Tiles tiles(count, start + SPAN > branch ? 1 : most); next < queries.data() + count;) {
            if (start + SPAN > branch) follow_path(*next, keys, values, start, span, own);
            const int some = tiles.next();
            attend_tile(span, start, cap, next, some);
            next += some;
        }
    }
}

// A query's sums become means, once they are over all that it sees.
template <typename X>
void divide_by_shares(const Query<X>& query, int size) {
    for (int d = 0; d < size; d += LANES) store(query.out + d, load(query.out + d) / query.total);
}

}  // namespace quasar
