// A product with weights of 16 or 32 bits that lie row after row, as files have them: y[t, o] = sum of w[o, i] · x[t, i].
//
// A few outputs and up to 8 rows of activations share each loaded register. A row's sums are added in the same order
// whatever stands beside it, so its product does not depend on the other rows of a pass, to the last bit.

#pragma once

#include "numbers.h"
#include "team.h"

namespace quasar {

constexpr int STRIP = 48;         // outputs whose weights stay in the cache for all rows: a multiple of every BESIDE
constexpr int MAX_ROWS = 8;       // rows of activations in registers

// OUTS outputs of ROWS rows: w [OUTS, in], x [ROWS, in], y [ROWS, STRIP]; `in` is a multiple of 16.
template <typename X, int OUTS, int ROWS>
void multiply_rows_tile(const X* w, const typename Numbers<X>::Row* x, int in, float* y) {
    using Kind = Numbers<X>;
    constexpr int PADDED = (OUTS * ROWS + LANES - 1) / LANES * LANES;
    Part sums[PADDED];
    for (auto& sum : sums) sum = spread(0);
    int i = 0;
    for (; i + Kind::STEP <= in; i += Kind::STEP) {
        typename Kind::Register weights[OUTS];
#pragma GCC unroll 8
        for (int o = 0; o < OUTS; ++o) {
            // The next outputs are on their way while these are multiplied; a lone row leaves that to the processor.
            if (ROWS > 1) __builtin_prefetch(w + size_t(OUTS + o) * in + i);
            weights[o] = Kind::get(w + size_t(o) * in + i);
        }
#pragma GCC unroll 8
        for (int t = 0; t < ROWS; ++t) {
            const auto row = Kind::get_row(x + size_t(t) * in + i);
#pragma GCC unroll 8
            for (int o = 0; o < OUTS; ++o) sums[t * OUTS + o] = Kind::add(sums[t * OUTS + o], weights[o], row);
        }
    }
    if constexpr (Kind::STEP > LANES)
        if (i < in)
            for (int t = 0; t < ROWS; ++t)
                for (int o = 0; o < OUTS; ++o)
                    sums[t * OUTS + o] = Kind::add(sums[t * OUTS + o], Kind::get_last(w + size_t(o) * in + i),
                                                   Kind::get_last(x + size_t(t) * in + i));
    alignas(64) float totals[PADDED];
    for (int from = 0; from < PADDED; from += LANES) {
        Part part[LANES];
        for (int lane = 0; lane < LANES; ++lane) part[lane] = sums[from + lane];
        store(totals + from, sum_lanes(part));
    }
    for (int t = 0; t < ROWS; ++t)
        for (int o = 0; o < OUTS; ++o) y[t * STRIP + o] = totals[t * OUTS + o];
}

// As many outputs beside one another as registers allow.
template <typename X, int ROWS>
void multiply_strip(const X* w, const typename Numbers<X>::Row* x, int in, int outs, float* y) {
    constexpr int BESIDE = outputs_beside(ROWS);
    static_assert(STRIP % BESIDE == 0, "a strip is cut into tiles");
    int o = 0;
    for (; o + BESIDE <= outs; o += BESIDE) multiply_rows_tile<X, BESIDE, ROWS>(w + size_t(o) * in, x, in, y + o);
    for (; o < outs; ++o) multiply_rows_tile<X, 1, ROWS>(w + size_t(o) * in, x, in, y + o);
}

template <typename X>
void multiply_strip_of(int rows, const X* w, const typename Numbers<X>::Row* x, int in, int outs, float* y) {
    switch (rows) {
        case 1: return multiply_strip<X, 1>(w, x, in, outs, y);
        case 2: return multiply_strip<X, 2>(w, x, in, outs, y);
        case 3: return multiply_strip<X, 3>(w, x, in, outs, y);
        case 4: return multiply_strip<X, 4>(w, x, in, outs, y);
        case 5: return multiply_strip<X, 5>(w, x, in, outs, y);
        case 6: return multiply_strip<X, 6>(w, x, in, outs, y);
        case 7: return multiply_strip<X, 7>(w, x, in, outs, y);
        default: return multiply_strip<X, MAX_ROWS>(w, x, in, outs, y);
    }
}

// Rows [begin, end) of x times some strips of outputs; `put` as for codes.
template <typename X, typename Put>
void multiply_strips(const void* weight, const typename Numbers<X>::Row* x, int in, Range strips, int begin, int end,
                     int out, Put put) {
    auto w = static_cast<const X*>(weight);
    alignas(64) float tile[MAX_ROWS * STRIP];
    for (int strip = strips.begin; strip < strips.end; ++strip) {
        const int first = strip * STRIP, outs = std::min(STRIP, out - first);
        for (int row = begin; row < end;) {
            const int tiles = (end - row + MAX_ROWS - 1) / MAX_ROWS;
            const int count = (end - row + tiles - 1) / tiles;
            multiply_strip_of<X>(count, w + size_t(first) * in, x + size_t(row) * in, in, outs, tile);
            for (int t = 0; t < count; ++t)
                for (int o = 0; o < outs; o += LANES)
                    put(row + t, first + o, first_lanes(outs - o), load(tile + t * STRIP + o));
            row += count;
        }
    }
}

}  // namespace quasar
