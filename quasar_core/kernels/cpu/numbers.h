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

// Of a kind of numbers X: the TERMS of STEP of them, registers that products take one after the other, from where weights
// lie and from where activations do (a row of `Row`), or of `Words`, which make TERMS_OF_WORDS; the sum of their products.
// Where a step is of more than 16, the `last` one of a row may have but 16.
//
// And as attention takes them, in words of 32 bits with TOGETHER numbers each: a key as it lies, `packed` with PACKED numbers
// in a word, whose columns over sixteen keys are unpacked to words; a query; sixteen values, and their shares, in STEPS rows;
// the sum of products of words.
template <typename X>
struct Numbers;

// Pairs of bfloat16 as they lie.
inline Part load_words(const uint16_t* row, int first, int left) {
    const float* from = reinterpret_cast<const float*>(row) + first;
    return left < WIDTH ? load_part(from, first_lanes(left)) : load_part(from);
}

// Attention in float32.
template <typename X>
struct WideWords {
    static constexpr int TOGETHER = 1, STEPS = LANES, PACKED = sizeof(float) / sizeof(X);
    static Part packed(const float* row, int first, int) { return load_part(row + first); }
    static Part packed(const uint16_t* row, int first, int left) { return load_words(row, first, left); }
    static void unpack(Part column, float* to, int stride) {
        if (PACKED == 1) return store_part(to, column);
        store_part(to, Part(UnsignedPart(column) << 16)), store_part(to + stride, Part(UnsignedPart(column) & 0xffff0000));
    }
    static void put_words(const X* row, int size, float* to) {
        for (int i = 0; i < size; i += LANES) store(to + i, load(row + i));
    }
    static Part add_words(Part sum, Part a, Part b) { return fused(a, b, sum); }
    static void spread(const X* values, int left, int size, float* room) {
        for (int i = 0; i < left * size; i += LANES) store(room + i, load(values + i));
        for (int i = left * size; i < LANES * size; i += LANES) store(room + i, Floats(0.0f));
    }
    static void pack(Floats shares, float* packed) { store(packed, shares); }
};

template <>
struct Numbers<float> : WideWords<float> {
    using Row = float;
    static constexpr int STEP = WIDTH, TERMS = 1;
    template <int>
    static Part term(const float* w, bool) { return load_part(w); }
    template <int>
    static Part term_of_row(const float* x, bool) { return load_part(x); }
    static Part add(Part sum, Part a, Part b) { return fused(a, b, sum); }
    static void put(float* row, Floats x) { store(row, x); }
};

#if defined(QUASAR_PAIRS)
template <>
struct Numbers<uint16_t> {  // products of pairs
    using Row = uint16_t;
    static constexpr int STEP = 2 * WIDTH, TERMS = 1, TERMS_OF_WORDS = 1, TOGETHER = 2, STEPS = LANES / 2, PACKED = 2;
    template <int>
    static Pairs term(const uint16_t* w, bool last) { return load_pairs(w, last); }
    template <int>
    static Pairs term(Words words, bool last) { return (Pairs)(last ? first_words(words) : words); }
    template <int>
    static Pairs term_of_row(const uint16_t* x, bool last) { return load_pairs(x, last); }
    static Part add(Part sum, Pairs a, Pairs b) { return add_pairs(sum, a, b); }
    static void put(uint16_t* row, Floats x) { store(row, x); }

    static Part packed(const uint16_t* row, int first, int left) { return load_words(row, first, left); }
    static void unpack(Part column, float* to, int) { store_part(to, column); }
    static void put_words(const uint16_t* row, int size, float* to) { std::memcpy(to, row, size * sizeof *row); }
    static Part add_words(Part sum, Part a, Part b) { return add_pairs(sum, Pairs(a), Pairs(b)); }
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

private:
    static Floats value(const uint16_t* values, int row, int left, int size, int d) {
        return row < left ? load(values + row * size + d) : Floats(0.0f);
    }
};
#elif defined(QUASAR_AVX512)
template <>
struct Numbers<uint16_t> : WideWords<uint16_t> {
    using Row = float;  // rounded to bfloat16
    static constexpr int STEP = WIDTH, TERMS = 1, TERMS_OF_WORDS = 2;
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
    static Part add(Part sum, Part a, Part b) { return fused(a, b, sum); }
    static void put(float* row, Floats x) {
        alignas(64) uint16_t rounded[LANES];
        store(rounded, x);
        store(row, load(rounded));
    }
};
#else
template <>
struct Numbers<uint16_t> : WideWords<uint16_t> {
    using Row = float;  // rounded to bfloat16; of a register's numbers first the even ones, then the odd ones
    static constexpr int STEP = 2 * WIDTH, TERMS = 2, TERMS_OF_WORDS = 2;
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
    static void put(float* row, Floats x) {
        alignas(64) uint16_t rounded[LANES];
        store(rounded, x);
        for (int i = 0; i < LANES; i += STEP) {
            store_part(row + i, term<0>(rounded + i, false)), store_part(row + i + WIDTH, term<1>(rounded + i, false));
        }
    }
};
#endif

}  // namespace quasar
