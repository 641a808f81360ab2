// The quantizer's inner loops: the search for a group's scale, and columns that are rounded one after the other.
//
// Outputs of a layer are independent of one another. In the loops over columns they lie in the lanes of registers, a
// column after the other in memory; in the search a group's weights do. No result depends on the number of threads.

#include <cmath>

#include "lanes.h"

using namespace quasar;

namespace {

constexpr int STRIPS = 4;  // registers of outputs side by side: a sum over columns waits for itself
constexpr int WIDE = STRIPS * LANES;
constexpr int MOST_COLUMNS = 128;  // of a block
constexpr int NEAREST = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;

// ln x for x ≥ 0: the mantissa by its first four bits and a short series, |r| ≤ 1/32; −∞ at 0.
struct Logarithm {
    __m512 inverse, log;
    Logarithm() {
        float inverses[LANES], logs[LANES];
        for (int i = 0; i < LANES; ++i) {
            double middle = 1 + (i + 0.5) / LANES;
            inverses[i] = float(1 / middle);
            logs[i] = float(-std::log(double(inverses[i])));
        }
        inverse = load(inverses), log = load(logs);
    }
    __m512 operator()(__m512 x) const {
        __m512 m = _mm512_getmant_ps(x, _MM_MANT_NORM_1_2, _MM_MANT_SIGN_zero);
        __m512i first = _mm512_srli_epi32(_mm512_castps_si512(m), 19);  // vpermps reads the lowest four bits
        __m512 r = _mm512_fmsub_ps(m, _mm512_permutexvar_ps(first, inverse), _mm512_set1_ps(1.0f));
        __m512 y = _mm512_set1_ps(0.2f);
        for (float term : {-0.25f, 1.0f / 3, -0.5f, 1.0f}) y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(term));
        y = _mm512_fmadd_ps(y, r, _mm512_permutexvar_ps(first, log));
        return _mm512_fmadd_ps(_mm512_getexp_ps(x), _mm512_set1_ps(0.693147181f), y);
    }
};

// The smallest and the largest of a group's weights and 0.
struct Extent {
    float low, high;
    Extent(const float* weight, int size) {
        __m512 lows = _mm512_setzero_ps(), highs = lows;
        for (int i = 0; i < size; i += LANES) {
            const __m512 w = _mm512_maskz_loadu_ps(first_lanes(size - i), weight + i);
            lows = _mm512_min_ps(lows, w), highs = _mm512_max_ps(highs, w);
        }
        low = _mm512_reduce_min_ps(lows), high = _mm512_reduce_max_ps(highs);
    }
};

// A group's grid as `grid.py` has it: scale as float16 stores it, zero.
struct Grid {
    float scale, zero;
    Grid(const Extent& extent, float shrink, int bits, bool sym, float smallest) {
        const float top = float((1 << bits) - 1), low = extent.low * shrink, high = extent.high * shrink;
        scale = (sym ? 2 * std::max(-low, high) : high - low) / top;
        scale = _cvtsh_ss(_cvtss_sh(std::max(scale, smallest), _MM_FROUND_TO_NEAREST_INT));
        if (sym && high > -low) scale = -scale;
        zero = sym ? float(1 << (bits - 1)) : std::clamp(std::nearbyint(-low / scale), 1.0f, top);
    }
};

// Σ |error|^exponent over a group.
float error_of(const float* weight, int size, const Grid& grid, int bits, float exponent, const Logarithm& logarithm) {
    const __m512 scale = _mm512_set1_ps(grid.scale), inverse = _mm512_set1_ps(1 / grid.scale);
    const __m512 low = _mm512_set1_ps(-grid.zero), high = _mm512_set1_ps(float((1 << bits) - 1) - grid.zero);
    __m512 sum = _mm512_setzero_ps();
    for (int i = 0; i < size; i += LANES) {
        __m512 w = _mm512_maskz_loadu_ps(first_lanes(size - i), weight + i);
        __m512 step = _mm512_roundscale_ps(_mm512_mul_ps(w, inverse), NEAREST);
        step = _mm512_min_ps(_mm512_max_ps(step, low), high);
        __m512 error = _mm512_abs_ps(_mm512_fnmadd_ps(step, scale, w));
        sum = _mm512_add_ps(sum, exponential(_mm512_mul_ps(_mm512_set1_ps(exponent), logarithm(error))));
    }
    return _mm512_reduce_add_ps(sum);
}

// A block of columns of a piece [columns, outputs] in the order in which they are visited, `stride` floats from one to
// the next (negative where that is from the last to the first); and each column's group in the piece's grid [G, outputs].
struct Block {
    int columns, outputs, stride;
    const int32_t* groups;
    const float *scales, *low, *high;  // low and high: the smallest and the largest step
    size_t at(int column, int output) const { return ptrdiff_t(column) * stride + output; }
    size_t in_group(int column, int output) const { return size_t(groups[column]) * outputs + output; }
};

// Sixteen outputs of a column, and what the column meets there.
struct Place {
    int column, output;
    __mmask16 lanes;
    __m512 load(const float* x) const { return _mm512_maskz_loadu_ps(lanes, x); }
};

