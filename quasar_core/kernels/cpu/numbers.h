// The two kinds of numbers in weights and caches, bfloat16 and float32, and how a register of their products is summed.

#pragma once

#include <limits>
#include <new>
#include <vector>

#include "lanes.h"

namespace quasar {

// Of a step of a tile: were it called, the tile's sums would lie in memory.
#define QUASAR_INLINE __attribute__((always_inline))

constexpr std::align_val_t LINE{64};  // bytes of a cache line, and of the longest register: a load across two takes twice

constexpr float LEAST = -std::numeric_limits<float>::infinity();

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

// Of a kind of numbers X: a `Register` of STEP of them as attention takes it from where cached states lie; its TERMS, the
// registers that products take one after the other, from where weights lie and from where activations do (a row of `Row`),
// or of `Words`, which make TERMS_OF_WORDS; the sum of their products; and sixteen values as attention weighs them, in STEPS
// rows of a room [16, D] of 32-bit lanes. Where a step is of more than 16, the `last` one of a row may have but 16.
template <typename X>
struct Numbers;

// Values that are weighed in float32, a row each.
template <typename X>
struct WideValues {
    static constexpr int STEPS = LANES;
    static void spread(const X* values, int left, int size, float* room) {
        for (int i = 0; i < left * size; i += LANES) store(room + i, load(values + i));
        for (int i = left * size; i < LANES * size; i += LANES) store(room + i, Floats(0.0f));
    }
    static void pack(Floats shares, float* packed) { store(packed, shares); }
    static Part weigh(Part sum, Part share, const float* room) { return fused(share, load_part(room), sum); }
};

template <>
struct Numbers<float> : WideValues<float> {
    using Row = float;
    using Register = Part;
    static constexpr int STEP = WIDTH, TERMS = 1;
    static Register get(const float* x) { return load_part(x); }
    template <int>
    static Part term(const float* w, bool) { return load_part(w); }
    template <int>
    static Part term_of_row(const float* x, bool) { return load_part(x); }
    static Part add(Part sum, Register a, Register b) { return fused(a, b, sum); }
    static void put(float* row, Floats x) { store(row, x); }
};

#if defined(QUASAR_PAIRS)
template <>
struct Numbers<uint16_t> {  // products of pairs
    using Row = uint16_t;
    using Register = Pairs;
    static constexpr int STEP = 2 * WIDTH, TERMS = 1, TERMS_OF_WORDS = 1, STEPS = LANES / 2;
    static Register get(const uint16_t* x, bool last = false) { return load_pairs(x, last); }
    template <int>
    static Pairs term(const uint16_t* w, bool last) { return load_pairs(w, last); }
    template <int>
    static Pairs term(Words words, bool last) { return (Pairs)(last ? first_words(words) : words); }
    template <int>
    static Pairs term_of_row(const uint16_t* x, bool last) { return load_pairs(x, last); }
    static Part add(Part sum, Register a, Register b) { return add_pairs(sum, a, b); }
    static void put(uint16_t* row, Floats x) { store(row, x); }

    static void spread(const uint16_t* values, int left, int size, float* room) {
        for (int step = 0; step < STEPS; ++step)
            for (int d = 0; d < size; d += LANES) {
                const Floats low = value(values, 2 * step, left, size, d), high = value(values, 2 * step + 1, left, size, d);
                store(room + step * size + d, Floats::each([&](int p) {
                          return Part(UnsignedPart(low.part[p]) >> 16 | UnsignedPart(high.part[p]));
                      }));
            }
    }
    static void pack(Floats shares, float* packed) { store(reinterpret_cast<uint16_t*>(packed), shares); }
    static Part weigh(Part sum, Part share, const float* room) {
        return add_pairs(sum, Pairs(share), Pairs(load_part(room)));
    }

private:
    static Floats value(const uint16_t* values, int row, int left, int size, int d) {
        return row < left ? load(values + row * size + d) : Floats(0.0f);
    }
};
#elif defined(QUASAR_AVX512)
template <>
struct Numbers<uint16_t> : WideValues<uint16_t> {
    using Row = float;  // rounded to bfloat16
    using Register = Part;
    static constexpr int STEP = WIDTH, TERMS = 1, TERMS_OF_WORDS = 2;
    static Register get(const uint16_t* x) { return from_bfloat16(x); }
    template <int>
    static Part term(const uint16_t* w, bool) { return from_bfloat16(w); }
    template <int half>
    static Part term(Words words, bool last) {
        if (last) words = first_words(words);
        const __m256i own = half ? _mm512_extracti64x4_epi64(words, 1) : _mm512_castsi512_si256(words);
        return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(own), 16));
    }
    template <int half>
    static Part term_of_row(const float* x, bool last) {
        return half && last ? quasar::spread(0) : load_part(x + half * WIDTH);
    }
    static Part add(Part sum, Register a, Register b) { return fused(a, b, sum); }
    static void put(float* row, Floats x) {
        alignas(64) uint16_t rounded[LANES];
        store(rounded, x);
        store(row, load(rounded));
    }
};
#else
template <>
struct Numbers<uint16_t> : WideValues<uint16_t> {
    using Row = float;  // rounded to bfloat16; of a register's numbers first the even ones, then the odd ones
    struct Register {
        Part even, odd;
    };
    static constexpr int STEP = 2 * WIDTH, TERMS = 2, TERMS_OF_WORDS = 2;
    static Register get(const uint16_t* x) { return {term<0>(x, false), term<1>(x, false)}; }
    template <int odd>
    static Part term(const uint16_t* w, bool) {
        UnsignedPart both;
        std::memcpy(&both, w, sizeof both);
        return Part(odd ? both & 0xffff0000 : both << 16);
    }
    template <int odd>
    static Part term(Words words, bool) {
        const UnsignedPart both = (UnsignedPart)words;
        return Part(odd ? both & 0xffff0000 : both << 16);
    }
    template <int odd>
    static Part term_of_row(const float* x, bool) { return load_part(x + odd * WIDTH); }
    static Part add(Part sum, Part a, Part b) { return fused(a, b, sum); }
    static Part add(Part sum, Register a, Register b) { return add(add(sum, a.even, b.even), a.odd, b.odd); }
    static void put(float* row, Floats x) {
        alignas(64) uint16_t rounded[LANES];
        store(rounded, x);
        for (int i = 0; i < LANES; i += STEP) {
            const Register both = get(rounded + i);
            store_part(row + i, both.even), store_part(row + i + WIDTH, both.odd);
        }
    }
};
#endif

}  // namespace quasar
