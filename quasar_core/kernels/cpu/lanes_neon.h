// Registers of NEON: four 32-bit numbers; products of codes by SDOT and of bfloat16 by BFDOT where the processor has them.

#pragma once

#include <arm_neon.h>

namespace quasar {

#if defined(__ARM_FEATURE_DOTPROD) && defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
constexpr const char* FORM = "NEON with dot products and BF16";
#elif defined(__ARM_FEATURE_DOTPROD)
constexpr const char* FORM = "NEON with dot products";
#else
constexpr const char* FORM = "NEON";
#endif

constexpr int WIDTH = 4;
using Part = float32x4_t;
using IntPart = int32_t __attribute__((vector_size(16)));
using UnsignedPart = uint32_t __attribute__((vector_size(16)));

inline Part spread(float x) { return vdupq_n_f32(x); }
inline Part load_part(const float* x) { return vld1q_f32(x); }
inline void store_part(float* y, Part x) { vst1q_f32(y, x); }
inline Part fused(Part a, Part b, Part c) { return vfmaq_f32(c, a, b); }
inline Part larger(Part a, Part b) { return vbslq_f32(vcgtq_f32(a, b), a, b); }
inline Part smaller(Part a, Part b) { return vbslq_f32(vcltq_f32(a, b), a, b); }
inline Part nearest(Part x) { return vrndnq_f32(x); }
inline IntPart nearest_ints(Part x) { return (IntPart)vcvtnq_s32_f32(x); }
inline Part to_floats(IntPart x) { return vcvtq_f32_s32((int32x4_t)x); }
inline Part from_halves(const uint16_t* x) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(x))); }
inline Part from_shorts(const int16_t* x) { return vcvtq_f32_s32(vmovl_s16(vld1_s16(x))); }
inline Part from_bfloat16(const uint16_t* x) { return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(x), 16)); }

inline uint32x4_t in_lanes(unsigned lanes) {  // all ones where a bit is set
    const uint32_t bits[WIDTH] = {1, 2, 4, 8};
    return vtstq_u32(vdupq_n_u32(lanes), vld1q_u32(bits));
}
inline unsigned bits_of(uint32x4_t ones) {
    const uint32_t bits[WIDTH] = {1, 2, 4, 8};
    return vaddvq_u32(vandq_u32(ones, vld1q_u32(bits)));
}
inline unsigned is_less(Part a, Part b) { return bits_of(vcltq_f32(a, b)); }
inline unsigned is_nan(Part x) { return bits_of(vmvnq_u32(vceqq_f32(x, x))); }
inline Part select(unsigned lanes, Part yes, Part no) { return vbslq_f32(in_lanes(lanes), yes, no); }
inline IntPart select(unsigned lanes, IntPart yes, IntPart no) {
    return (IntPart)vbslq_s32(in_lanes(lanes), (int32x4_t)yes, (int32x4_t)no);
}
inline Part load_part(const float* x, unsigned lanes) {
    float all[WIDTH] = {};
    for (int i = 0; i < WIDTH; ++i)
        if (lanes >> i & 1) all[i] = x[i];
    return vld1q_f32(all);
}
inline void store_part(float* y, Part x, unsigned lanes) {
    float all[WIDTH];
    vst1q_f32(all, x);
    for (int i = 0; i < WIDTH; ++i)
        if (lanes >> i & 1) y[i] = all[i];
}
inline void store_low_halves(uint16_t* y, IntPart x, unsigned lanes) {
    const uint16x4_t halves = vmovn_u32((uint32x4_t)x);
    if ((lanes & 15) == 15) return vst1_u16(y, halves);
    uint16_t all[WIDTH];
    vst1_u16(all, halves);
    for (int i = 0; i < WIDTH; ++i)
        if (lanes >> i & 1) y[i] = all[i];
}
inline void store_bytes(int8_t* y, IntPart x) {  // which fit
    for (int i = 0; i < WIDTH; ++i) y[i] = int8_t(x[i]);
}

inline float sum_of(Part x) { return vaddvq_f32(x); }
inline float largest_of(Part x) { return vmaxvq_f32(x); }
inline float least_of(Part x) { return vminvq_f32(x); }