// Columns of 64 outputs, one after the other: column i meets base_i − Σ kernel[i][j] · carried_j over the columns j before
// it, and `round(place, met)` returns what it carries on.
template <typename Round>
void visit(const float* base, const Block& block, const float* kernel, int begin, Round round) {
    alignas(64) float carried[MOST_COLUMNS][WIDE];
    for (int i = 0; i < block.columns; ++i) {
        Place places[STRIPS];
        __m512 met[STRIPS];
        for (int s = 0; s < STRIPS; ++s) {
            const int output = begin + s * LANES;
            places[s] = {i, output, first_lanes(block.outputs - output)};
            met[s] = places[s].load(base + block.at(i, output));
        }
        for (int j = 0; j < i; ++j) {
            const __m512 factor = _mm512_set1_ps(kernel[i * block.columns + j]);
            for (int s = 0; s < STRIPS; ++s)
                met[s] = _mm512_fnmadd_ps(factor, _mm512_load_ps(carried[j] + s * LANES), met[s]);
        }
        for (int s = 0; s < STRIPS; ++s) _mm512_store_ps(carried[i] + s * LANES, round(places[s], met[s]));
    }
}

// The step nearest to a wish, ties to even.
__m512 nearest(const Block& block, const Place& place, __m512 wish) {
    const size_t own = block.in_group(place.column, place.output);
    wish = _mm512_roundscale_ps(wish, NEAREST);
    return _mm512_min_ps(_mm512_max_ps(wish, place.load(block.low + own)), place.load(block.high + own));
}

}  // namespace

extern "C" {

// Scales and zeros [count] of groups [count, size]: of ranges shrunk in so many steps, those with the least Σ |error|^exponent.
void quasar_search_grids(const float* weight, float* scales, float* zeros, int64_t count, int size, int bits, int sym,
                         int steps, float smallest, float exponent, int threads) {
    const Logarithm logarithm;
#pragma omp parallel for num_threads(threads) schedule(dynamic, 16)
    for (int64_t row = 0; row < count; ++row) {
        const float* own = weight + row * size;
        const Extent extent(own, size);
        Grid best(extent, 1, bits, sym, smallest);
        float least = error_of(own, size, best, bits, exponent, logarithm);
        for (int step = 1; step < steps; ++step) {
            const Grid grid(extent, float(1 - 0.8 * step / steps), bits, sym, smallest);
            const float error = error_of(own, size, grid, bits, exponent, logarithm);
            if (error < least) least = error, best = grid;
        }
        scales[row] = best.scale, zeros[row] = best.zero;
    }
}

// Round a block's columns of weights; `kernel` [columns, columns] spreads an error over those visited later. Writes steps
// and errors, which lie as the weights do.
void quasar_round_columns(const float* weight, const float* kernel, const float* scales, const float* low,
                          const float* high, const int32_t* groups, float* steps, float* errors, int columns,
                          int outputs, int stride, int threads) {
    const Block block{columns, outputs, stride, groups, scales, low, high};
#pragma omp parallel for num_threads(threads) schedule(dynamic)
    for (int begin = 0; begin < outputs; begin += WIDE)
        visit(weight, block, kernel, begin, [&](const Place& place, __m512 met) {
            const size_t at = block.at(place.column, place.output);
            const __m512 scale = _mm512_mask_loadu_ps(_mm512_set1_ps(1), place.lanes,
                                                      scales + block.in_group(place.column, place.output));
            const __m512 step = nearest(block, place, _mm512_div_ps(met, scale));
            const __m512 error = _mm512_fnmadd_ps(step, scale, met);
            store(steps + at, step, place.lanes);
            store(errors + at, error, place.lanes);
            return error;
        });
}

// Move a block's columns to their best steps: `kernel` is −H, `curvature` its diagonal with ∞ for 0. Overwrites steps,
// writes moves (which lie as the gradient does), and adds each output's change of its loss to `gains`.
void quasar_descend_columns(const float* gradient, const float* kernel, const float* curvature, const float* scales,
                            const float* low, const float* high, const int32_t* groups, float* steps, float* moves,
                            float* gains, int columns, int outputs, int stride, int threads) {
    const Block block{columns, outputs, stride, groups, scales, low, high};
#pragma omp parallel for num_threads(threads) schedule(dynamic)
    for (int begin = 0; begin < outputs; begin += WIDE)
        visit(gradient, block, kernel, begin, [&](const Place& place, __m512 met) {
            const size_t at = block.at(place.column, place.output);
            const __m512 scale = _mm512_mask_loadu_ps(_mm512_set1_ps(1), place.lanes,
                                                      scales + block.in_group(place.column, place.output));
            const __m512 bend = _mm512_set1_ps(curvature[place.column]), half = _mm512_set1_ps(0.5f);
            const __m512 old = place.load(steps + at);
            const __m512 wish = _mm512_sub_ps(old, _mm512_div_ps(met, _mm512_mul_ps(bend, scale)));
            const __m512 step = nearest(block, place, wish);
            const __m512 move = _mm512_mul_ps(_mm512_sub_ps(step, old), scale);
            const __mmask16 moved = _mm512_cmp_ps_mask(step, old, _CMP_NEQ_UQ);  // else ∞ · 0 where the curvature is 0
            const __m512 slope = _mm512_fmadd_ps(_mm512_mul_ps(half, bend), move, met);
            float* gain = gains + place.output;
            store(gain, _mm512_mask3_fmadd_ps(slope, move, place.load(gain), moved), place.lanes);
            store(steps + at, step, place.lanes);
            store(moves + at, move, place.lanes);
            return move;
        });
}
}
