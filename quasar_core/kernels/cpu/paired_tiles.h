// A product with weights of bfloat16 in AMX's tiles: A are weights [16 outputs, 32 inputs], as they lie in their rows or
// restored from 12 bits; B the activations of up to 16 rows, in pairs [inputs / 2, rows]; C sums [16 outputs, rows].
//
// A tile adds 32 products in an order of its own, so every number of rows takes tiles: then a row's sums do not depend on
// the others, to the last bit. A strip's weights are read once for up to four tiles of rows.

#pragma once

#include "compressed.h"
#include "tiles.h"

namespace quasar {

constexpr int PAIRS = TILE_BYTES / 4, INPUTS = 2 * PAIRS;  // of a row of A
constexpr int ROW_TILES = 4;  // tiles of rows that are multiplied with a tile of weights

// Rows as B takes them: of each tile [in / 2, height] pairs.
struct PairedRows {
    const uint32_t* pairs;
    int in;
    RowTiles tiles;
    size_t size() const { return size_t(in) / 2 * tiles.height; }  // of a tile
};

// Rows of `in` numbers become columns of pairs, [in / 2, height]; 16 × 16 pairs at a time.
inline void pair_rows(const uint16_t* x, int in, int height, uint32_t* to) {
    if (height == 1) return void(std::memcpy(to, x, in * sizeof *x));
    const Lanes lanes = first_lanes(height);
    for (int first = 0; first < in / 2; first += PAIRS) {
        const int left = std::min(in / 2 - first, PAIRS);
        Part rows[LANES];
        for (int t = 0; t < LANES; ++t) rows[t] = t < height ? load_words(x + size_t(t) * in, first, left) : spread(0);
        transpose(rows);
        for (int k = 0; k < left; ++k)
            store_part(reinterpret_cast<float*>(to) + size_t(first + k) * height, rows[k], lanes);
    }
}

// All rows of a pass; each thread lays them out for itself, so that no barrier is needed.
inline PairedRows pair_all(const uint16_t* x, int in, int count) {
    static thread_local Buffer<uint32_t> room;
    const RowTiles tiles(count, RowTiles::even_height(count));
    const PairedRows rows{nullptr, in, tiles};
    grow(room, rows.size() * tiles.total);
    for (int tile = 0; tile < tiles.total; ++tile)
        pair_rows(x + size_t(tiles.place(tile)) * in, in, tiles.height, room.data() + tile * rows.size());
    return {room.data(), in, tiles};
}

// A strip's weights as A takes them: take(i) are inputs i to i + INPUTS of its rows, which lie `stride` bytes apart. Each
// time it sends for a part of the next strip's: all at once, what restores would wait for what is under way.
struct LyingWeights {
    const uint16_t* w;
    size_t stride;
    const uint16_t* take(int i, Coming& coming) const {
        coming.fetch();
        return w + i;
    }
};

inline LyingWeights weights_of(const PlainStrip<uint16_t>& strip, uint16_t*) { return {strip.w, strip.row_bytes()}; }

// What is taken goes to one half of a room in the first cache, while a tile is loaded from the other.
struct RestoredWeights {
    static constexpr int HALF = STRIP / 2, SIZE = STRIP * INPUTS;
    static_assert(INPUTS == WORDS, "a register is a row of a tile");
    CompressedStrip::Reader upper, lower;  // of the first eight outputs, and of the others
    uint16_t* room;                        // [2, STRIP, INPUTS]
    static constexpr size_t stride = TILE_BYTES;

