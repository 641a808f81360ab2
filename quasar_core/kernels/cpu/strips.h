// A product y[t, o] = sum of w[o, i] · x[t, i], of whatever kind the weights are: a strip of sixteen outputs at a time.
//
// The weights of a strip are read from memory once and multiplied with all rows of the pass, a tile of a few
// outputs and a few rows at a time, whose sums fill the registers; meanwhile those of the next strip are on their way. A
// row's sums are added in the same order in every tile, so its product does not depend on the other rows of a pass, to the
// last bit.
//
// A kind of weights is told by its strip: `PlainStrip` here, `CompressedStrip` in `compressed.h`. Of each:
//
//   Kind, STEP, TERMS   its numbers, how many of a row are taken at a time, and the registers of products that they make
//   MOST, beside(rows)  the most rows of a tile, and by its rows the outputs side by side
//   lines(outputs)      cache lines that set out from memory at each step of a tile
//   in, outs, row(o), row_bytes()
//   reader(o)           its take(i, taken) gives inputs i, i + 1, … of the outputs from o on, each time further on

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
    void fetch() { fetch(0, lines); }
    void fetch(int begin, int end) {  // of a step's lines
        for (int line = begin; line < end; ++line, from += 64) __builtin_prefetch(from, 0, 2);
    }
};

// Weights of 16 or 32 bits that lie row after row, as files have them.
template <typename X>
struct PlainStrip {
    using Kind = Numbers<X>;
    using Taken = const X*;
    static constexpr int STEP = Kind::STEP, TERMS = Kind::TERMS, MOST = MOST_ROWS;
    static constexpr int beside(int rows) { return outputs_beside(rows); }
    static constexpr int lines(int outputs) { return outputs; }

    const X* w;  // [outs, in]
    int in, outs;
    size_t row_bytes() const { return in * sizeof(X); }
    const char* row(int o) const { return reinterpret_cast<const char*>(w + size_t(o) * in); }

    struct Reader {
        const X* w;
        int in;
        template <int OUTS>
        QUASAR_INLINE void take(int i, Taken (&taken)[OUTS]) const {
#pragma GCC unroll 8
            for (int o = 0; o < OUTS; ++o) taken[o] = w + size_t(o) * in + i;
        }
    };
    Reader reader(int o) const { return {w + size_t(o) * in, in}; }
};

// Strip `at` of a weight [out, in].
template <typename X>
PlainStrip<X> strip_of(const X* weight, int in, int out, int at) {
    const int first = at * STRIP;
    return {weight + size_t(first) * in, in, std::min(STRIP, out - first)};
}

// The sums of the OUTS outputs from `o` on and of ROWS rows: x [ROWS, in], sums [ROWS, STRIP]; `in` is a multiple of 16.
template <int OUTS, int ROWS, typename Strip>
void multiply_tile(const Strip& strip, int o, const typename Strip::Kind::Row* x, Coming coming, Part* sums) {
    using Kind = typename Strip::Kind;
    const int in = strip.in;
    auto reader = strip.reader(o);
    Part sum[ROWS][OUTS];
    for (auto& line : sum)
        for (auto& one : line) one = spread(0);
    auto add_term = [&](auto term, auto last, const auto& taken, int i) QUASAR_INLINE {
        constexpr int TERM = decltype(term)::value;
        constexpr bool LAST = decltype(last)::value;
        decltype(Kind::template term<TERM>(taken[0], LAST)) weights[OUTS];
#pragma GCC unroll 8
        for (int k = 0; k < OUTS; ++k) weights[k] = Kind::template term<TERM>(taken[k], LAST);
#pragma GCC unroll 8
        for (int t = 0; t < ROWS; ++t) {
            auto row = Kind::template term_of_row<TERM>(x + size_t(t) * in + i, LAST);
            hold(row);
#pragma GCC unroll 8
            for (int k = 0; k < OUTS; ++k) sum[t][k] = Kind::add(sum[t][k], weights[k], row);
        }
    };
    auto add = [&](int i, auto last) QUASAR_INLINE {
        typename Strip::Taken taken[OUTS];
        reader.take(i, taken);
        add_term(std::integral_constant<int, 0>(), last, taken, i);
        if constexpr (Strip::TERMS > 1) add_term(std::integral_constant<int, 1>(), last, taken, i);
    };
    int i = 0;
    for (; i + Strip::STEP <= in; i += Strip::STEP) {
        coming.fetch();
        add(i, std::false_type());
    }
    if constexpr (Strip::STEP > LANES)
        if (i < in) add(i, std::true_type());
    for (int t = 0; t < ROWS; ++t)
        for (int k = 0; k < OUTS; ++k) sums[t * STRIP + k] = sum[t][k];
}

// The outputs of a strip, of ROWS rows, to y [ROWS]. Of `tiles` tiles of rows this is number `tile`: each of them sends for
// a part of the next strip's weights.
template <int ROWS, typename Strip>
void multiply_strip(const Strip& strip, const typename Strip::Kind::Row* x, int tile, int tiles, Floats* y) {
    constexpr int BESIDE = Strip::beside(ROWS);
    static_assert(STRIP % BESIDE == 0, "a strip is cut into tiles");
    const size_t before = BESIDE * strip.row_bytes() * tile / tiles;
    const int lines = (Strip::lines(BESIDE) + tiles - 1) / tiles;
    Part sums[ROWS * STRIP];
    int o = 0;
    for (; o + BESIDE <= strip.outs; o += BESIDE)
        multiply_tile<BESIDE, ROWS>(strip, o, x, {strip.row(o + STRIP) + before, lines}, sums + o);
    for (; o < strip.outs; ++o) multiply_tile<1, ROWS>(strip, o, x, {nullptr, 0}, sums + o);
    for (; o < STRIP; ++o)
        for (int t = 0; t < ROWS; ++t) sums[t * STRIP + o] = spread(0);
    for (int t = 0; t < ROWS; ++t) y[t] = sum_lanes(sums + t * STRIP);
}

template <int ROWS = 1, typename Strip, typename... Arguments>
void multiply_strip_of(int rows, const Strip& strip, Arguments... arguments) {
    if constexpr (ROWS < Strip::MOST)
        if (rows > ROWS) return multiply_strip_of<ROWS + 1>(rows, strip, arguments...);
    multiply_strip<ROWS>(strip, arguments...);
}

#ifdef QUASAR_TILES
template <typename Weight, typename Put>  // `paired_tiles.h`
void multiply_strips_in_tiles(const Weight& weight, const uint16_t* x, int in, Range strips, int count, int out, Put put);
#endif

// `count` rows of x times some strips of a weight [out, in]; `put` as for codes.
template <typename Weight, typename Row, typename Put>
void multiply_strips(const Weight& weight, const Row* x, int in, Range strips, int count, int out, Put put) {
#ifdef QUASAR_TILES
    if constexpr (std::is_same_v<Row, uint16_t>)
        return multiply_strips_in_tiles(weight, x, in, strips, count, out, put);
#endif
    using Strip = decltype(strip_of(weight, in, out, 0));
    Floats y[Strip::MOST];
    for (int at = strips.begin; at < strips.end; ++at) {
        const Strip strip = strip_of(weight, in, out, at);
        Tiles tiles(count, Strip::MOST);
        for (int tile = 0, row = 0; tile < tiles.total; ++tile) {
            const int rows = tiles.next();
            multiply_strip_of(rows, strip, x + size_t(row) * in, tile, tiles.total, y);
            for (int t = 0; t < rows; ++t) put(row + t, at * STRIP, first_lanes(strip.outs), y[t]);
            row += rows;
        }
    }
}

}  // namespace quasar
