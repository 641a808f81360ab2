// A product with weights of 16 or 32 bits that lie row after row, as files have them: y[t, o] = sum of w[o, i] · x[t, i].
//
// The weights of a strip of outputs are read from memory once and multiplied with all rows of the pass, a tile of a few
// outputs and a few rows at a time, whose sums fill the registers; meanwhile those of the next strip are on their way. A
// row's sums are added in the same order in every tile, so its product does not depend on the other rows of a pass, to the
// last bit.

#pragma once

#include "numbers.h"
#include "team.h"

namespace quasar {

constexpr int STRIP = LANES;  // outputs

// Weights that set out from memory while others are multiplied, so many cache lines at every step. They stop in the second
// cache: the first keeps account of few that are under way, and what is multiplied waits for those.
struct Coming {
    const char* from;
    int lines;
    void fetch() {
        for (int line = 0; line < lines; ++line, from += 64) __builtin_prefetch(from, 0, 2);
    }
};

// The sums of OUTS outputs and ROWS rows: w [OUTS, in], x [ROWS, in], sums [ROWS, STRIP]; `in` is a multiple of 16.
template <typename X, int OUTS, int ROWS>
void multiply_rows_tile(const X* w, const typename Numbers<X>::Row* x, int in, Coming coming, Part* sums) {
    using Kind = Numbers<X>;
    Part sum[ROWS][OUTS];
    for (auto& line : sum)
        for (auto& one : line) one = spread(0);
    auto add_term = [&](auto term, int i) QUASAR_INLINE {
        constexpr int TERM = decltype(term)::value;
        decltype(Kind::template term<TERM>(w)) weights[OUTS];
#pragma GCC unroll 8
        for (int o = 0; o < OUTS; ++o) weights[o] = Kind::template term<TERM>(w + size_t(o) * in + i);
#pragma GCC unroll 8
        for (int t = 0; t < ROWS; ++t) {
            auto row = Kind::template term_of_row<TERM>(x + size_t(t) * in + i);
            hold(row);
#pragma GCC unroll 8
            for (int o = 0; o < OUTS; ++o) sum[t][o] = Kind::add(sum[t][o], weights[o], row);
        }
    };
    int i = 0;
    for (; i + Kind::STEP <= in; i += Kind::STEP) {
        coming.fetch();
        add_term(std::integral_constant<int, 0>(), i);
        if constexpr (Kind::TERMS > 1) add_term(std::integral_constant<int, 1>(), i);
    }
    if constexpr (Kind::STEP > LANES)
        if (i < in)
            for (int t = 0; t < ROWS; ++t)
                for (int o = 0; o < OUTS; ++o)
                    sum[t][o] = Kind::add(sum[t][o], Kind::get_last(w + size_t(o) * in + i),
                                          Kind::get_last(x + size_t(t) * in + i));
    for (int t = 0; t < ROWS; ++t)
        for (int o = 0; o < OUTS; ++o) sums[t * STRIP + o] = sum[t][o];
}

// The outputs of a strip, or the `outs` that are left, of ROWS rows, to y [ROWS]. Of `tiles` tiles of rows this is number
// `tile`: each of them sends for a part of the next strip's weights.
template <typename X, int ROWS>
void multiply_strip(const X* w, const typename Numbers<X>::Row* x, int in, int outs, int tile, int tiles, Floats* y) {
    constexpr int BESIDE = outputs_beside(ROWS);
    static_assert(STRIP % BESIDE == 0, "a strip is cut into tiles");
    const size_t bytes = size_t(BESIDE) * in * sizeof(X);
    Part sums[ROWS * STRIP];
    int o = 0;
    for (; o + BESIDE <= outs; o += BESIDE) {
        auto next = reinterpret_cast<const char*>(w + size_t(o + STRIP) * in);
        const Coming coming{next + bytes * tile / tiles, (BESIDE + tiles - 1) / tiles};
        multiply_rows_tile<X, BESIDE, ROWS>(w + size_t(o) * in, x, in, coming, sums + o);
    }
    for (; o < outs; ++o) multiply_rows_tile<X, 1, ROWS>(w + size_t(o) * in, x, in, {nullptr, 0}, sums + o);
    for (; o < STRIP; ++o)
        for (int t = 0; t < ROWS; ++t) sums[t * STRIP + o] = spread(0);
    for (int t = 0; t < ROWS; ++t) y[t] = sum_lanes(sums + t * STRIP);
}

template <typename X, int ROWS = 1, typename... Arguments>
void multiply_strip_of(int rows, Arguments... arguments) {
    if constexpr (ROWS < MOST_ROWS)
        if (rows > ROWS) return multiply_strip_of<X, ROWS + 1>(rows, arguments...);
    multiply_strip<X, ROWS>(arguments...);
}

// `count` rows of x times some strips of outputs; `put` as for codes.
template <typename X, typename Put>
void multiply_strips(const void* weight, const typename Numbers<X>::Row* x, int in, Range strips, int count, int out,
                     Put put) {
    Floats y[MOST_ROWS];
    for (int strip = strips.begin; strip < strips.end; ++strip) {
        const int first = strip * STRIP, outs = std::min(STRIP, out - first);
        const X* w = static_cast<const X*>(weight) + size_t(first) * in;
        Tiles tiles(count, MOST_ROWS);
        for (int tile = 0, row = 0; tile < tiles.total; ++tile) {
            const int rows = tiles.next();
            multiply_strip_of<X>(rows, w, x + size_t(row) * in, in, outs, tile, tiles.total, y);
            for (int t = 0; t < rows; ++t) put(row + t, first, first_lanes(outs), y[t]);
            row += rows;
        }
    }
}

}  // namespace quasar
