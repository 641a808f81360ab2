// The activations that a product takes, in the form that its weights ask for, and the product itself.

#pragma once

#include "codes.h"
#include "compressed.h"
#include "strips.h"
#ifdef QUASAR_TILES
#include "coded_tiles.h"
#include "paired_tiles.h"
#endif

namespace quasar {

constexpr int MOST_PARTS = 4;
constexpr int PIECE = 512;  // inputs that a thread prepares at a time: a multiple of every group of codes

// A linear layer: row after row in 16 or 32 bits, `Compressed` for 12 bits, or a stream of codes of 2, 4 or 8 bits.
struct Product {
    const void* weight;
    const float* bias;  // [out], or null
    int bits, in, out, groups, group;  // of codes: groups of so many inputs, the last one filled up with zeros
    bool in_halves() const { return bits == 12 || bits == 16; }
    bool coded() const { return bits < 12; }
};

// Products of one input, whose outputs stand beside one another.
struct FusedWeight {
    Product parts[MOST_PARTS];
    int count, in, out;
};

// The activations that a product takes, in the form that its weights ask for: 8-bit codes, bfloat16 or float32.
class ProductInput {
public:
    void reserve(const Product& product, int count) {
        const size_t size = size_t(count) * product.in;
        if (product.in_halves()) grow(halves, size);
        if (product.bits == 32) grow(singles, size);
        if (product.coded()) {
            const size_t groups = size_t(count) * product.groups;
            grow(values, groups * product.group), grow(scales, groups), grow(sums, groups);
        }
    }

    // Inputs [begin, end) of row t, from x [in]; both are multiples of PIECE, or the end of the row.
    void take(const Product& product, int t, const float* x, int begin, int end) {
        const size_t row = size_t(t) * product.in;
        if (product.in_halves())
            for (int i = begin; i < end; i += LANES) Numbers<uint16_t>::put(halves.data() + row + i, load(x + i));
        else if (product.bits == 32)
            for (int i = begin; i < end; i += LANES) Numbers<float>::put(singles.data() + row + i, load(x + i));
        else {
            const CodedRows rows = coded(product);
            for (int g = begin / rows.group; g * rows.group < end; ++g) quantize_group(x, rows, t, g);
        }
    }

    // A thread's share of the product for all rows of the pass.
    template <typename Put>
    void multiply(const Product& product, int count, int thread, int threads, Put put) {
        auto with_bias = [&](int t, int o, Lanes lanes, Floats value) {
            if (product.bias) value = value + load(product.bias + o, lanes);
            put(t, o, lanes, value);
        };
        if (product.coded()) {
            Range blocks((product.out + BLOCK - 1) / BLOCK, thread, threads);
            return multiply_codes(product.bits, product.weight, coded(product), blocks, 0, count, product.out,
                                  with_bias);
        }
        const Range strips((product.out + STRIP - 1) / STRIP, thread, threads);
        auto multiply = [&](const auto& weight, const auto* x) {
            multiply_strips(weight, x, product.in, strips, count, product.out, with_bias);
        };
        if (product.bits == 12)
            multiply(*static_cast<const Compressed*>(product.weight), halves.data());
        else if (product.bits == 16)
            multiply(static_cast<const uint16_t*>(product.weight), halves.data());
        else
            multiply(static_cast<const float*>(product.weight), singles.data());
    }

private:
    Buffer<Numbers<uint16_t>::Row> halves;
    Buffer<int8_t> values;
    Buffer<float> singles, scales, sums;

    CodedRows coded(const Product& product) {
        return {values.data(), scales.data(), sums.data(), product.in, product.groups, product.group};
    }
};

}  // namespace quasar
