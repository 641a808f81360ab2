// Registers of AVX-512: sixteen 32-bit numbers, masks of their own; 8-bit products by VNNI and bfloat16's by
// BF16 where the processor has them, and by AMX's tiles where those are asked for.

#pragma once

#include <immintrin.h>

namespace quasar {

#if defined(__AMX_TILE__) && defined(__AMX_INT8__) && defined(__AMX_BF16__)
#define QUASAR_TILES  // `tiles.h`
constexpr const char* FORM = "AVX-512 with AMX";
#elif defined(__AVX512VNNI__) && defined(__AVX512BF16__)
constexpr const char* FORM = "AVX-512 with VNNI and BF16";
#elif defined(__AVX512VNNI__)
constexpr const char* FORM = "AVX-512 with VNNI";
#else
constexpr const char* FORM = "AVX-512";
#endif
constexpr int WIDTH = 16;
using Part = __m512;
using IntPart = int32_t __attribute__((vector_size(64)));
using UnsignedPart = uint32_t __attribute__((vector_size(64)));

inline Part spread(float x) { return _mm512_set1_ps(x); }
inline Part load_part(const float* x) { return _mm512_loadu_ps(x); }
inline void store_part(float* y, Part x) { _mm512_storeu_ps(y, x); }
inline Part fused(Part a, Part b, Part c) { return _mm512_fmadd_ps(a, b, c); }
inline Part larger(Part a, Part b) { return _mm512_max_ps(a, b); }
inline Part smaller(Part a, Part b) { return _mm512_min_ps(a, b); }
inline Part nearest(Part x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline IntPart nearest_ints(Part x) { return (IntPart)_mm512_cvtps_epi32(x); }
inline Part to_floats(IntPart x) { return _mm512_cvtepi32_ps((__m512i)x); }
inline Part times_power(Part x, Part n) { return _mm512_scalef_ps(x, n); }
inline Part from_halves(const uint16_t* x) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)));
}
inline IntPart ints_from_shorts(const int16_t* x) {
    return (IntPart)_mm512_cvtepi16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)));
}
inline Part from_shorts(const int16_t* x) { return to_floats(ints_from_shorts(x)); }
inline Part from_bfloat16(const uint16_t* x) {
    __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

inline unsigned is_less(Part a, Part b) { return _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ); }
inline unsigned is_nan(Part x) { return _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q); }
inline Part select(unsigned lanes, Part yes, Part no) { return _mm512_mask_mov_ps(no, __mmask16(lanes), yes); }
inline IntPart select(unsigned lanes, IntPart yes, IntPart no) {
    return (IntPart)_mm512_mask_mov_epi32((__m512i)no, __mmask16(lanes), (__m512i)yes);
}
inline Part load_part(const float* x, unsigned lanes) { return _mm512_maskz_loadu_ps(__mmask16(lanes), x); }
inline void store_part(float* y, Part x, unsigned lanes) { _mm512_mask_storeu_ps(y, __mmask16(lanes), x); }

inline void store_low_halves(uint16_t* y, IntPart x, unsigned lanes) {
    _mm512_mask_cvtepi32_storeu_epi16(y, __mmask16(lanes), (__m512i)x);
}
inline void store_bytes(int8_t* y, IntPart x) {  // which fit
    _mm_storeu_si128(reinterpret_cast<__m128i*>(y), _mm512_cvtsepi32_epi8((__m512i)x));
}

inline float sum_of(Part x) { return _mm512_reduce_add_ps(x); }
inline float largest_of(Part x) { return _mm512_reduce_max_ps(x); }
inline float least_of(Part x) { return _mm512_reduce_min_ps(x); }
inline int32_t sum_of(IntPart x) { return _mm512_reduce_add_epi32((__m512i)x); }
inline int32_t largest_of(IntPart x) { return _mm512_reduce_max_epi32((__m512i)x); }

