// What stands between products, element by element in float32: norms, rotations, activations.

#pragma once

#include <cmath>

#include "lanes.h"

namespace quasar {

// A weight of null is one of ones.
inline void normalise(const float* x, const float* weight, int size, float eps, float* y) {
    __m512 squares = _mm512_setzero_ps();
    for (int i = 0; i < size; i += LANES) squares = _mm512_fmadd_ps(load(x + i), load(x + i), squares);
    __m512 inverse = _mm512_set1_ps(1 / std::sqrt(_mm512_reduce_add_ps(squares) / size + eps));
    for (int i = 0; i < size; i += LANES)
        if (weight)
            store(y + i, _mm512_mul_ps(_mm512_mul_ps(load(x + i), inverse), load(weight + i)));
        else
            store(y + i, _mm512_mul_ps(load(x + i), inverse));
}

// In place: x · cos + x' · sin, where x' holds the partners. The first of two partners has its sine negated; of a head's
// first `channels` channels, i and i + channels/2 are partners, or 2i and 2i + 1 where they are interleaved.
inline void rotate(float* x, const float* cos, const float* sin, int channels, bool interleaved) {
    auto turn = [=](int a, int b) {
        const float low = x[a], high = x[b];
        x[a] = low * cos[a] + high * sin[a];
        x[b] = high * cos[b] + low * sin[b];
    };
    const int half = channels / 2;
    if (interleaved)
        for (int i = 0; i < half; ++i) turn(2 * i, 2 * i + 1);
    else
        for (int i = 0; i < half; ++i) turn(i, i + half);
}

inline __m512 sigmoid(__m512 x) {
    const __m512 one = _mm512_set1_ps(1.0f);
    return _mm512_div_ps(one, _mm512_add_ps(one, exponential(_mm512_sub_ps(_mm512_setzero_ps(), x))));
}

// cap · tanh(x ÷ cap), by 2 · sigmoid(2x) − 1; near 0, where that loses bits, by x − x³ ÷ 3 + 2 · x⁵ ÷ 15.
inline __m512 capped(__m512 x, float cap) {
    const __m512 one = _mm512_set1_ps(1.0f), part = _mm512_div_ps(x, _mm512_set1_ps(cap));
    __m512 y = _mm512_fmsub_ps(_mm512_set1_ps(2.0f), sigmoid(_mm512_add_ps(part, part)), one);
    const __m512 square = _mm512_mul_ps(part, part);
    __m512 series = _mm512_fmadd_ps(square, _mm512_set1_ps(2.0f / 15), _mm512_set1_ps(-1.0f / 3));
    series = _mm512_fmadd_ps(_mm512_mul_ps(series, square), part, part);
    const __mmask16 near = _mm512_cmp_ps_mask(_mm512_abs_ps(part), _mm512_set1_ps(0.05f), _CMP_LT_OQ);
    y = _mm512_mask_mov_ps(y, near, series);
    return _mm512_mul_ps(y, _mm512_set1_ps(cap));
}

enum Activation { SILU, GELU, RELU2, XIELU };  // in the order of `cpu_pass.ACTIVATIONS`

// The approximation by tanh, as 0.5 · (1 + tanh(y)) is sigmoid(2y).
inline __m512 gelu(__m512 x) {
    const __m512 cube = _mm512_mul_ps(_mm512_mul_ps(x, x), x);
    const __m512 inner = _mm512_fmadd_ps(cube, _mm512_set1_ps(0.044715f), x);
    return _mm512_mul_ps(x, sigmoid(_mm512_mul_ps(inner, _mm512_set1_ps(2 * 0.7978845608f))));
}

inline __m512 relu2(__m512 x) {
    x = _mm512_max_ps(_mm512_setzero_ps(), x);  // in this order, so that a NaN stays one
    return _mm512_mul_ps(x, x);
}

// Weights: the curvature above 0 and below it, the slope at 0, the least input.
inline __m512 xielu(__m512 x, const float* weights) {
    const __m512 above = _mm512_mul_ps(_mm512_mul_ps(_mm512_set1_ps(weights[0]), x), x);
    const __m512 low = _mm512_min_ps(_mm512_set1_ps(weights[3]), x);
    __m512 below = _mm512_sub_ps(_mm512_sub_ps(exponential(low), _mm512_set1_ps(1.0f)), x);
    below = _mm512_mul_ps(below, _mm512_set1_ps(weights[1]));
    const __mmask16 positive = _mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_GT_OQ);
    return _mm512_fmadd_ps(_mm512_set1_ps(weights[2]), x, _mm512_mask_mov_ps(below, positive, above));
}

inline __m512 activate(__m512 x, int activation, const float* weights) {
    switch (activation) {
        case SILU: return silu(x);
        case GELU: return gelu(x);
        case RELU2: return relu2(x);
        default: return xielu(x, weights);
    }
}

}  // namespace quasar
