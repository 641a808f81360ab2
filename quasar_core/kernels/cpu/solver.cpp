// The quantizer's inner loops: the search for a group's scale, columns that are rounded one after the other, Hessians' sums,
// and whole rows of logits.
//
// Outputs of a layer are independent of one another. In the loops over columns they lie in the lanes of registers, a
// column after the other in memory; in the search a group's weights do. No result depends on the number of threads.

#include <cmath>
#include <limits>

#include "attention.h"
#include "lanes.h"
#include "logit_rows.h"
#include "team.h"
#include "token_sums.h"

using namespace quasar;

namespace {

constexpr int STRIPS = 4;  // registers of outputs side by side: a sum over columns waits for itself
constexpr int WIDE = STRIPS * LANES;
constexpr int MOST_COLUMNS = 128;  // of a block

// ln x for x ≥ 0: the mantissa by its first four bits and a short series, |r| ≤ 1/32; below −87 where x is 0 or nearly.
struct Logarithm {
    float inverse[LANES], log[LANES];
    Logarithm() {
        for (int i = 0; i < LANES; ++i) {
            const double middle = 1 + (i + 0.5) / LANES;
            inverse[i] = float(1 / middle);
            log[i] = float(-std::log(double(inverse[i])));
        }
    }
    Floats operator()(Floats x) const {
        return Floats::each([&](int p) {
            const UnsignedPart bits = UnsignedPart(x.part[p]);
            const Part mantissa = Part((bits & 0x7fffff) | 0x3f800000);  // in [1, 2)
            const IntPart exponent = IntPart(bits >> 23) - 127, first = IntPart(bits >> 19 & 15);
            const Part r = fused(mantissa, look_up(inverse, first), spread(-1.0f));
            Part y = spread(0.2f);
            for (float term : {-0.25f, 1.0f / 3, -0.5f, 1.0f}) y = fused(y, r, spread(term));
            y = fused(y, r, look_up(log, first));
            return fused(to_floats(exponent), spread(0.693147181f), y);
        });
    }
};

// The smallest and the largest of a group's weights and 0.
struct Extent {
    float low, high;
    Extent(const float* weight, int size) {
        Floats lows = 0.0f, highs = 0.0f;
        for (int i = 0; i < size; i += LANES) {
            const Floats w = load(weight + i, first_lanes(size - i));
            lows = smaller(lows, w), highs = larger(highs, w);
        }
        low = least_of(lows), high = largest_of(highs);
    }
};

// What float16 keeps of x > 0: eleven bits, or multiples of 2^−24 below 2^−14.
float rounded_to_half(float x) {
    if (x < 1.0f / (1 << 14)) return std::nearbyint(x * float(1 << 24)) * (1.0f / (1 << 24));
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    bits = (bits + 0xfff + (bits >> 13 & 1)) & ~0x1fffu;
    std::memcpy(&x, &bits, sizeof bits);
    return x < 65536.0f ? x : std::numeric_limits<float>::infinity();
}

// A group's grid as `grid.py` has it: scale as float16 stores it, zero.
struct Grid {
    float scale, zero;
    Grid(const Extent& extent, float shrink, int bits, bool sym, float smallest) {
        const float top = float((1 << bits) - 1), low = extent.low * shrink, high = extent.high * shrink;
        scale = (sym ? 2 * std::max(-low, high) : high - low) / top;
        scale = rounded_to_half(std::max(scale, smallest));
        if (sym && high > -low) scale = -scale;
        zero = sym ? float(1 << (bits - 1)) : std::clamp(std::nearbyint(-low / scale), 1.0f, top);
    }
};

// Σ |error|^exponent over a group.
float error_of(const float* weight, int size, const Grid& grid, int bits, float exponent, const Logarithm& logarithm) {
    const Floats scale = -grid.scale, inverse = 1 / grid.scale;
    const Floats low = -grid.zero, high = float((1 << bits) - 1) - grid.zero;
    Floats sum = 0.0f;
    for (int i = 0; i < size; i += LANES) {
        const Floats w = load(weight + i, first_lanes(size - i));
        const Floats step = smaller(larger(nearest(w * inverse), low), high);
        const Floats error = magnitude(fused(step, scale, w));
        sum = sum + exponential(logarithm(error) * exponent);
    }
    return sum_of(sum);
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
    Lanes lanes;
    Floats load(const float* x) const { return quasar::load(x, lanes); }
};

// Columns of 64 outputs, one after the other: column i meets base_i − Σ kernel[i][j] · carried_j over the columns j before
// it, and `round(place, met)` returns what it carries on.
template <typename Round>
void visit(const float* base, const Block& block, const float* kernel, int begin, Round round) {
    alignas(64) float carried[MOST_COLUMNS][WIDE];
    for (int i = 0; i < block.columns; ++i) {
        Place places[STRIPS];
        Floats met[STRIPS];
        for (int s = 0; s < STRIPS; ++s) {
            const int output = begin + s * LANES;
            places[s] = {i, output, first_lanes(block.outputs - output)};
            met[s] = places[s].load(base + block.at(i, output));
        }
        for (int j = 0; j < i; ++j) {
            const Floats factor = -kernel[i * block.columns + j];
            for (int s = 0; s < STRIPS; ++s) met[s] = fused(factor, load(carried[j] + s * LANES), met[s]);
        }
        for (int s = 0; s < STRIPS; ++s) store(carried[i] + s * LANES, round(places[s], met[s]));
    }
}

// Of lanes that are not there 1, which divides.
Floats scale_of(const Block& block, const Place& place) {
    return select(place.lanes, place.load(block.scales + block.in_group(place.column, place.output)), 1.0f);
}

// The step nearest to a wish, ties to even.
Floats nearest_step(const Block& block, const Place& place, Floats wish) {
    const size_t own = block.in_group(place.column, place.output);
    return smaller(larger(nearest(wish), place.load(block.low + own)), place.load(block.high + own));
}

// Texts that march in step: a head's queries [groups, size] of each over its own keys and values [room, size].
struct Rows {
    int texts, heads, groups, size, room;
    int first, last;  // positions that are seen
    float scale, cap;
};

constexpr int HEADS_AT_ONCE = 8;

template <typename X>
void attend_rows(const X* queries, const X* states, X* to, const Rows& rows, int threads) {
    const size_t head_numbers = size_t(rows.room) * rows.size;
    const int heads = rows.texts * rows.heads, numbers = rows.groups * rows.size;
    for_each(threads, (heads + HEADS_AT_ONCE - 1) / HEADS_AT_ONCE, 1, [&](int64_t part) {
        Buffer<X> scaled(numbers);
        Buffer<float> mixed(numbers), room(size_t(ROOM) * rows.size);
        std::vector<Query<X>> own;
        for (int head = int(part) * HEADS_AT_ONCE; head < std::min(int(part + 1) * HEADS_AT_ONCE, heads); ++head) {
            const size_t begin = size_t(head) * numbers;
            for (int i = 0; i < numbers; i += LANES) store(scaled.data() + i, load(queries + begin + i) * rows.scale);
            own.clear();
            for (int i = 0; i < numbers; i += rows.size)
                own.push_back({scaled.data() + i, rows.last, rows.first, mixed.data() + i});
            const X *keys = states + head * head_numbers, *values = keys + heads * head_numbers;
            attend<X>(own, Range(0, rows.last + 1), keys, values, rows.size, rows.cap, room.data(), nullptr);
            for (const auto& query : own) divide_by_shares(query, rows.size);
            for (int i = 0; i < numbers; i += LANES) store(to + begin + i, load(mixed.data() + i));
        }
    });
}

}  // namespace

