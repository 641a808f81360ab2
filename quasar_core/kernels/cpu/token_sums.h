// Sums of outer products of two rows over many tokens, as a layer's Hessian has them, and any product Aᵀ B; added in float32.
//
// Tokens are taken a block at a time, each factor copied so that what a tile reads lies in order: of a panel's columns, two
// tokens side by side where numbers are bfloat16 and the processor multiplies pairs, else one in float32. A tile of both
// factors has its sums in registers for a whole block. No result depends on the number of threads.

#pragma once

#include <vector>

#include "lanes.h"
#include "team.h"

namespace quasar {

template <typename X>
struct Terms {  // of one token, as a float32's bits
    static constexpr int TOKENS = 1;
    static uint32_t of(uint16_t first, uint16_t) { return uint32_t(first) << 16; }
    static uint32_t of(float first, float) {
        uint32_t bits;
        std::memcpy(&bits, &first, sizeof bits);
        return bits;
    }
    static uint32_t of(const X* x, bool, int) { return of(x[0], X()); }
    static Part add(Part sum, uint32_t a, const uint32_t* b) {
        float value;
        std::memcpy(&value, &a, sizeof value);
        return fused(spread(value), load_part(reinterpret_cast<const float*>(b)), sum);
    }
};

#if defined(QUASAR_PAIRS)
template <>
struct Terms<uint16_t> {  // of two tokens
    static constexpr int TOKENS = 2;
    static uint32_t of(uint16_t first, uint16_t second) { return first | uint32_t(second) << 16; }
    static uint32_t of(const uint16_t* x, bool second, int width) { return of(x[0], second ? x[width] : 0); }
    static Part add(Part sum, uint32_t a, const uint32_t* b) {
        return add_pairs(sum, (Pairs)spread_int(int32_t(a)), (Pairs)load_part(reinterpret_cast<const float*>(b)));
    }
};
#endif

// Rows of numbers: where the first lies, how far each is from the next, and their width.
template <typename X>
struct Matrix {
    const X* first;
    int64_t stride;
    int width;
    const X* row(int64_t i) const { return first + i * stride; }
};

// A factor's columns of some tokens, in panels of so many; columns that are not there are 0.
template <typename X, int PANEL>
class Panels {
public:
    Panels(int width, int64_t most_tokens) : width(width), room(size_t(count()) * steps_of(most_tokens) * PANEL) {}
    int count() const { return (width + PANEL - 1) / PANEL; }
    const uint32_t* panel(int index, int64_t tokens) const { return room.data() + index * steps_of(tokens) * PANEL; }

    void fill(int index, const Matrix<X>& rows, int64_t begin, int64_t tokens) {
        uint32_t* to = room.data() + index * steps_of(tokens) * PANEL;
        const int first = index * PANEL, some = std::min(PANEL, width - first);
        static constexpr X none[PANEL] = {};
        for (int64_t token = 0; token < tokens; token += Terms<X>::TOKENS, to += PANEL) {
            const X* one = rows.row(begin + token) + first;
            const X* two = token + 1 < tokens ? one + rows.stride : none;
            if (some == PANEL) {  // a count that compilers know fills whole registers
                for (int i = 0; i < PANEL; ++i) to[i] = Terms<X>::of(one[i], two[i]);
                continue;
            }
            for (int i = 0; i < some; ++i) to[i] = Terms<X>::of(one[i], two[i]);
            for (int i = some; i < PANEL; ++i) to[i] = 0;
        }
    }
    static int64_t steps_of(int64_t tokens) { return (tokens + Terms<X>::TOKENS - 1) / Terms<X>::TOKENS; }

private:
    int width;
    std::vector<uint32_t> room;
};

constexpr int TILE_ROWS = 8, TILE_PARTS = WIDTH == LANES ? 3 : 2, TILE_COLUMNS = TILE_PARTS * WIDTH;
constexpr int BLOCK_TOKENS = 512;

// Sums of a tile, TILE_ROWS times PARTS registers, over so many steps.
template <typename X, int PARTS>
struct Tile {
    Part sums[TILE_ROWS][PARTS] = {};
    Tile(const uint32_t* a, const uint32_t* b, int64_t steps) {
        for (int64_t step = 0; step < steps; ++step, a += TILE_ROWS, b += PARTS * WIDTH)
            for (int i = 0; i < TILE_ROWS; ++i)
                for (int p = 0; p < PARTS; ++p) sums[i][p] = Terms<X>::add(sums[i][p], a[i], b + p * WIDTH);
    }
    void put(float* to, int stride) const {
        for (int i = 0; i < TILE_ROWS; ++i)
            for (int p = 0; p < PARTS; ++p) store_part(to + ptrdiff_t(i) * stride + p * WIDTH, sums[i][p]);
    }
    void add_to(float* to, int stride, int rows, int columns) const {  // those that are there
        for (int i = 0; i < rows; ++i)
            for (int p = 0; p < PARTS; ++p) {
                const int left = columns - p * WIDTH;
                const unsigned there = left <= 0 ? 0 : left < WIDTH ? (1u << left) - 1 : (1u << WIDTH) - 1;
                float* at = to + ptrdiff_t(i) * stride + p * WIDTH;
                if (there) store_part(at, load_part(at, there) + sums[i][p], there);
            }
    }
};

// Adds Σ a_t b_tᵀ to sums, whose rows are `stride` apart. With `lower`, tiles that lie wholly above the diagonal are left out.
template <typename X>
void add_token_sums(const Matrix<X>& a, const Matrix<X>& b, float* sums, int64_t stride, int64_t tokens, bool lower, int threads) {
    const int64_t most = std::min<int64_t>(tokens, BLOCK_TOKENS);
    Panels<X, TILE_ROWS> left(a.width, most);
    Panels<X, TILE_COLUMNS> right(b.width, most);
    for (int64_t begin = 0; begin < tokens; begin += BLOCK_TOKENS) {
        const int64_t count = std::min<int64_t>(tokens - begin, BLOCK_TOKENS), steps = left.steps_of(count);
        for_each(threads, left.count() + right.count(), 4, [&](int64_t panel) {
            if (panel < left.count()) left.fill(int(panel), a, begin, count);
            else right.fill(int(panel) - left.count(), b, begin, count);
        });
        for_each(threads, right.count(), 1, [&](int64_t panel) {
            const int column = int(panel) * TILE_COLUMNS;
            for (int tile = lower ? column / TILE_ROWS : 0; tile < left.count(); ++tile) {
                const int row = tile * TILE_ROWS;
                Tile<X, TILE_PARTS>(left.panel(tile, count), right.panel(int(panel), count), steps)
                    .add_to(sums + row * stride + column, int(stride), std::min(TILE_ROWS, a.width - row), b.width - column);
            }
        });
    }
}

}  // namespace quasar