// Lane i of the result is the sum of the lanes of sums[i].
inline Part sum_each(const Part* sums) {
    __m512 pairs[8], fours[4];
    for (int i = 0; i < 8; ++i)
        pairs[i] = _mm512_add_ps(_mm512_mask_blend_ps(0xcccc, sums[2 * i], sums[2 * i + 1]),
                                 _mm512_shuffle_ps(sums[2 * i], sums[2 * i + 1], 0x4e));
    for (int i = 0; i < 4; ++i) {
        fours[i] = _mm512_add_ps(_mm512_shuffle_ps(pairs[2 * i], pairs[2 * i + 1], 0x88),
                                 _mm512_shuffle_ps(pairs[2 * i], pairs[2 * i + 1], 0xdd));
    }
    // Each 128-bit quarter of fours[i] holds the four sums of its own lanes: add the quarters, four registers at once.
    __m512 low = _mm512_add_ps(_mm512_shuffle_f32x4(fours[0], fours[1], 0x88),
                               _mm512_shuffle_f32x4(fours[0], fours[1], 0xdd));
    __m512 high = _mm512_add_ps(_mm512_shuffle_f32x4(fours[2], fours[3], 0x88),
                                _mm512_shuffle_f32x4(fours[2], fours[3], 0xdd));
    return _mm512_add_ps(_mm512_shuffle_f32x4(low, high, 0x88), _mm512_shuffle_f32x4(low, high, 0xdd));
}

// Rows of lanes become columns.
inline void transpose(Part* rows) {
    __m512 twos[WIDTH], fours[WIDTH];
    for (int i = 0; i < WIDTH; i += 2) {
        twos[i] = _mm512_unpacklo_ps(rows[i], rows[i + 1]);
        twos[i + 1] = _mm512_unpackhi_ps(rows[i], rows[i + 1]);
    }
    for (int i = 0; i < WIDTH; i += 4) {
        fours[i] = _mm512_shuffle_ps(twos[i], twos[i + 2], 0x44);
        fours[i + 1] = _mm512_shuffle_ps(twos[i], twos[i + 2], 0xee);
        fours[i + 2] = _mm512_shuffle_ps(twos[i + 1], twos[i + 3], 0x44);
        fours[i + 3] = _mm512_shuffle_ps(twos[i + 1], twos[i + 3], 0xee);
    }
    for (int i = 0; i < 4; ++i) {  // each quarter of fours[4k + i] holds four rows of the columns i, 4 + i, 8 + i, 12 + i
        const __m512 low = _mm512_shuffle_f32x4(fours[i], fours[4 + i], 0x88);
        const __m512 high = _mm512_shuffle_f32x4(fours[8 + i], fours[12 + i], 0x88);
        const __m512 low_odd = _mm512_shuffle_f32x4(fours[i], fours[4 + i], 0xdd);
        const __m512 high_odd = _mm512_shuffle_f32x4(fours[8 + i], fours[12 + i], 0xdd);
        rows[i] = _mm512_shuffle_f32x4(low, high, 0x88);
        rows[4 + i] = _mm512_shuffle_f32x4(low_odd, high_odd, 0x88);
        rows[8 + i] = _mm512_shuffle_f32x4(low, high, 0xdd);
        rows[12 + i] = _mm512_shuffle_f32x4(low_odd, high_odd, 0xdd);
    }
}

// Entries of a table of 16, by the lowest four bits of each lane.
inline Part look_up(const float* table, IntPart at) {
    return _mm512_permutexvar_ps((__m512i)at, _mm512_loadu_ps(table));
}

// Products of bfloat16 in pairs, where the processor has them.
#ifdef __AVX512BF16__
#define QUASAR_PAIRS
using Pairs = IntPart;
inline Pairs load_pairs(const uint16_t* x, bool last) {  // of the last ones of a row: sixteen numbers, then zeros
    return (Pairs)(last ? _mm512_maskz_loadu_epi16(0xffff, x) : _mm512_loadu_si512(x));
}
inline Part add_pairs(Part sum, Pairs a, Pairs b) { return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b); }
#endif

