// A product with packed codes in 8-bit integers, for processors with AVX-512 VNNI.
//
// y[t, o] = sum over groups of scale[o] · row_scale[t] · (sum of code[i, o] · q[t, i]  −  zero[o] · sum of q[t, i])
//
// where q are the activations of a row, rounded to 8 bits with one scale per row and group. The codes are read as one
// stream, unpacked in registers once per tile of up to 8 rows, and multiplied by vpdpbusd (unsigned codes, signed
// activations, 32-bit sums). For each block of 32 outputs and each group the stream holds 128 bytes of scales (float16)
// and zeros (int16), half of them for each 16 outputs, then the codes: of 16 outputs × 4 inputs in 64 bytes, planes of
// `BITS` bits on top of one another, so that 8-bit lanes hold the next 4 inputs in their higher bits.

#pragma once

#include "lanes.h"

namespace quasar {

constexpr int HALVES = 2;     // registers in a block of outputs
constexpr int BLOCK = LANES * HALVES;
constexpr int HEADER = 128;   // bytes of scales and zeros of a block and group
constexpr int MAX_TILE = 8;   // rows that share an unpacking
constexpr int AHEAD = 8192;   // bytes of the stream that are on their way from memory

struct CodedRows {   // activations in 8 bits
    int8_t* values;  // [T, in]
    float* scales;   // [T, groups]
    float* sums;     // [T, groups], of the values
    int in, groups, group;
};

// The largest magnitude is found on the bits, so that an infinity or a NaN makes the scale, and the product, one too.
template <typename X>
void quantize_group(const X* x, const CodedRows& rows, int row, int g) {
    const X* from = x + g * rows.group;
    int8_t* to = rows.values + size_t(row) * rows.in + g * rows.group;
    __m512i largest = _mm512_setzero_si512();
    for (int i = 0; i < rows.group; i += LANES) {
        __m512i bits = _mm512_castps_si512(load(from + i));
        largest = _mm512_max_epi32(largest, _mm512_and_si512(bits, _mm512_set1_epi32(0x7fffffff)));
    }
    int32_t magnitude = _mm512_reduce_max_epi32(largest);
    float bound;
    std::memcpy(&bound, &magnitude, sizeof bound);
    __m512 inverse = _mm512_set1_ps(bound > 0 ? 127 / bound : 0);
    __m512i sum = _mm512_setzero_si512();
    for (int i = 0; i < rows.group; i += LANES) {
        __m512i value = _mm512_cvtps_epi32(_mm512_mul_ps(load(from + i), inverse));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i), _mm512_cvtsepi32_epi8(value));
        sum = _mm512_add_epi32(sum, value);
    }
    rows.scales[size_t(row) * rows.groups + g] = bound / 127;
    rows.sums[size_t(row) * rows.groups + g] = float(_mm512_reduce_add_epi32(sum));
}

inline __m512i broadcast(const int8_t* four) {
    int32_t word;
    std::memcpy(&word, four, sizeof word);
    return _mm512_set1_epi32(word);
}

