// What stands between products, element by element in float32: norms, rotations, activations.

#pragma once

#include <cmath>

#include "lanes.h"

namespace quasar {

// A weight of null is one of ones.
inline void normalise(const float* x, const float* weight, int size, float eps, float* y) {
    Floats squares = 0.0f;
    for (int i = 0; i < size; i += LANES) squares = fused(load(x + i), load(x + i), squares);
    const Floats inverse = 1 / std::sqrt(sum_of(squares) / size + eps);
    for (int i = 0; i < size; i += LANES)
        if (weight)
            store(y + i, load(x + i) * inverse * load(weight + i));
        else
            store(y + i, load(x + i) * inverse);
}

// The same of a row in bfloat16; with `rounds_first` it is rounded before the weight too.
inline void normalise_row(const uint16_t* x, const float* weight, int size, float eps, bool rounds_first, uint16_t* y) {
    Floats squares = 0.0f;
    for (int i = 0; i < size; i += LANES) squares = fused(load(x + i), load(x + i), squares);
    const Floats inverse = 1 / std::sqrt(sum_of(squares) / size + eps);
    for (int i = 0; i < size; i += LANES) {
        Floats value = load(x + i) * inverse;
        if (rounds_first) store(y + i, value), value = load(y + i);
        store(y + i, weight ? value * load(weight + i) : value);
    }
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

inline Floats sigmoid(Floats x) { return Floats(1.0f) / (Floats(1.0f) + exponential(Floats(0.0f) - x)); }

// cap · tanh(x ÷ cap), by 2 · sigmoid(2x) − 1; near 0, where that loses bits, by x − x³ ÷ 3 + 2 · x⁵ ÷ 15.
inline Floats capped(Floats x, float cap) {
    const Floats part = x / cap, square = part * part;
    const Floats y = fused(2.0f, sigmoid(part + part), -1.0f);
    const Floats series = fused(fused(square, 2.0f / 15, -1.0f / 3) * square, part, part);
    return select(is_less(magnitude(part), 0.05f), series, y) * cap;
}

enum Activation { SILU, GELU, RELU2, XIELU };  // in the order of `cpu_pass.ACTIVATIONS`

// The approximation by tanh, as 0.5 · (1 + tanh(y)) is sigmoid(2y).
inline Floats gelu(Floats x) {
    const Floats inner = fused(x * x * x, 0.044715f, x);
    return x * sigmoid(inner * (2 * 0.7978845608f));
}

inline Floats relu2(Floats x) {
    x = larger(0.0f, x);  // in this order, so that a NaN stays one
    return x * x;
}

// Weights: the curvature above 0 and below it, the slope at 0, the least input.
inline Floats xielu(Floats x, const float* weights) {
    const Floats above = x * weights[0] * x;
    const Floats below = (exponential(smaller(weights[3], x)) - 1.0f - x) * weights[1];
    return fused(weights[2], x, select(is_less(0.0f, x), above, below));
}

inline Floats activate(Floats x, int activation, const float* weights) {
    switch (activation) {
        case SILU: return silu(x);
        case GELU: return gelu(x);
        case RELU2: return relu2(x);
        default: return xielu(x, weights);
    }
}

}  // namespace quasar