// bfloat16 of 12 bits (`compressed.h`), so many at a time.
constexpr int WORDS = 32;
using Words = __m512i;
using ExponentTable = __m512i;
inline ExponentTable load_exponents(const uint16_t* by_code) { return _mm512_load_si512(by_code); }
inline Words restore_words(const uint8_t* low, const uint8_t* codes, bool, ExponentTable exponents) {
    const __m128i both = _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes));
    const __m512i shifts = _mm512_inserti64x4(_mm512_setzero_si512(), _mm256_set1_epi16(4), 1);
    const __m512i at = _mm512_srlv_epi16(_mm512_cvtepu8_epi16(_mm256_broadcastsi128_si256(both)), shifts);
    const __m512i found = _mm512_permutexvar_epi16(at, exponents);  // by the lowest five bits: the table stands twice
    const __m512i signs = _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(low)));
    return _mm512_ternarylogic_epi32(signs, _mm512_set1_epi16(short(0x807f)), found, 0xea);  // a and b, or c
}
inline Words first_words(Words words) { return _mm512_maskz_mov_epi16(0xffff, words); }  // sixteen, then zeros
inline Words with_word(Words words, int at, uint16_t bits) {
    return _mm512_mask_set1_epi16(words, __mmask32(1u << at), short(bits));
}

// Holds a number in a register: compilers would load it from memory anew for each product.
template <typename V>
void hold(V& x) {
    __asm__("" : "+v"(x));
}

// The most rows of a tile, of 16 and 32 bits and of codes, and by its rows the outputs side by side, or their registers: so
// that its sums and what they are made of fit the registers.
constexpr int MOST_ROWS = 6, MOST_CODED = 8;
constexpr int outputs_beside(int rows) { return rows <= 3 ? 8 : 4; }
constexpr int parts_beside(int) { return 2; }
constexpr int MOST_COMPRESSED = 8;
constexpr int compressed_beside(int rows) { return rows <= 3 ? 8 : rows <= 6 ? 4 : 2; }

// Products of codes, of so many bits, with activations of 8 bits, four inputs in each lane.
#ifdef __AVX512VNNI__
template <int BITS>
struct Dot {
    using Sum = IntPart;
    using Codes = IntPart;
    static constexpr int STEPS = 1 << 20;  // that a Sum takes before it is widened
    static constexpr int OFFSET = 0;       // what is taken off the codes
    static Codes codes(IntPart plane) { return plane; }
    static Sum add(Sum sum, Codes codes, IntPart four) {
        return (Sum)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)codes, (__m512i)four);
    }
    static IntPart widen(Sum sum) { return sum; }
};
#else
template <int BITS>
struct Dot {  // 16-bit sums: a step adds at most 2 · 127 · (2^BITS − 1)
    using Sum = int16_t __attribute__((vector_size(64)));
    using Codes = IntPart;
    static constexpr int STEPS = 32767 / (2 * 127 * ((1 << BITS) - 1)), OFFSET = 0;
    static Codes codes(IntPart plane) { return plane; }
    static Sum add(Sum sum, Codes codes, IntPart four) {
        return sum + (Sum)_mm512_maddubs_epi16((__m512i)codes, (__m512i)four);
    }
    static IntPart widen(Sum sum) { return (IntPart)_mm512_madd_epi16((__m512i)sum, _mm512_set1_epi16(1)); }
};

// Codes of 8 bits less 128: magnitudes up to 128 times activations that take the codes' signs, so that a pair fits 16 bits.
template <>
struct Dot<8> {
    using Sum = IntPart;
    struct Codes {
        __m512i magnitudes;
        __mmask64 negative;
    };
    static constexpr int STEPS = 1 << 20, OFFSET = 128;
    static Codes codes(IntPart plane) {
        __m512i centred = _mm512_xor_si512((__m512i)plane, _mm512_set1_epi8(-128));
        return {_mm512_abs_epi8(centred), _mm512_movepi8_mask(centred)};
    }
    static Sum add(Sum sum, Codes codes, IntPart four) {
        __m512i signs = _mm512_mask_sub_epi8((__m512i)four, codes.negative, _mm512_setzero_si512(), (__m512i)four);
        __m512i pairs = _mm512_maddubs_epi16(codes.magnitudes, signs);
        return sum + (IntPart)_mm512_madd_epi16(pairs, _mm512_set1_epi16(1));
    }
    static IntPart widen(Sum sum) { return sum; }
};
#endif

}  // namespace quasar
