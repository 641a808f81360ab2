// Attention's products in AMX's tiles, of up to sixteen queries of one key-value head and a span of positions.
//
// Scores C [queries, 16 positions] are A, queries [queries, 32 channels], times B, keys [16 words, 16 positions]; what is
// mixed, C [queries, 16 channels], is A, shares [queries, 16 positions], times B, values [8 words, 16 channels]. A span has
// keys and values in these orders already. A tile adds in an order of its own, so every number of queries takes tiles: then
// a query's sums do not depend on the others, to the last bit.

#pragma once

#include "span.h"
#include "tiles.h"

namespace quasar {

constexpr int TILE_WORDS = TILE_BYTES / 4, HALF_WORDS = TILE_WORDS / 2;
static_assert(Numbers<uint16_t>::STEPS == HALF_WORDS, "a sixteen of values is half a tile's rows");

// C 0 to 3; A 4 and B 5 of 16 words, A 6 and B 7 of 8.
inline TileShapes shapes_of_attention(int queries) {
    TileShapes shapes;
    shapes.set(0, 4, queries, TILE_BYTES);
    shapes.set(4, 1, queries, TILE_BYTES), shapes.set(5, 1, TILE_WORDS, TILE_BYTES);
    shapes.set(6, 1, queries, TILE_BYTES / 2), shapes.set(7, 1, HALF_WORDS, TILE_BYTES);
    return shapes;
}

#define QUASAR_ZERO(TILE) _tile_zero(TILE);
#define QUASAR_STORE(TILE) _tile_stored(TILE, &scores[0][TILE], sizeof scores[0]);
#define QUASAR_SCORE(TILE)                                              \
    _tile_loadd(5, keys + TILE * LANES, SPAN * sizeof(float));          \
    _tile_dpbf16ps(TILE, 4, 5);
#define QUASAR_SCORE_LAST(TILE)                                         \
    _tile_loadd(7, keys + TILE * LANES, SPAN * sizeof(float));          \
    _tile_dpbf16ps(TILE, 6, 7);
#define QUASAR_LOAD_MIX(TILE) \
    if (TILE < columns) _tile_loadd(TILE, mix + TILE * LANES, row);
#define QUASAR_STORE_MIX(TILE) \
    if (TILE < columns) _tile_stored(TILE, mix + TILE * LANES, row);
#define QUASAR_MIX(TILE)                                  \
    if (TILE < columns) {                                 \
        _tile_loadd(7, values + TILE * LANES, row);       \
        _tile_dpbf16ps(TILE, 6, 7);                       \
    }

// The products of the span's queries with all its keys.
inline void score_in_tiles(const Span<uint16_t>& span, Floats (*scores)[SIXTEENS]) {
    static_assert(SIXTEENS == 4 && sizeof(Floats) == TILE_BYTES, "a row of C is a register");
    const float *keys = span.keys, *queries = span.queries;
    const size_t row = span.words * sizeof(float);
    QUASAR_WITH_EACH(QUASAR_ZERO)
    int word = 0;
    for (; word + TILE_WORDS <= span.words; word += TILE_WORDS, keys += TILE_WORDS * SPAN) {
        _tile_loadd(4, queries + word, row);
        QUASAR_WITH_EACH(QUASAR_SCORE)
    }
    if (word < span.words) {
        _tile_loadd(6, queries + word, row);
        QUASAR_WITH_EACH(QUASAR_SCORE_LAST)
    }
    QUASAR_WITH_EACH(QUASAR_STORE)
}

// Adds to mixes [queries, D] the values, each times its share.
inline void weigh_in_tiles(const Span<uint16_t>& span, const float (*shares)[SPAN], const Lanes* seen, float* mixes) {
    const size_t row = span.size * sizeof(float);
    for (int d = 0; d < span.size; d += 4 * LANES) {
        const int columns = std::min((span.size - d) / LANES, 4);
        float* mix = mixes + d;
        QUASAR_WITH_EACH(QUASAR_LOAD_MIX)
        for (int i = 0; i < SIXTEENS; ++i) {
            if (!seen[i]) continue;
            const float* values = span.values_of(i) + d;
            _tile_loadd(6, shares[0] + i * LANES, sizeof shares[0]);
            QUASAR_WITH_EACH(QUASAR_MIX)
        }
        QUASAR_WITH_EACH(QUASAR_STORE_MIX)
    }
}

#undef QUASAR_ZERO
#undef QUASAR_STORE
#undef QUASAR_SCORE
#undef QUASAR_SCORE_LAST
#undef QUASAR_LOAD_MIX
#undef QUASAR_STORE_MIX
#undef QUASAR_MIX

// `count` queries over the span from `start` on. Behind the span's queries there is place for [queries, D] numbers.
inline void attend_in_tiles(const Span<uint16_t>& span, int start, float cap, Query<uint16_t>* queries, int count) {
    Lanes seen[SIXTEENS] = {};
    for (int q = 0; q < count; ++q) {
        Numbers<uint16_t>::put_words(queries[q].q, span.size, span.queries + q * span.words);
        for (int i = 0; i < SIXTEENS; ++i) seen[i] |= seen_by(queries[q], start + i * LANES);
    }
    settle(span.queries);
    Floats scores[MOST_IN_TILE][SIXTEENS];
    score_in_tiles(span, scores);
    alignas(64) float shares[MOST_IN_TILE][SPAN];
    float* const mixes = span.queries + MOST_IN_TILE * span.words;
    for (int q = 0; q < count; ++q) {
        const float fade = to_shares(queries[q], scores[q], start, cap, shares[q]);
        for (int d = 0; d < span.size; d += LANES) store(mixes + q * span.size + d, load(queries[q].out + d) * fade);
    }
    settle(mixes);
    weigh_in_tiles(span, shares, seen, mixes);
    for (int q = 0; q < count; ++q) std::copy_n(mixes + q * span.size, span.size, queries[q].out);
}

}  // namespace quasar
