// What the processor's 512-bit registers do for every part of a pass: loading, storing, summing, exponentials.

#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>

namespace quasar {

constexpr int LANES = 16;  // 32-bit numbers in a register

inline __m512 load(const float* x) { return _mm512_loadu_ps(x); }

inline __m512 load(const uint16_t* x) {  // bfloat16
    __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

inline __m512i to_bfloat16(__m512 value) {  // in the lower halves; rounded to the nearest, ties to even; NaN kept
    __m512i bits = _mm512_castps_si512(value);
    __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    __mmask16 nan = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
    rounded = _mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7fc00000));
    return _mm512_srli_epi32(rounded, 16);
}

inline void store(float* y, __m512 value, __mmask16 mask = 0xffff) { _mm512_mask_storeu_ps(y, mask, value); }

inline void store(uint16_t* y, __m512 value, __mmask16 mask = 0xffff) {
    _mm512_mask_cvtepi32_storeu_epi16(y, mask, to_bfloat16(value));
}

// The first `count` lanes, all of them where there are more.
inline __mmask16 first_lanes(int count) { return __mmask16((1u << std::clamp(count, 0, LANES)) - 1); }

// Lane i of the result is the sum of the lanes of sums[i].
inline __m512 sum_lanes(const __m512 (&sums)[LANES]) {
    __m512 pairs[8], fours[4];
    for (int i = 0; i < 8; ++i)
        pairs[i] = _mm512_add_ps(_mm512_unpacklo_ps(sums[2 * i], sums[2 * i + 1]),
                                 _mm512_unpackhi_ps(sums[2 * i], sums[2 * i + 1]));
    for (int i = 0; i < 4; ++i) {
        __m512d a = _mm512_castps_pd(pairs[2 * i]), b = _mm512_castps_pd(pairs[2 * i + 1]);
        fours[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)),
                                 _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
    }
    // Each 128-bit quarter of fours[i] holds the four sums of its own lanes: add the quarters, four registers at once.
    __m512 low = _mm512_add_ps(_mm512_shuffle_f32x4(fours[0], fours[1], 0x88),
                               _mm512_shuffle_f32x4(fours[0], fours[1], 0xdd));
    __m512 high = _mm512_add_ps(_mm512_shuffle_f32x4(fours[2], fours[3], 0x88),
                                _mm512_shuffle_f32x4(fours[2], fours[3], 0xdd));
    return _mm512_add_ps(_mm512_shuffle_f32x4(low, high, 0x88), _mm512_shuffle_f32x4(low, high, 0xdd));
}

// e^x to about one unit in the last place: 2^n · 2^f with f in [−0.5, 0.5]; 0 far below.
inline __m512 exponential(__m512 x) {
    x = _mm512_max_ps(_mm512_set1_ps(-104.0f), x);  // in this order, so that a NaN stays one
    __m512 scaled = _mm512_mul_ps(x, _mm512_set1_ps(1.44269504f));
    __m512 n = _mm512_roundscale_ps(scaled, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    __m512 f = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693145752f), x);  // ln 2 in two parts
    f = _mm512_fnmadd_ps(n, _mm512_set1_ps(1.42860677e-6f), f);
    __m512 y = _mm512_set1_ps(1.0f / 5040);
    for (float term : {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f})
        y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(term));
    return _mm512_scalef_ps(y, n);
}

inline __m512 silu(__m512 x) {
    __m512 one = _mm512_set1_ps(1.0f);
    __m512 down = exponential(_mm512_sub_ps(_mm512_setzero_ps(), x));
    return _mm512_div_ps(x, _mm512_add_ps(one, down));
}

// The part [begin, end) of `count` things that falls to one of `parts`, as even as can be.
struct Range {
    int begin, end;
    Range(int count, int part, int parts)
        : begin(int(int64_t(count) * part / parts)), end(int(int64_t(count) * (part + 1) / parts)) {}
};

}  // namespace quasar