    const uint16_t* take(int i, Coming& coming) {
        uint16_t* to = room + i / INPUTS % 2 * SIZE;
        coming.fetch(0, coming.lines / 2);
        restore(upper, i, to);
        coming.fetch(coming.lines / 2, coming.lines);
        restore(lower, i, to + HALF * INPUTS);
        settle(to);
        return to;
    }

private:
    static void restore(CompressedStrip::Reader& reader, int i, uint16_t* to) {
        Words words[HALF];
        reader.take(i, words);
#pragma GCC unroll 8
        for (int o = 0; o < HALF; ++o) std::memcpy(to + o * INPUTS, &words[o], sizeof words[o]);
    }
};

inline RestoredWeights weights_of(const CompressedStrip& strip, uint16_t* room) {
    return {strip.reader(0), strip.reader(STRIP / 2), room};
}

// C 0 to 3, of each tile of rows; A 4 and B 5 of 32 inputs, A 6 and B 7 of the 16 that a row may end with.
inline TileShapes shapes_of_pairs(int outs, int height) {
    TileShapes shapes;
    shapes.set(0, ROW_TILES, outs, height * 4);
    shapes.set(4, 1, outs, TILE_BYTES), shapes.set(5, 1, PAIRS, height * 4);
    shapes.set(6, 1, outs, TILE_BYTES / 2), shapes.set(7, 1, PAIRS / 2, height * 4);
    return shapes;
}

#define QUASAR_ZERO(TILE) \
    if constexpr (TILES > TILE) _tile_zero(TILE);
#define QUASAR_STORE(TILE) \
    if constexpr (TILES > TILE) _tile_stored(TILE, sums + TILE * MOST_IN_TILE * LANES, LANES * sizeof(float));
#define QUASAR_MULTIPLY(TILE)                      \
    if constexpr (TILES > TILE) {                  \
        _tile_loadd(5, x + TILE * size, width);    \
        _tile_dpbf16ps(TILE, 4, 5);                \
    }
#define QUASAR_MULTIPLY_LAST(TILE)                 \
    if constexpr (TILES > TILE) {                  \
        _tile_loadd(7, x + TILE * size, width);    \
        _tile_dpbf16ps(TILE, 6, 7);                \
    }

// The sums of a strip's outputs and of TILES tiles of rows, whose pairs begin at x, to sums [TILES, 16 outputs, 16 rows].
template <int TILES, typename Weights>
void sum_in_tiles(Weights weights, const PairedRows& rows, const uint32_t* x, Coming coming, float* sums) {
    const size_t size = rows.size(), width = size_t(rows.tiles.height) * 4;
    QUASAR_WITH_EACH(QUASAR_ZERO)
    const uint16_t* w = weights.take(0, coming);
    for (int i = INPUTS; i <= rows.in; i += INPUTS, x += PAIRS * rows.tiles.height) {
        const uint16_t* next = i < rows.in ? weights.take(i, coming) : nullptr;  // ahead: a product takes a while
        _tile_loadd(4, w, weights.stride);
        QUASAR_WITH_EACH(QUASAR_MULTIPLY)
        w = next;
    }
    if (w) {
        _tile_loadd(6, w, weights.stride);
        QUASAR_WITH_EACH(QUASAR_MULTIPLY_LAST)
    }
    QUASAR_WITH_EACH(QUASAR_STORE)
}

template <int TILES = 1, typename Weights>
void sum_in_tiles_of(int tiles, const Weights& weights, const PairedRows& rows, const uint32_t* x, Coming coming,
                     float* sums) {
    if constexpr (TILES < ROW_TILES)
        if (tiles > TILES) return sum_in_tiles_of<TILES + 1>(tiles, weights, rows, x, coming, sums);
    sum_in_tiles<TILES>(weights, rows, x, coming, sums);
}

// All rows times a strip; `put(row, values)` takes its outputs.
template <typename Strip, typename Put>
void multiply_strip_in_tiles(const Strip& strip, const PairedRows& rows, Put put) {
    alignas(64) uint16_t room[2 * RestoredWeights::SIZE];
    alignas(64) float sums[ROW_TILES * MOST_IN_TILE * LANES];
    const RowTiles& tiles = rows.tiles;
    const int groups = (tiles.total + ROW_TILES - 1) / ROW_TILES, lines = (Strip::lines(STRIP) + groups - 1) / groups;
    for (int group = 0; group < groups; ++group) {
        const int first = group * ROW_TILES, beside = std::min(tiles.total - first, ROW_TILES);
        const Coming next{strip.row(STRIP) + STRIP * strip.row_bytes() * group / groups, lines};
        sum_in_tiles_of(beside, weights_of(strip, room), rows, rows.pairs + first * rows.size(),
                        strip.outs == STRIP ? next : Coming{nullptr, 0}, sums);
        for (int tile = first; tile < first + beside; ++tile) {
            Part columns[LANES];
            for (int o = 0; o < STRIP; ++o)
                columns[o] = o < strip.outs ? load_part(sums + ((tile - first) * STRIP + o) * LANES) : spread(0);
            transpose(columns);
            for (int t = tiles.begin(tile); t < tiles.end(tile); ++t) {
                Floats values;
                values.part[0] = columns[t - tiles.place(tile)];
                put(t, values);
            }
        }
    }
}

template <typename Put>
void multiply_part_of_strip(const PlainStrip<uint16_t>& strip, const PairedRows& rows, Put put) {
    multiply_strip_in_tiles(strip, rows, put);
}

// Of fewer outputs than are restored side by side: all of them first.
template <typename Put>
void multiply_part_of_strip(const CompressedStrip& strip, const PairedRows& rows, Put put) {
    static thread_local Buffer<uint16_t> restored;
    grow(restored, size_t(strip.outs) * strip.in);
    restore_strip(strip, restored.data());
    settle(restored.data());
    multiply_strip_in_tiles(PlainStrip<uint16_t>{restored.data(), strip.in, strip.outs}, rows, put);
}

template <typename Weight, typename Put>
void multiply_strips_in_tiles(const Weight& weight, const uint16_t* x, int in, Range strips, int count, int out, Put put) {
    if (strips.begin == strips.end || count == 0) return;
    const PairedRows rows = pair_all(x, in, count);
    Configured tiles(shapes_of_pairs(STRIP, rows.tiles.height));
    for (int at = strips.begin; at < strips.end; ++at) {
        const auto strip = strip_of(weight, in, out, at);
        const auto put_strip = [&](int t, Floats values) { put(t, at * STRIP, first_lanes(strip.outs), values); };
        if (strip.outs == STRIP) {
            multiply_strip_in_tiles(strip, rows, put_strip);
            continue;
        }
        tiles.configure(shapes_of_pairs(strip.outs, rows.tiles.height));
        multiply_part_of_strip(strip, rows, put_strip);
    }
}

#undef QUASAR_ZERO
#undef QUASAR_STORE
#undef QUASAR_MULTIPLY
#undef QUASAR_MULTIPLY_LAST

}  // namespace quasar
