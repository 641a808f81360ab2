// A product with packed codes in AMX's tiles: A are activations [rows, 64 inputs], B codes, C sums of a group [rows, 16].
//
// The stream's 64 bytes of 16 outputs × 4 inputs are a row of B once their planes are apart, so a group is unpacked to the
// cache as it stands, for up to 64 rows. Sums are exact, and scales come to them as in `codes.h`: so are all bits those
// of `multiply_tile`, and how many rows a pass has may choose between them.

#pragma once

#include "codes.h"
#include "tiles.h"

namespace quasar {

constexpr int TOGETHER = 64;  // rows that share what is unpacked, and whose totals stay in the first cache

// The codes of a group, one in a byte, [inputs / 4, BLOCK, 4]: those of 8 bits where they are, others in `room`.
template <int BITS>
const uint8_t* unpack_group(const uint8_t* codes, int group, uint8_t* room) {
    constexpr int PLANES = 8 / BITS, HALF = FOURS / HALVES;
    const uint8_t* unpacked = BITS == 8 ? codes : room;
    for (int i = 0; i < group; i += 4 * PLANES, codes += FOURS, room += PLANES * FOURS)
        for (int at = 0; at < FOURS; at += HALF) {
            __builtin_prefetch(codes + AHEAD + at);
            if constexpr (BITS < 8) {
                const IntPart packed = load_codes(codes + at);
#pragma GCC unroll 4
                for (int p = 0; p < PLANES; ++p) {
                    const IntPart plane = plane_of<BITS>(packed, p);
                    std::memcpy(room + p * FOURS + at, &plane, sizeof plane);
                }
            }
        }
    settle(unpacked);
    return unpacked;
}

// C 0 to 3, two for each tile of rows; A 4 and 5; B 6 and 7, of `step` inputs.
inline TileShapes shapes_of_codes(int height, int step) {
    TileShapes shapes;
    shapes.set(0, 4, height, LANES * 4), shapes.set(4, 2, height, step), shapes.set(6, 2, step / 4, TILE_BYTES);
    return shapes;
}

// Sums of a group's products for TILES tiles of rows, whose activations begin at x and `other`, to dots [.., BLOCK] of each.
template <int TILES>
void dot_tiles(const uint8_t* codes, const int8_t* x, const int8_t* other, size_t stride, int group, int step,
               int32_t (*dots)[MOST_IN_TILE * BLOCK]) {
    constexpr int BYTES = BLOCK * sizeof(int32_t);  // of a row of sums
    _tile_zero(0);
    _tile_zero(1);
    if constexpr (TILES > 1) {
        _tile_zero(2);
        _tile_zero(3);
    }
    for (int i = 0; i < group; i += step, codes += step / 4 * FOURS) {
        _tile_loadd(6, codes, FOURS);
        _tile_loadd(7, codes + FOURS / HALVES, FOURS);
        _tile_loadd(4, x + i, stride);
        _tile_dpbsud(0, 4, 6);
        _tile_dpbsud(1, 4, 7);
        if constexpr (TILES > 1) {
            _tile_loadd(5, other + i, stride);
            _tile_dpbsud(2, 5, 6);
            _tile_dpbsud(3, 5, 7);
        }
    }
    _tile_stored(0, dots[0], BYTES);
    _tile_stored(1, dots[0] + LANES, BYTES);
    if constexpr (TILES > 1) {
        _tile_stored(2, dots[1], BYTES);
        _tile_stored(3, dots[1] + LANES, BYTES);
    }
}

// Adds to the totals [.., BLOCK] of some rows from `row` on what group g gives, rounded as `add_group` rounds.
inline void add_dots(const uint8_t* header, const CodedRows& rows, int row, int g, int count, const int32_t* dots,
                     float* totals) {
    const size_t first = size_t(row) * rows.groups + g, groups = rows.groups;
    const float *scales = rows.scales + first, *sums = rows.sums + first;
    for (int o = 0; o < BLOCK; o += LANES) {
        const uint8_t* half = header + o / LANES * (HEADER / HALVES);
        const Part scale = from_halves(reinterpret_cast<const uint16_t*>(half));
        const Part less = spread(0) - from_shorts(reinterpret_cast<const int16_t*>(half + 2 * LANES));
        for (int t = 0; t < count; ++t) {
            IntPart dot;
            std::memcpy(&dot, dots + t * BLOCK + o, sizeof dot);
            const Part centred = fused(less, spread(sums[t * groups]), to_floats(dot));
            float* total = totals + t * BLOCK + o;
            store_part(total, fused(centred, scale * spread(scales[t * groups]), load_part(total)));
        }
    }
}

// Up to TOGETHER rows from `row` on, times the block whose stream begins at `codes`, to totals [rows, BLOCK].
template <int BITS>
void multiply_block_in_tiles(const uint8_t* codes, const CodedRows& rows, int row, const RowTiles& tiles, int step,
                             float* totals) {
    alignas(64) uint8_t room[BITS == 8 ? 1 : MOST_OF_GROUP / 4 * FOURS];
    alignas(64) int32_t dots[2][MOST_IN_TILE * BLOCK];
    std::fill(totals, totals + tiles.rows * BLOCK, 0.0f);
    for (int g = 0; g < rows.groups; ++g) {
        const uint8_t* unpacked = unpack_group<BITS>(codes + HEADER, rows.group, room);
        const auto x = [&](int tile) {
            return rows.values + (row + tiles.place(tile)) * rows.stride() + size_t(g) * rows.group;
        };
        for (int first = 0; first < tiles.total; first += 2) {
            const bool is_pair = first + 1 < tiles.total;
            if (is_pair)
                dot_tiles<2>(unpacked, x(first), x(first + 1), rows.stride(), rows.group, step, dots);
            else
                dot_tiles<1>(unpacked, x(first), nullptr, rows.stride(), rows.group, step, dots);
            for (int tile = first; tile <= first + is_pair; ++tile) {
                const int begin = tiles.begin(tile), twice = begin - tiles.place(tile);
                add_dots(codes, rows, row + begin, g, tiles.end(tile) - begin, dots[tile - first] + twice * BLOCK,
                         totals + begin * BLOCK);
            }
        }
        codes += HEADER + size_t(rows.group) * BLOCK * BITS / 8;
    }
}

template <int BITS, typename Put>
void multiply_blocks_in_tiles(const uint8_t* stream, const CodedRows& rows, Range blocks, int begin, int end, int out,
                              Put put) {
    if (blocks.begin == blocks.end) return;
    const size_t stride = size_t(rows.groups) * HEADER + rows.stride() * BLOCK * BITS / 8;
    const int most = Tiles(end - begin, TOGETHER).next(), height = RowTiles::even_height(most);
    const int step = std::min(rows.group, TILE_BYTES);
    const Configured configured(shapes_of_codes(height, step));
    alignas(64) float totals[TOGETHER * BLOCK];
    for (int block = blocks.begin; block < blocks.end; ++block) {
        Tiles some(end - begin, TOGETHER);
        for (int row = begin; row < end;) {
            const int count = some.next();
            multiply_block_in_tiles<BITS>(stream + block * stride, rows, row, RowTiles(count, height), step, totals);
            for (int t = 0; t < count; ++t)
                for (int o = 0; o < BLOCK; o += LANES)
                    put(row + t, block * BLOCK + o, first_lanes(out - block * BLOCK - o), load(totals + t * BLOCK + o));
            row += count;
        }
    }
}

}  // namespace quasar