// TILE rows from `row` on, times the block of outputs whose stream begins at `codes`, to y [TILE, BLOCK].
template <int BITS, int TILE>
void multiply_tile(const uint8_t* codes, const CodedRows& rows, int row, float* y) {
    constexpr int PLANES = 8 / BITS;
    const __m512i low = _mm512_set1_epi8((1 << BITS) - 1);
    __m512 total[TILE][HALVES];
    for (auto& line : total)
        for (auto& half : line) half = _mm512_setzero_ps();
    for (int g = 0; g < rows.groups; ++g) {
        const uint8_t* header = codes;
        codes += HEADER;
        const int8_t* x = rows.values + size_t(row) * rows.in + g * rows.group;
        __m512i dot[TILE][HALVES];
        for (auto& line : dot)
            for (auto& half : line) half = _mm512_setzero_si512();
        for (int i = 0; i < rows.group; i += 4 * PLANES, codes += HALVES * 64) {
            __m512i packed[HALVES];
            for (int h = 0; h < HALVES; ++h) {
                _mm_prefetch(codes + AHEAD + h * 64, _MM_HINT_T0);
                packed[h] = _mm512_load_si512(codes + h * 64);
            }
#pragma GCC unroll 4
            for (int p = 0; p < PLANES; ++p) {
                __m512i plane[HALVES];
                for (int h = 0; h < HALVES; ++h)
                    plane[h] = BITS == 8 ? packed[h] : _mm512_and_si512(_mm512_srli_epi32(packed[h], BITS * p), low);
#pragma GCC unroll 8
                for (int t = 0; t < TILE; ++t) {
                    __m512i four = broadcast(x + size_t(t) * rows.in + i + 4 * p);
                    for (int h = 0; h < HALVES; ++h) dot[t][h] = _mm512_dpbusd_epi32(dot[t][h], plane[h], four);
                }
            }
        }
        for (int h = 0; h < HALVES; ++h) {
            const __m256i* half = reinterpret_cast<const __m256i*>(header + h * 64);
            __m512 scale = _mm512_cvtph_ps(_mm256_load_si256(half));
            __m512 zero = _mm512_cvtepi32_ps(_mm512_cvtepi16_epi32(_mm256_load_si256(half + 1)));
#pragma GCC unroll 8
            for (int t = 0; t < TILE; ++t) {
                size_t at = size_t(row + t) * rows.groups + g;
                __m512 centred = _mm512_fnmadd_ps(zero, _mm512_set1_ps(rows.sums[at]), _mm512_cvtepi32_ps(dot[t][h]));
                __m512 unit = _mm512_mul_ps(scale, _mm512_set1_ps(rows.scales[at]));
                total[t][h] = _mm512_fmadd_ps(centred, unit, total[t][h]);
            }
        }
    }
    for (int t = 0; t < TILE; ++t)
        for (int h = 0; h < HALVES; ++h) _mm512_storeu_ps(y + t * BLOCK + h * LANES, total[t][h]);
}

template <int BITS>
void multiply_tile_of(int count, const uint8_t* codes, const CodedRows& rows, int row, float* y) {
    switch (count) {
        case 1: return multiply_tile<BITS, 1>(codes, rows, row, y);
        case 2: return multiply_tile<BITS, 2>(codes, rows, row, y);
        case 3: return multiply_tile<BITS, 3>(codes, rows, row, y);
        case 4: return multiply_tile<BITS, 4>(codes, rows, row, y);
        case 5: return multiply_tile<BITS, 5>(codes, rows, row, y);
        case 6: return multiply_tile<BITS, 6>(codes, rows, row, y);
        case 7: return multiply_tile<BITS, 7>(codes, rows, row, y);
        default: return multiply_tile<BITS, MAX_TILE>(codes, rows, row, y);
    }
}

// Rows [begin, end) times some blocks of outputs, in tiles as even as can be: 9 rows are 5 and 4.
// `put(row, output, lanes, values)` takes 16 outputs of a row, of which `lanes` exist.
template <int BITS, typename Put>
void multiply_blocks(const uint8_t* stream, const CodedRows& rows, Range blocks, int begin, int end, int out, Put put) {
    const size_t stride = size_t(rows.groups) * HEADER + size_t(rows.in) * BLOCK * BITS / 8;
    alignas(64) float tile[MAX_TILE * BLOCK];
    for (int block = blocks.begin; block < blocks.end; ++block) {
        for (int row = begin; row < end;) {
            const int tiles = (end - row + MAX_TILE - 1) / MAX_TILE;
            const int count = (end - row + tiles - 1) / tiles;
            multiply_tile_of<BITS>(count, stream + block * stride, rows, row, tile);
            for (int t = 0; t < count; ++t)
                for (int o = 0; o < BLOCK; o += LANES)
                    put(row + t, block * BLOCK + o, first_lanes(out - block * BLOCK - o),
                        _mm512_load_ps(tile + t * BLOCK + o));
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
