// Registers of any processor, by the compiler's vector types: four 32-bit numbers, no fused products.

#pragma once

namespace quasar {

constexpr const char* FORM = "any processor";
constexpr int WIDTH = 4;
using Part = float __attribute__((vector_size(16)));
using IntPart = int32_t __attribute__((vector_size(16)));
using UnsignedPart = uint32_t __attribute__((vector_size(16)));

template <typename To, typename From>
To bits_as(From from) {
    static_assert(sizeof(To) == sizeof(From), "bits are kept");
    To to;
    std::memcpy(&to, &from, sizeof to);
    return to;
}

template <typename V, typename X>
V load_as(const X* x) {
    V v;
    std::memcpy(&v, x, sizeof v);
    return v;
}

inline Part spread(float x) { return Part{x, x, x, x}; }
inline Part load_part(const float* x) { return load_as<Part>(x); }
inline void store_part(float* y, Part x) { std::memcpy(y, &x, sizeof x); }
inline Part fused(Part a, Part b, Part c) { return a * b + c; }
inline Part larger(Part a, Part b) { return a > b ? a : b; }
inline Part smaller(Part a, Part b) { return a < b ? a : b; }

// Adding 1.5 · 2^23 leaves no place for what stands behind the point; beyond 2^22 the last bits of a whole number go too.
constexpr float SHIFT = 12582912.0f;
inline Part nearest(Part x) { return (x + spread(SHIFT)) - spread(SHIFT); }
inline IntPart nearest_ints(Part x) {
    return IntPart(UnsignedPart(x + spread(SHIFT)) - UnsignedPart(spread(SHIFT)));
}
inline Part to_floats(IntPart x) { return __builtin_convertvector(x, Part); }

// 16-bit numbers, each into the lower half of a lane.
inline UnsignedPart widened(const uint16_t* x) { return UnsignedPart{x[0], x[1], x[2], x[3]}; }
inline Part from_bfloat16(const uint16_t* x) { return Part(widened(x) << 16); }
inline Part from_shorts(const int16_t* x) { return to_floats(IntPart{x[0], x[1], x[2], x[3]}); }

// A float16's exponent counts from −14 where a float's does from −126; those of denormals and of infinities are none.
inline Part from_halves(const uint16_t* x) {
    const UnsignedPart half = widened(x), rest = half & 0x7fff, sign = (half & 0x8000) << 16;
    const Part normal = Part((rest << 13) + (112u << 23));
    const Part tiny = to_floats(IntPart(rest)) * spread(1.0f / (1 << 24));
    const Part infinite = Part((rest << 13) | (255u << 23));
    const Part magnitude = rest < 0x400 ? tiny : rest >= 0x7c00 ? infinite : normal;
    return Part(UnsignedPart(magnitude) | sign);
}

inline IntPart in_lanes(unsigned lanes) {  // all ones where a bit is set
    return (IntPart{1, 2, 4, 8} & int32_t(lanes)) != 0;
}
inline unsigned bits_of(IntPart ones) {
    const IntPart bits = ones & IntPart{1, 2, 4, 8};
    return unsigned(bits[0] | bits[1] | bits[2] | bits[3]);
}
inline unsigned is_less(Part a, Part b) { return bits_of(a < b); }
inline unsigned is_nan(Part x) { return bits_of(x != x); }
inline Part select(unsigned lanes, Part yes, Part no) { return in_lanes(lanes) ? yes : no; }
inline IntPart select(unsigned lanes, IntPart yes, IntPart no) { return in_lanes(lanes) ? yes : no; }
inline Part load_part(const float* x, unsigned lanes) {
    Part part = {};
    for (int i = 0; i < WIDTH; ++i)
        if (lanes >> i & 1) part[i] = x[i];
    return part;
}
inline void store_part(float* y, Part x, unsigned lanes) {
    for (int i = 0; i < WIDTH; ++i)
        if (lanes >> i & 1) y[i] = x[i];
}
inline void store_low_halves(uint16_t* y, IntPart x, unsigned lanes) {
    for (int i = 0; i < WIDTH; ++i)
        if (lanes >> i & 1) y[i] = uint16_t(x[i]);
}
inline void store_bytes(int8_t* y, IntPart x) {
    for (int i = 0; i < WIDTH; ++i) y[i] = int8_t(x[i]);
}

inline float sum_of(Part x) { return (x[0] + x[2]) + (x[1] + x[3]); }
inline float largest_of(Part x) { return std::max(std::max(x[0], x[2]), std::max(x[1], x[3])); }
inline float least_of(Part x) { return std::min(std::min(x[0], x[2]), std::min(x[1], x[3])); }

// Lane i of the result is the sum of the lanes of sums[i].
inline Part sum_each(const Part* sums) {
    return Part{sum_of(sums[0]), sum_of(sums[1]), sum_of(sums[2]), sum_of(sums[3])};
}

// Rows of lanes become columns.
inline void transpose(Part* rows) {
    const Part a = rows[0], b = rows[1], c = rows[2], d = rows[3];
    for (int i = 0; i < WIDTH; ++i) rows[i] = Part{a[i], b[i], c[i], d[i]};
}

inline Part look_up(const float* table, IntPart at) {
    at &= 15;
    return Part{table[at[0]], table[at[1]], table[at[2]], table[at[3]]};
}

// bfloat16 of 12 bits (`compressed.h`), so many at a time.
constexpr int WORDS = 8;
using Words = uint16_t __attribute__((vector_size(16)));
using ExponentTable = const uint16_t*;
inline ExponentTable load_exponents(const uint16_t* by_code) { return by_code; }
inline Words restore_words(const uint8_t* low, const uint8_t* codes, bool upper, ExponentTable exponents) {
    Words words;
    for (int i = 0; i < WORDS; ++i) {
        const int code = upper ? codes[i] >> 4 : codes[i] & 15;
        words[i] = uint16_t((low[i] & 0x80) << 8 | (low[i] & 0x7f) | exponents[code]);
    }
    return words;
}

template <typename V>
void hold(V&) {}  // the compiler knows best

// Tiles, as in `lanes_avx512.h`: there are 16 registers.
constexpr int MOST_ROWS = 6, MOST_CODED = 8;
constexpr int outputs_beside(int rows) { return rows == 1 ? 8 : rows == 2 ? 4 : 2; }
constexpr int parts_beside(int rows) { return rows <= 2 ? 4 : rows <= 4 ? 2 : 1; }
constexpr int MOST_COMPRESSED = 6;
constexpr int compressed_beside(int rows) { return outputs_beside(rows); }

}  // namespace quasar

#include "dot_shorts.h"
