// A product with packed codes in 8-bit integers.
//
// y[t, o] = sum over groups of scale[o] · row_scale[t] · (sum of code[i, o] · q[t, i]  −  zero[o] · sum of q[t, i])
//
// where q are the activations of a row, rounded to 8 bits with one scale per row and group. The codes are read as one
// stream, unpacked in registers once per tile of rows, and multiplied as the instruction set can (`Dot`: unsigned
// codes, signed activations, 32-bit sums, so all instruction sets agree). For each block of 32 outputs and each group the
// stream holds 128 bytes of scales (float16) and zeros (int16), half of them for each 16 outputs, then the codes: of
// 16 outputs × 4 inputs in 64 bytes, planes of `BITS` bits on top of one another, so that 8-bit lanes hold the next 4
// inputs in their higher bits.

#pragma once

#include "lanes.h"
#include "team.h"

namespace quasar {

constexpr int HALVES = 2;     // sixteens of outputs in a block
constexpr int BLOCK = LANES * HALVES;
constexpr int MOST_OF_GROUP = 128;  // inputs
constexpr int HEADER = 128;   // bytes of scales and zeros of a block and group
constexpr int AHEAD = 8192;   // bytes of the stream that are on their way from memory
constexpr int FOURS = BLOCK * 4;  // bytes of four inputs of a block, in all planes

struct CodedRows {   // activations in 8 bits
    int8_t* values;  // [T, groups · group]: behind the last of `in` inputs stand zeros
    float* scales;   // [T, groups]
    float* sums;     // [T, groups], of the values
    int in, groups, group;
    size_t stride() const { return size_t(groups) * group; }
};

template <typename X>
Floats load_up_to(const X* x, int count) {  // of sixteen the first `count`, then zeros
    if (count >= LANES) return load(x);
    X some[LANES] = {};
    std::copy(x, x + std::max(count, 0), some);
    return load(some);
}

// The largest magnitude is found on the bits, so that an infinity or a NaN makes the scale, and the product, one too.
template <typename X>
void quantize_group(const X* x, const CodedRows& rows, int row, int g) {
    const int begin = g * rows.group, there = rows.in - begin;
    const X* from = x + begin;
    int8_t* to = rows.values + row * rows.stride() + begin;
    IntPart largest = {};
    for (int i = 0; i < rows.group; i += LANES) {
        const Floats size = magnitude(load_up_to(from + i, there - i));
        for (int p = 0; p < PARTS; ++p) largest = larger_ints(largest, IntPart(size.part[p]));
    }
    const int32_t bits = largest_of(largest);
    float bound;
    std::memcpy(&bound, &bits, sizeof bound);
    const Floats inverse = bound > 0 ? 127 / bound : 0;
    IntPart sum = {};
    for (int i = 0; i < rows.group; i += LANES) {
        const Floats scaled = load_up_to(from + i, there - i) * inverse;
        for (int p = 0; p < PARTS; ++p) {
            const IntPart value = nearest_ints(scaled.part[p]);
            store_bytes(to + i + p * WIDTH, value);
            sum = IntPart(UnsignedPart(sum) + UnsignedPart(value));
        }
    }
    rows.scales[size_t(row) * rows.groups + g] = bound / 127;
    rows.sums[size_t(row) * rows.groups + g] = float(sum_of(sum));
}

inline IntPart load_codes(const uint8_t* codes) {
    IntPart packed;
    std::memcpy(&packed, codes, sizeof packed);
    return packed;
}

template <int BITS>
IntPart plane_of(IntPart packed, int plane) {
    constexpr uint32_t LOW = ((1u << BITS) - 1) * 0x01010101u;
    return BITS == 8 ? packed : IntPart((UnsignedPart(packed) >> (BITS * plane)) & LOW);
}

inline IntPart four_of(const int8_t* x) {
    int32_t word;
    std::memcpy(&word, x, sizeof word);
    return spread_int(word);
}

// Adds to sums the products of TILE rows of activations x [.., stride] with the codes of inputs [begin, end) for BESIDE
// registers of outputs → the codes that follow.
template <int BITS, int TILE, int BESIDE>
inline __attribute__((always_inline)) const uint8_t* add_codes(const uint8_t* codes, const int8_t* x, int stride, int begin,
                                                               int end, typename Dot<BITS>::Sum (&sums)[TILE][BESIDE]) {
    using Kind = Dot<BITS>;
    constexpr int PLANES = 8 / BITS;
    for (int i = begin; i < end; i += 4 * PLANES, codes += FOURS) {
        IntPart packed[BESIDE];
#pragma GCC unroll 4
        for (int b = 0; b < BESIDE; ++b) {
            if (b * WIDTH % LANES == 0) __builtin_prefetch(codes + AHEAD + b * WIDTH * 4);
            packed[b] = load_codes(codes + b * WIDTH * 4);
        }
#pragma GCC unroll 4
        for (int p = 0; p < PLANES; ++p) {
            typename Kind::Codes plane[BESIDE];
#pragma GCC unroll 4
            for (int b = 0; b < BESIDE; ++b) plane[b] = Kind::codes(plane_of<BITS>(packed[b], p));
#pragma GCC unroll 8
            for (int t = 0; t < TILE; ++t) {
                const IntPart four = four_of(x + size_t(t) * stride + i + 4 * p);
#pragma GCC unroll 4
                for (int b = 0; b < BESIDE; ++b) sums[t][b] = Kind::add(sums[t][b], plane[b], four);
            }
        }
    }
    return codes;
}

// The products of a whole group, in as many runs as a sum takes.
template <int BITS, int TILE, int BESIDE>
inline __attribute__((always_inline)) void dot_codes(const uint8_t* codes, const int8_t* x, int stride, int group,
                                                     IntPart (&dot)[TILE][BESIDE]) {
    using Kind = Dot<BITS>;
    constexpr int PLANES = 8 / BITS, RUN = std::max(Kind::STEPS / PLANES, 1) * PLANES * 4;  // inputs
    constexpr bool IS_ONE = RUN >= MOST_OF_GROUP;
    for (int begin = 0; begin < group; begin += RUN) {
        typename Kind::Sum sums[TILE][BESIDE];
        for (auto& line : sums)
            for (auto& sum : line) sum = typename Kind::Sum{};
        const int end = IS_ONE ? group : std::min(begin + RUN, group);
        codes = add_codes<BITS, TILE, BESIDE>(codes, x, stride, begin, end, sums);
        for (int t = 0; t < TILE; ++t)
            for (int b = 0; b < BESIDE; ++b)
                dot[t][b] = begin ? dot[t][b] + Kind::widen(sums[t][b]) : Kind::widen(sums[t][b]);
        if (IS_ONE) break;
    }
}

// Adds to the totals of TILE rows from `row` on what group g gives to BESIDE registers of outputs from the `first` on. The
// registers are full of sums, so totals stay in memory: inlined, compilers would keep both and move them to and fro.
template <int BITS, int TILE, int BESIDE>
__attribute__((noinline)) void add_group(const uint8_t* header, const CodedRows& rows, int row, int g, int first,
                                         Part (&total)[TILE][BLOCK / WIDTH]) {
    IntPart dot[TILE][BESIDE];
    const uint8_t* codes = header + HEADER + first * WIDTH * 4;
    const int8_t* x = rows.values + row * rows.stride() + g * rows.group;
    dot_codes<BITS, TILE, BESIDE>(codes, x, int(rows.stride()), rows.group, dot);
#pragma GCC unroll 4
    for (int b = 0; b < BESIDE; ++b) {
        const int output = (first + b) * WIDTH, within = output % LANES;
        const uint8_t* half = header + output / LANES * (HEADER / HALVES);
        const Part scale = from_halves(reinterpret_cast<const uint16_t*>(half) + within);
        const Part stored = from_shorts(reinterpret_cast<const int16_t*>(half + 2 * LANES) + within);
        const Part less = spread(Dot<BITS>::OFFSET) - stored;
#pragma GCC unroll 8
        for (int t = 0; t < TILE; ++t) {
            const size_t at = size_t(row + t) * rows.groups + g;
            const Part centred = fused(less, spread(rows.sums[at]), to_floats(dot[t][b]));
            total[t][first + b] = fused(centred, scale * spread(rows.scales[at]), total[t][first + b]);
        }
    }
}

// TILE rows from `row` on, times the block of outputs whose stream begins at `codes`, to y [TILE, BLOCK].
template <int BITS, int TILE>
void multiply_tile(const uint8_t* codes, const CodedRows& rows, int row, float* y) {
    constexpr int ALL_PARTS = BLOCK / WIDTH, BESIDE = parts_beside(TILE);
    Part total[TILE][ALL_PARTS];
    for (auto& line : total)
        for (auto& part : line) part = spread(0);
    for (int g = 0; g < rows.groups; ++g) {
        for (int first = 0; first < ALL_PARTS; first += BESIDE)
            add_group<BITS, TILE, BESIDE>(codes, rows, row, g, first, total);
        codes += HEADER + size_t(rows.group) * BLOCK * BITS / 8;
    }
    for (int t = 0; t < TILE; ++t)
        for (int b = 0; b < ALL_PARTS; ++b) store_part(y + t * BLOCK + b * WIDTH, total[t][b]);
}

template <int BITS, int TILE = 1>
void multiply_tile_of(int count, const uint8_t* codes, const CodedRows& rows, int row, float* y) {
    if constexpr (TILE < MOST_CODED)
        if (count > TILE) return multiply_tile_of<BITS, TILE + 1>(count, codes, rows, row, y);
    multiply_tile<BITS, TILE>(codes, rows, row, y);
}

#ifdef QUASAR_TILES
constexpr int FEWEST_IN_TILES = MOST_CODED + 1;  // rows: for fewer, codes are unpacked once without tiles too
template <int BITS, typename Put>                // `coded_tiles.h`
void multiply_blocks_in_tiles(const uint8_t* stream, const CodedRows& rows, Range blocks, int begin, int end, int out,
                              Put put);
#endif

// Rows [begin, end) times some blocks of outputs. `put(row, output, lanes, values)` takes 16 outputs of a row, of which
// `lanes` exist.
template <int BITS, typename Put>
void multiply_blocks(const uint8_t* stream, const CodedRows& rows, Range blocks, int begin, int end, int out, Put put) {
#ifdef QUASAR_TILES
    if (end - begin >= FEWEST_IN_TILES && rows.group % 32 == 0)
        return multiply_blocks_in_tiles<BITS>(stream, rows, blocks, begin, end, out, put);
#endif
    const size_t stride = size_t(rows.groups) * HEADER + rows.stride() * BLOCK * BITS / 8;
    alignas(64) float y[MOST_CODED * BLOCK];
    for (int block = blocks.begin; block < blocks.end; ++block) {
        Tiles tiles(end - begin, MOST_CODED);
        for (int row = begin; row < end;) {
            const int count = tiles.next();
            multiply_tile_of<BITS>(count, stream + block * stride, rows, row, y);
            for (int t = 0; t < count; ++t)
                for (int o = 0; o < BLOCK; o += LANES)
                    put(row + t, block * BLOCK + o, first_lanes(out - block * BLOCK - o), load(y + t * BLOCK + o));
            row += count;
        }
    }
}

template <typename Put>
void multiply_codes(int bits, const void* stream, const CodedRows& rows, Range blocks, int begin, int end, int out,
                    Put put) {
    auto codes = static_cast<const uint8_t*>(stream);
    if (bits == 2) return multiply_blocks<2>(codes, rows, blocks, begin, end, out, put);
    if (bits == 4) return multiply_blocks<4>(codes, rows, blocks, begin, end, out, put);
    multiply_blocks<8>(codes, rows, blocks, begin, end, out, put);
}

}  // namespace quasar
