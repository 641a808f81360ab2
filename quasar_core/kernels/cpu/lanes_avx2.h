// Registers of AVX2 with FMA and F16C: eight 32-bit numbers; 8-bit products by AVX-VNNI where the processor has it, else in
// 16-bit sums.

#pragma once

#include <immintrin.h>

namespace quasar {

#ifdef __AVXVNNI__
constexpr const char* FORM = "AVX2 with VNNI";
#else
constexpr const char* FORM = "AVX2";
#endif
constexpr int WIDTH = 8;
using Part = __m256;
using IntPart = int32_t __attribute__((vector_size(32)));
using UnsignedPart = uint32_t __attribute__((vector_size(32)));

inline Part spread(float x) { return _mm256_set1_ps(x); }
inline Part load_part(const float* x) { return _mm256_loadu_ps(x); }
inline void store_part(float* y, Part x) { _mm256_storeu_ps(y, x); }
inline Part fused(Part a, Part b, Part c) { return _mm256_fmadd_ps(a, b, c); }
inline Part larger(Part a, Part b) { return _mm256_max_ps(a, b); }
inline Part smaller(Part a, Part b) { return _mm256_min_ps(a, b); }
inline Part nearest(Part x) { return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline IntPart nearest_ints(Part x) { return (IntPart)_mm256_cvtps_epi32(x); }
inline Part to_floats(IntPart x) { return _mm256_cvtepi32_ps((__m256i)x); }
inline Part from_halves(const uint16_t* x) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x)));
}
inline Part from_shorts(const int16_t* x) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x))));
}
inline Part from_bfloat16(const uint16_t* x) {
    __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(x));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
}

inline __m256i in_lanes(unsigned lanes) {  // all ones where a bit is set
    const __m256i bits = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    return _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(int(lanes)), bits), bits);
}
inline unsigned is_less(Part a, Part b) { return unsigned(_mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_LT_OQ))); }
inline unsigned is_nan(Part x) { return unsigned(_mm256_movemask_ps(_mm256_cmp_ps(x, x, _CMP_UNORD_Q))); }
inline Part select(unsigned lanes, Part yes, Part no) {
    return _mm256_blendv_ps(no, yes, _mm256_castsi256_ps(in_lanes(lanes)));
}
inline IntPart select(unsigned lanes, IntPart yes, IntPart no) {
    return (IntPart)_mm256_blendv_epi8((__m256i)no, (__m256i)yes, in_lanes(lanes));
}
inline Part load_part(const float* x, unsigned lanes) { return _mm256_maskload_ps(x, in_lanes(lanes)); }
inline void store_part(float* y, Part x, unsigned lanes) { _mm256_maskstore_ps(y, in_lanes(lanes), x); }

inline void store_low_halves(uint16_t* y, IntPart x, unsigned lanes) {
    __m128i low = _mm256_castsi256_si128((__m256i)x), high = _mm256_extracti128_si256((__m256i)x, 1);
    __m128i halves = _mm_packus_epi32(low, high);
    if ((lanes & 0xff) == 0xff) return _mm_storeu_si128(reinterpret_cast<__m128i*>(y), halves);
    alignas(16) uint16_t all[WIDTH];
    _mm_store_si128(reinterpret_cast<__m128i*>(all), halves);
    for (int i = 0; i < WIDTH; ++i)
        if (lanes >> i & 1) y[i] = all[i];
}
inline void store_bytes(int8_t* y, IntPart x) {  // which fit
    __m128i halves = _mm_packs_epi32(_mm256_castsi256_si128((__m256i)x), _mm256_extracti128_si256((__m256i)x, 1));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(y), _mm_packs_epi16(halves, halves));
}

template <typename Join>
float reduce(Part x, Join join) {
    __m128 four = join(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    __m128 two = join(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(join(two, _mm_movehdup_ps(two)));
}
inline float sum_of(Part x) { return reduce(x, [](__m128 a, __m128 b) { return _mm_add_ps(a, b); }); }
inline float largest_of(Part x) { return reduce(x, [](__m128 a, __m128 b) { return _mm_max_ps(a, b); }); }
inline float least_of(Part x) { return reduce(x, [](__m128 a, __m128 b) { return _mm_min_ps(a, b); }); }

// Lane i of the result is the sum of the lanes of sums[i].
inline Part sum_each(const Part* sums) {
    __m256 low = _mm256_hadd_ps(_mm256_hadd_ps(sums[0], sums[1]), _mm256_hadd_ps(sums[2], sums[3]));
    __m256 high = _mm256_hadd_ps(_mm256_hadd_ps(sums[4], sums[5]), _mm256_hadd_ps(sums[6], sums[7]));
    return _mm256_add_ps(_mm256_permute2f128_ps(low, high, 0x20), _mm256_permute2f128_ps(low, high, 0x31));
}

// Rows of lanes become columns.
inline void transpose(Part* rows) {
    __m256 twos[WIDTH], fours[WIDTH];
    for (int i = 0; i < WIDTH; i += 2) {
        twos[i] = _mm256_unpacklo_ps(rows[i], rows[i + 1]);
        twos[i + 1] = _mm256_unpackhi_ps(rows[i], rows[i + 1]);
    }
    for (int i = 0; i < WIDTH; i += 4) {
        fours[i] = _mm256_shuffle_ps(twos[i], twos[i + 2], 0x44);
        fours[i + 1] = _mm256_shuffle_ps(twos[i], twos[i + 2], 0xee);
        fours[i + 2] = _mm256_shuffle_ps(twos[i + 1], twos[i + 3], 0x44);
        fours[i + 3] = _mm256_shuffle_ps(twos[i + 1], twos[i + 3], 0xee);
    }
    for (int i = 0; i < 4; ++i) {
        rows[i] = _mm256_permute2f128_ps(fours[i], fours[4 + i], 0x20);
        rows[4 + i] = _mm256_permute2f128_ps(fours[i], fours[4 + i], 0x31);
    }
}

inline Part look_up(const float* table, IntPart at) {
    __m256 low = _mm256_permutevar8x32_ps(_mm256_loadu_ps(table), (__m256i)at);
    __m256 high = _mm256_permutevar8x32_ps(_mm256_loadu_ps(table + 8), (__m256i)at);
    return _mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32((__m256i)at, 28)));
}