// Lane i of the result is the sum of the lanes of sums[i].
inline Part sum_each(const Part* sums) {
    return vpaddq_f32(vpaddq_f32(sums[0], sums[1]), vpaddq_f32(sums[2], sums[3]));
}

// Rows of lanes become columns.
inline void transpose(Part* rows) {
    const float32x4x2_t low = vzipq_f32(rows[0], rows[2]), high = vzipq_f32(rows[1], rows[3]);
    const float32x4x2_t first = vzipq_f32(low.val[0], high.val[0]), second = vzipq_f32(low.val[1], high.val[1]);
    rows[0] = first.val[0], rows[1] = first.val[1], rows[2] = second.val[0], rows[3] = second.val[1];
}

inline Part look_up(const float* table, IntPart at) {
    at &= 15;
    const float found[WIDTH] = {table[at[0]], table[at[1]], table[at[2]], table[at[3]]};
    return vld1q_f32(found);
}

#ifdef __ARM_FEATURE_BF16_VECTOR_ARITHMETIC
#define QUASAR_PAIRS
using Pairs = IntPart;
inline Pairs load_pairs(const uint16_t* x, bool) { return (Pairs)vld1q_u16(x); }
inline Part add_pairs(Part sum, Pairs a, Pairs b) { return vbfdotq_f32(sum, (bfloat16x8_t)a, (bfloat16x8_t)b); }
#endif

// bfloat16 of 12 bits (`compressed.h`), so many at a time.
constexpr int WORDS = 8;
using Words = uint16x8_t;
using ExponentTable = uint8x16_t;
inline ExponentTable load_exponents(const uint16_t* by_code) {
    uint8_t bytes[16];
    for (int code = 0; code < 16; ++code) bytes[code] = uint8_t(by_code[code] >> 7);
    return vld1q_u8(bytes);
}
inline Words restore_words(const uint8_t* low, const uint8_t* codes, bool upper, ExponentTable exponents) {
    const uint8x8_t both = vld1_u8(codes), at = upper ? vshr_n_u8(both, 4) : vand_u8(both, vdup_n_u8(15));
    const uint16x8_t found = vshll_n_u8(vqtbl1_u8(exponents, at), 7);
    const int16x8_t signs = vmovl_s8(vreinterpret_s8_u8(vld1_u8(low)));
    return vorrq_u16(found, vandq_u16(vreinterpretq_u16_s16(signs), vdupq_n_u16(0x807f)));
}
inline Words first_words(Words words) { return words; }

// Holds a number in a register: compilers would load it from memory anew for each product.
template <typename V>
void hold(V& x) {
    __asm__("" : "+w"(x));
}

// Tiles, as in `lanes_avx512.h`: there are 32 registers.
constexpr int MOST_ROWS = 6, MOST_CODED = 8;
constexpr int outputs_beside(int rows) { return rows <= 2 ? 8 : 4; }
constexpr int parts_beside(int rows) { return rows <= 4 ? 4 : 2; }
constexpr int MOST_COMPRESSED = 6;
constexpr int compressed_beside(int rows) { return outputs_beside(rows); }

#ifdef __ARM_FEATURE_DOTPROD
// Signed by signed: codes of 8 bits less 128.
template <int BITS>
struct Dot {
    using Sum = IntPart;
    using Codes = int8x16_t;
    static constexpr int STEPS = 1 << 20, OFFSET = BITS == 8 ? 128 : 0;
    static Codes codes(IntPart plane) {
        const Codes bytes = (Codes)plane;
        return OFFSET ? veorq_s8(bytes, vdupq_n_s8(-128)) : bytes;
    }
    static Sum add(Sum sum, Codes codes, IntPart four) {
        return (Sum)vdotq_s32((int32x4_t)sum, codes, (int8x16_t)four);
    }
    static IntPart widen(Sum sum) { return sum; }
};
#endif

}  // namespace quasar

#ifndef __ARM_FEATURE_DOTPROD
#include "dot_shorts.h"
#endif
