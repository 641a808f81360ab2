// The two kinds of numbers in weights and caches: bfloat16 and float32, and one register of their products.

#pragma once

#include <new>
#include <vector>

#include "lanes.h"

namespace quasar {

constexpr std::align_val_t LINE{64};  // bytes of a register and of a cache line: a load across two of them takes twice

template <typename V>
struct Aligned {
    using value_type = V;
    Aligned() = default;
    template <typename U>
    Aligned(const Aligned<U>&) {}
    V* allocate(size_t count) { return static_cast<V*>(operator new(count * sizeof(V), LINE)); }
    void deallocate(V* memory, size_t) { operator delete(memory, LINE); }
    bool operator==(const Aligned&) const { return true; }
    bool operator!=(const Aligned&) const { return false; }
};

template <typename V>
using Buffer = std::vector<V, Aligned<V>>;

template <typename V>
void grow(Buffer<V>& buffer, size_t size) {
    if (buffer.size() < size) buffer.resize(size);
}

// Of a kind of numbers: how many make a register, the sum of products, and sixteen values as attention weighs them,
// in STEPS rows of a room [16, D] of 32-bit lanes.
template <typename X>
struct Numbers;

// Numbers that are float32 in registers.
template <typename X>
struct Widened {
    using Register = __m512;
    static constexpr int WIDTH = LANES, STEPS = LANES;
    static Register get(const X* x) { return load(x); }
    static Register get(const X* x, int) { return load(x); }
    static __m512 add(__m512 sum, Register a, Register b) { return _mm512_fmadd_ps(a, b, sum); }

    static void spread(const X* values, int left, int size, float* room) {
        for (int i = 0; i < left * size; i += LANES) store(room + i, load(values + i));
        for (int i = left * size; i < LANES * size; i += LANES) store(room + i, _mm512_setzero_ps());
    }
    static Register spread_part(const float* room) { return load(room); }
    static void pack(__m512 shares, float* packed) { store(packed, shares); }
    static Register share(const float* packed, int step) { return _mm512_set1_ps(packed[step]); }
};

template <>
struct Numbers<float> : Widened<float> {};

#ifdef __AVX512BF16__
template <>
struct Numbers<uint16_t> {  // products of pairs
    using Register = __m512i;
    static constexpr int WIDTH = 2 * LANES, STEPS = LANES / 2;
    static Register get(const uint16_t* x) { return _mm512_loadu_si512(x); }
    static Register get(const uint16_t* x, int left) {  // the first `left` numbers, then zeros
        return _mm512_maskz_loadu_epi16(__mmask32((1u << left) - 1), x);
    }
    static __m512 add(__m512 sum, Register a, Register b) { return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b); }

    static void spread(const uint16_t* values, int left, int size, float* room) {
        for (int step = 0; step < STEPS; ++step)
            for (int d = 0; d < size; d += LANES) {
                __m512i low = half(values, 2 * step, left, size, d), high = half(values, 2 * step + 1, left, size, d);
                _mm512_storeu_si512(room + step * size + d, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
            }
    }
    static Register spread_part(const float* room) { return _mm512_loadu_si512(room); }
    static void pack(__m512 shares, float* packed) { store(reinterpret_cast<uint16_t*>(packed), shares); }
    static Register share(const float* packed, int step) {
        return _mm512_castps_si512(_mm512_set1_ps(packed[step]));
    }

private:
    static __m512i half(const uint16_t* values, int row, int left, int size, int d) {
        if (row >= left) return _mm512_setzero_si512();
        return _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(values + row * size + d)));
    }
};
#else
template <>
struct Numbers<uint16_t> : Widened<uint16_t> {};
#endif

}  // namespace quasar