// bfloat16 of 12 bits (`compressed.h`), so many at a time.
constexpr int WORDS = 16;
using Words = __m256i;
using ExponentTable = __m128i;
inline ExponentTable load_exponents(const uint16_t* by_code) {
    uint8_t bytes[16];
    for (int code = 0; code < 16; ++code) bytes[code] = uint8_t(by_code[code] >> 7);
    return _mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes));
}
inline Words restore_words(const uint8_t* low, const uint8_t* codes, bool upper, ExponentTable exponents) {
    const __m128i both = _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes));
    const __m128i at = _mm_and_si128(upper ? _mm_srli_epi16(both, 4) : both, _mm_set1_epi8(15));
    const __m256i found = _mm256_slli_epi16(_mm256_cvtepu8_epi16(_mm_shuffle_epi8(exponents, at)), 7);
    const __m256i signs = _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(low)));
    return _mm256_or_si256(found, _mm256_and_si256(signs, _mm256_set1_epi16(short(0x807f))));
}

// Holds a number in a register: compilers would load it from memory anew for each product.
template <typename V>
void hold(V& x) {
    __asm__("" : "+x"(x));
}

// Tiles, as in `lanes_avx512.h`: there are 16 registers.
constexpr int MOST_ROWS = 6, MOST_CODED = 4;
constexpr int outputs_beside(int rows) { return rows == 1 ? 8 : rows == 2 ? 4 : 2; }
constexpr int parts_beside(int rows) { return rows <= 2 ? 4 : rows <= 4 ? 2 : 1; }
constexpr int MOST_COMPRESSED = 6;
constexpr int compressed_beside(int rows) { return outputs_beside(rows); }

#ifdef __AVXVNNI__
template <int BITS>
struct Dot {
    using Sum = IntPart;
    using Codes = IntPart;
    static constexpr int STEPS = 1 << 20, OFFSET = 0;
    static Codes codes(IntPart plane) { return plane; }
    static Sum add(Sum sum, Codes codes, IntPart four) {
        return (Sum)_mm256_dpbusd_avx_epi32((__m256i)sum, (__m256i)codes, (__m256i)four);
    }
    static IntPart widen(Sum sum) { return sum; }
};
#else
template <int BITS>
struct Dot {  // 16-bit sums: a step adds at most 2 · 127 · (2^BITS − 1)
    using Sum = int16_t __attribute__((vector_size(32)));
    using Codes = IntPart;
    static constexpr int STEPS = 32767 / (2 * 127 * ((1 << BITS) - 1)), OFFSET = 0;
    static Codes codes(IntPart plane) { return plane; }
    static Sum add(Sum sum, Codes codes, IntPart four) {
        return sum + (Sum)_mm256_maddubs_epi16((__m256i)codes, (__m256i)four);
    }
    static IntPart widen(Sum sum) { return (IntPart)_mm256_madd_epi16((__m256i)sum, _mm256_set1_epi16(1)); }
};

// Codes of 8 bits less 128: magnitudes up to 128 times activations that take the codes' signs, so that a pair fits 16 bits.
template <>
struct Dot<8> {
    using Sum = IntPart;
    struct Codes {
        __m256i magnitudes, signs;
    };
    static constexpr int STEPS = 1 << 20, OFFSET = 128;
    static Codes codes(IntPart plane) {
        __m256i centred = _mm256_xor_si256((__m256i)plane, _mm256_set1_epi8(-128));
        return {_mm256_abs_epi8(centred), centred};
    }
    static Sum add(Sum sum, Codes codes, IntPart four) {
        __m256i pairs = _mm256_maddubs_epi16(codes.magnitudes, _mm256_sign_epi8((__m256i)four, codes.signs));
        return sum + (IntPart)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
    }
    static IntPart widen(Sum sum) { return sum; }
};
#endif

}  // namespace quasar