extern "C" {

// Scales and zeros [count] of groups [count, size]: of ranges shrunk in so many steps, those with the least Σ |error|^exponent.
void quasar_search_grids(const float* weight, float* scales, float* zeros, int64_t count, int size, int bits, int sym,
                         int steps, float smallest, float exponent, int threads) {
    const Logarithm logarithm;
    for_each(threads, count, 16, [&](int64_t row) {
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
    });
}

// Round a block's columns of weights; `kernel` [columns, columns] spreads an error over those visited later. Writes steps
// and errors, which lie as the weights do.
void quasar_round_columns(const float* weight, const float* kernel, const float* scales, const float* low,
                          const float* high, const int32_t* groups, float* steps, float* errors, int columns,
                          int outputs, int stride, int threads) {
    const Block block{columns, outputs, stride, groups, scales, low, high};
    for_each(threads, (outputs + WIDE - 1) / WIDE, 1, [&](int64_t wide) {
        visit(weight, block, kernel, int(wide) * WIDE, [&](const Place& place, Floats met) {
            const size_t at = block.at(place.column, place.output);
            const Floats scale = scale_of(block, place);
            const Floats step = nearest_step(block, place, met / scale);
            const Floats error = fused(Floats(0.0f) - step, scale, met);
            store(steps + at, step, place.lanes);
            store(errors + at, error, place.lanes);
            return error;
        });
    });
}

// Move a block's columns to their best steps: `kernel` is −H, `curvature` its diagonal with ∞ for 0. Overwrites steps,
// writes moves (which lie as the gradient does), and adds each output's change of its loss to `gains`.
void quasar_descend_columns(const float* gradient, const float* kernel, const float* curvature, const float* scales,
                            const float* low, const float* high, const int32_t* groups, float* steps, float* moves,
                            float* gains, int columns, int outputs, int stride, int threads) {
    const Block block{columns, outputs, stride, groups, scales, low, high};
    for_each(threads, (outputs + WIDE - 1) / WIDE, 1, [&](int64_t wide) {
        visit(gradient, block, kernel, int(wide) * WIDE, [&](const Place& place, Floats met) {
            const size_t at = block.at(place.column, place.output);
            const Floats scale = scale_of(block, place);
            const float bend = curvature[place.column];
            const Floats old = place.load(steps + at), step = nearest_step(block, place, old - met / (scale * bend));
            const Floats move = (step - old) * scale, slope = fused(0.5f * bend, move, met);
            float* gain = gains + place.output;
            const Floats before = place.load(gain);
            const Lanes moved = is_less(step, old) | is_less(old, step);  // else ∞ · 0 where the curvature is 0
            store(gain, select(moved, fused(slope, move, before), before), place.lanes);
            store(steps + at, step, place.lanes);
            store(moves + at, move, place.lanes);
            return move;
        });
    });
}

// Whether the processor multiplies bfloat16 in pairs.
int quasar_multiplies_pairs() { return Terms<uint16_t>::TOKENS == 2; }

// Adds Σ a_t b_tᵀ to sums [rows, columns], of a [tokens, rows] and b [tokens, columns] in bfloat16.
void quasar_add_token_sums(const uint16_t* a, const uint16_t* b, float* sums, int64_t tokens, int rows, int columns,
                           int lower, int threads) {
    add_token_sums<uint16_t>({a, rows, rows}, {b, columns, columns}, sums, columns, tokens, lower, threads);
}

// The same of matrices in float32, whose rows are so far apart: aᵀ b, added to sums.
void quasar_add_product(const float* a, int64_t a_stride, const float* b, int64_t b_stride, float* sums, int64_t stride,
                        int64_t depth, int rows, int columns, int threads) {
    add_token_sums<float>({a, a_stride, rows}, {b, b_stride, columns}, sums, stride, depth, false, threads);
}

// Compares rows of logits [count, size]: COMPARED numbers of each.
void quasar_compare_logits(const float* p, const float* q, const int64_t* tokens, float* found, int64_t count, int size,
                           int threads) {
    for_each(threads, count, 1, [&](int64_t row) {
        compare_rows({p + row * size, size}, {q + row * size, size}, tokens[row], found + row * COMPARED);
    });
}

// The `width` likeliest tokens of rows of logits [count, size], and their chances.
void quasar_likeliest(const float* logits, int64_t* tokens, float* chances, int64_t count, int size, int width,
                      int threads) {
    for_each(threads, count, 1, [&](int64_t row) {
        likeliest({logits + row * size, size}, width, tokens + row * width, chances + row * width);
    });
}

// A token of each row of logits [count, size], where the running sum of its softmax passes its own chance in [0, 1).
void quasar_draw(const float* logits, const double* chances, int64_t* tokens, int64_t count, int size, int threads) {
    for_each(threads, count, 1, [&](int64_t row) {
        std::vector<double> sums((size + SUMMED - 1) / SUMMED);
        tokens[row] = draw({logits + row * size, size}, chances[row], sums);
    });
}

// Queries [texts, heads, groups, size] over keys and values [2, texts, heads, room, size], from `first` to `last`, scores below
// a soft cap where it is not 0; in bfloat16 or float32.
void quasar_attend_rows(const void* queries, const void* states, void* to, int halves, int texts, int heads, int groups,
                        int size, int room, int first, int last, float scale, float cap, int threads) {
    const Rows rows{texts, heads, groups, size, room, first, last, scale, cap};
    if (halves)
        attend_rows(static_cast<const uint16_t*>(queries), static_cast<const uint16_t*>(states), static_cast<uint16_t*>(to),
                    rows, threads);
    else
        attend_rows(static_cast<const float*>(queries), static_cast<const float*>(states), static_cast<float*>(to), rows,
                    threads);
}
}
