// A product with packed codes in AMX's tiles: A are activations [rows, 64 inputs], B codes, C sums of a group [rows, 16].
//
// The stream's 64 bytes of 16 outputs × 4 inputs are a row of B once their planes are apart, so a group is unpacked to the
// cache as it stands, for up to 64 rows. Codes of less than 8 bits lose their zeros there, once for all rows. Sums are
// exact, and scales come to them as in `codes.h`: so are all bits those of `multiply_tile`, and how many rows a pass has
// may choose between them.

#pragma once

#include "codes.h"
#include "tiles.h"

namespace quasar {

constexpr int DOTS = MOST_IN_TILE * BLOCK;  // sums of a tile of rows
constexpr int TOGETHER = 64;  // rows that share what is unpacked, and whose totals stay in the first cache

using Bytes = uint8_t __attribute__((vector_size(64)));  // of 16 outputs × 4 inputs

// Whether zeros are subtracted while codes are unpacked: of 8 bits, the difference would not fit in a byte.
template <int BITS>
constexpr bool CENTRED = BITS < 8;

// The zero of each output, from 0 to 2^BITS, four times.
inline Bytes zeros_of(const uint8_t* half) {
    const UnsignedPart zeros = UnsignedPart(ints_from_shorts(reinterpret_cast<const int16_t*>(half + 2 * LANES)));
    return Bytes((zeros & 0xff) * 0x01010101u);
}

// The codes of a group less their zeros, one in a byte, [inputs / 4, BLOCK, 4]; those of 8 bits stay as and where they are.
template <int BITS>
const uint8_t* unpack_group(const uint8_t* header, int group, uint8_t* room) {
    constexpr int PLANES = 8 / BITS, HALF = FOURS / HALVES;
    const uint8_t *codes = header + HEADER, *unpacked = CENTRED<BITS> ? room : codes;
    for (int byte = 0; byte < HEADER; byte += 64) __builtin_prefetch(header + 2 * AHEAD + byte, 0, 2);
    const Bytes zeros[HALVES] = {zeros_of(header), zeros_of(header + HEADER / HALVES)};
    for (int i = 0; i < group; i += 4 * PLANES, codes += FOURS, room += PLANES * FOURS)
#pragma GCC unroll 2
        for (int h = 0; h < HALVES; ++h) {
            __builtin_prefetch(codes + 2 * AHEAD + h * HALF, 0, 2);
            if constexpr (CENTRED<BITS>) {
                const IntPart packed = load_codes(codes + h * HALF);
#pragma GCC unroll 4
                for (int p = 0; p < PLANES; ++p) {
                    const Bytes plane = Bytes(plane_of<BITS>(packed, p)) - zeros[h];
                    std::memcpy(room + p * FOURS + h * HALF, &plane, sizeof plane);
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

// Tiles are named by numbers that stand in the code.
#define QUASAR_ADD_PRODUCT(C, A, B)  \
    if constexpr (CENTRED<BITS>)     \
        _tile_dpbssd(C, A, B);       \
    else                             \
        _tile_dpbsud(C, A, B);

// The sums of a group's products for one or two tiles of rows, whose activations begin at x and `other`, into C.
template <int BITS, int TILES>
void dot_tiles(const uint8_t* codes, const int8_t* x, const int8_t* other, size_t stride, int group, int step) {
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
        QUASAR_ADD_PRODUCT(0, 4, 6)
        QUASAR_ADD_PRODUCT(1, 4, 7)
        if constexpr (TILES > 1) {
            _tile_loadd(5, other + i, stride);
            QUASAR_ADD_PRODUCT(2, 5, 6)
            QUASAR_ADD_PRODUCT(3, 5, 7)
        }
    }
}

#undef QUASAR_ADD_PRODUCT

// The same for the tiles of rows that begin at `row`, and at `other` where there is a pair.
template <int BITS>
void dot_pair(const uint8_t* codes, const CodedRows& rows, int row, int other, bool is_pair, int g, int step) {
    const int8_t* x = rows.values + size_t(g) * rows.group;
    const size_t stride = rows.stride();
    if (is_pair)
        dot_tiles<BITS, 2>(codes, x + row * stride, x + other * stride, stride, rows.group, step);
    else
        dot_tiles<BITS, 1>(codes, x + row * stride, nullptr, stride, rows.group, step);
}

// Stores what is in C: [tiles, rows, BLOCK].
inline void store_pair(bool is_pair, int32_t* dots) {
    constexpr int BYTES = BLOCK * sizeof(int32_t);  // of a row of sums
    _tile_stored(0, dots, BYTES);
    _tile_stored(1, dots + LANES, BYTES);
    if (is_pair) {
        _tile_stored(2, dots + DOTS, BYTES);
        _tile_stored(3, dots + DOTS + LANES, BYTES);
    }
}

// Adds to the totals [.., BLOCK] of some rows from `row` on what group g gives, rounded as `add_group` rounds.
template <int BITS>
void add_dots(const uint8_t* header, const CodedRows& rows, int row, int g, int count, const int32_t* dots, float* totals) {
    const size_t first = size_t(row) * rows.groups + g, groups = rows.groups;
    const float *scales = rows.scales + first, *sums = rows.sums + first;
    Part scale[HALVES], less[HALVES];
#pragma GCC unroll 2
    for (int h = 0; h < HALVES; ++h) {
        const uint8_t* half = header + h * (HEADER / HALVES);
        scale[h] = from_halves(reinterpret_cast<const uint16_t*>(half));
        less[h] = spread(0) - from_shorts(reinterpret_cast<const int16_t*>(half + 2 * LANES));
    }
    for (int t = 0; t < count; ++t) {
        const Part row_scale = spread(scales[t * groups]);
#pragma GCC unroll 2
        for (int h = 0; h < HALVES; ++h) {
            IntPart dot;
            std::memcpy(&dot, dots + t * BLOCK + h * LANES, sizeof dot);
            Part centred = to_floats(dot);
            if constexpr (!CENTRED<BITS>) centred = fused(less[h], spread(sums[t * groups]), centred);
            float* total = totals + t * BLOCK + h * LANES;
            store_part(total, fused(centred, scale[h] * row_scale, load_part(total)));
        }
    }
}

// Adds the sums of two tiles of rows from tile `first` on, or of the last one, to the totals of a block.
template <int BITS>
void add_pair(const uint8_t* header, const CodedRows& rows, int row, const RowTiles& tiles, int g, int first,
              const int32_t* dots, float* totals) {
    for (int tile = first; tile < std::min(first + 2, tiles.total); ++tile, dots += DOTS) {
        const int begin = tiles.begin(tile), twice = begin - tiles.place(tile);
        add_dots<BITS>(header, rows, row + begin, g, tiles.end(tile) - begin, dots + twice * BLOCK, totals + begin * BLOCK);
    }
}

// Up to TOGETHER rows from `row` on, times the block whose stream begins at `codes`, to totals [rows, BLOCK]. While tiles
// are multiplied the next group is unpacked, and the sums of the tiles before are added.
template <int BITS>
void multiply_block_in_tiles(const uint8_t* codes, const CodedRows& rows, int row, const RowTiles& tiles, int step,
                             float* totals) {
    alignas(64) uint8_t room[2][CENTRED<BITS> ? MOST_OF_GROUP / 4 * FOURS : 1];
    alignas(64) int32_t dots[2][2 * DOTS];
    const size_t bytes = HEADER + size_t(rows.group) * BLOCK * BITS / 8;
    const int pairs = (tiles.total + 1) / 2, all = rows.groups * pairs;
    const auto add = [&](int done) {
        const int g = done / pairs;
        add_pair<BITS>(codes + g * bytes, rows, row, tiles, g, done % pairs * 2, dots[done % 2], totals);
    };
    std::fill(totals, totals + tiles.rows * BLOCK, 0.0f);
    const uint8_t *unpacked = nullptr, *next = unpack_group<BITS>(codes, rows.group, room[0]);
    for (int at = 0; at < all; ++at) {
        const int g = at / pairs, first = at % pairs * 2;
        const bool begins = first == 0, is_pair = first + 1 < tiles.total;
        if (begins) unpacked = next;
        dot_pair<BITS>(unpacked, rows, row + tiles.place(first), row + tiles.place(first + is_pair), is_pair, g, step);
        if (begins && g + 1 < rows.groups)
            next = unpack_group<BITS>(codes + (g + 1) * bytes, rows.group, room[(g + 1) % 2]);
        if (at) add(at - 1);
        store_pair(is_pair, dots[at % 2]);
    }
    add(all - 1);
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
