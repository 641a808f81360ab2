// Grouped-query attention of a pass over its cache: one key-value head at a time, a few queries, all positions seen.
//
// Positions come in sixteens that begin at multiples of 16, and are summed in that order with a running maximum
// (Milakov and Gimelshein, 2018), so that a query's result depends on nothing but its own position.

#pragma once

#include <limits>
#include <vector>

#include "elementwise.h"
#include "numbers.h"

namespace quasar {

constexpr int CHANNELS = 8;  // registers of a value's channels that are summed side by side

template <typename X>
struct Query {
    const X* q;       // [D], scaled
    int last, first;  // positions that it sees, both ends included
    float* out;       // [D]
    int branch = std::numeric_limits<int>::max();  // from this position on its own path through a tree is seen:
    const int* path = nullptr;                     // where the states of each of these positions lie
    float largest = -std::numeric_limits<float>::infinity(), total = 0;  // of the scores so far
};

// The products of a query with sixteen keys; those from `left` on repeat the last.
template <typename X>
__m512 scores_of(const X* q, const X* keys, int left, int size) {
    using Kind = Numbers<X>;
    const X* rows[LANES];
    for (int p = 0; p < LANES; ++p) rows[p] = keys + size_t(std::min(p, left - 1)) * size;
    __m512 sums[LANES];
    for (auto& sum : sums) sum = _mm512_setzero_ps();
    int d = 0;
    for (; d + Kind::WIDTH <= size; d += Kind::WIDTH) {
        auto part = Kind::get(q + d);
#pragma GCC unroll 16
        for (int p = 0; p < LANES; ++p) sums[p] = Kind::add(sums[p], part, Kind::get(rows[p] + d));
    }
    if (d < size)
        for (int p = 0; p < LANES; ++p)
            sums[p] = Kind::add(sums[p], Kind::get(q + d, size - d), Kind::get(rows[p] + d, size - d));
    return sum_lanes(sums);
}

// out · fade + sixteen values, each times its share, in COUNT registers of channels.
template <typename X, int COUNT>
void weigh(const float* shares, const float* values, int size, float fade, float* out) {
    using Kind = Numbers<X>;
    __m512 sums[COUNT];
    for (int c = 0; c < COUNT; ++c) sums[c] = _mm512_mul_ps(load(out + c * LANES), _mm512_set1_ps(fade));
    for (int step = 0; step < Kind::STEPS; ++step) {
        auto share = Kind::share(shares, step);
#pragma GCC unroll 8
        for (int c = 0; c < COUNT; ++c)
            sums[c] = Kind::add(sums[c], share, Kind::spread_part(values + step * size + c * LANES));
    }
    for (int c = 0; c < COUNT; ++c) store(out + c * LANES, sums[c]);
}

template <typename X>
void weigh_all(const float* shares, const float* values, int size, float fade, float* out) {
    int d = 0;
    for (; d + CHANNELS * LANES <= size; d += CHANNELS * LANES)
        weigh<X, CHANNELS>(shares, values + d, size, fade, out + d);
    if (size - d >= 4 * LANES) weigh<X, 4>(shares, values + d, size, fade, out + d), d += 4 * LANES;
    for (; d < size; d += LANES) weigh<X, 1>(shares, values + d, size, fade, out + d);
}

// The positions from `start` to `start` + 16, of which `left` are written; values as `spread` left them.
template <typename X>
void attend_to(Query<X>& query, const X* keys, const float* values, int start, int left, int size, float cap) {
    const int below = std::max(query.first - start, 0), above = std::min(query.last - start + 1, LANES);
    if (below >= above) return;
    const __mmask16 seen = first_lanes(above) & ~first_lanes(below);
    __m512 scores = scores_of(query.q, keys, left, size);
    if (cap) scores = capped(scores, cap);
    const float largest = std::max(query.largest, _mm512_mask_reduce_max_ps(seen, scores));
    __m512 shares = _mm512_maskz_mov_ps(seen, exponential(_mm512_sub_ps(scores, _mm512_set1_ps(largest))));
    const float fade = largest == query.largest ? 1.0f : std::exp(query.largest - largest);
    query.total = query.total * fade + _mm512_reduce_add_ps(shares);
    query.largest = largest;
    alignas(64) float packed[LANES];
    Numbers<X>::pack(shares, packed);
    weigh_all<X>(packed, values, size, fade, query.out);
}

// Sixteen positions of which some stand on a query's own path: keys and values are copied in the order of positions, so
// that the sums are those of a pass over that path alone. `own` has place for 2 · 16 · D numbers of the cache.
template <typename X>
void attend_along(Query<X>& query, const X* keys, const X* values, int start, int size, float cap, X* own, float* room) {
    const int left = std::min(query.last + 1 - start, LANES);
    if (left <= 0) return;
    for (int p = 0; p < left; ++p) {
        const int position = start + p;
        const size_t from = size_t(position < query.branch ? position : query.path[position - query.branch]) * size;
        std::memcpy(own + p * size, keys + from, size * sizeof(X));
        std::memcpy(own + (LANES + p) * size, values + from, size * sizeof(X));
    }
    Numbers<X>::spread(own + LANES * size, left, size, room);
    attend_to(query, own, room, start, left, size, cap);
}

// Sets out for the sixteen positions from `states` on, which later reads will find near.
template <typename X>
void fetch(const X* states, int size) {
    auto from = reinterpret_cast<const char*>(states);
    for (size_t byte = 0; byte < LANES * size * sizeof(X); byte += 64) _mm_prefetch(from + byte, _MM_HINT_T0);
}

// Some queries over the keys and values [positions, D] of one head, scores below a soft cap where it is not 0; `room` has
// place for 16 · D numbers, `own` for twice as many of the cache where queries stand in a tree.
template <typename X>
void attend(std::vector<Query<X>>& queries, const X* keys, const X* values, int size, float cap, float* room, X* own) {
    int first = std::numeric_limits<int>::max(), last = 0;
    for (const auto& query : queries) {
        first = std::min(first, query.first), last = std::max(last, query.last);
        std::fill(query.out, query.out + size, 0.0f);
    }
    for (int start = first / LANES * LANES; start <= last; start += LANES) {
        if (start + LANES > queries.front().branch) {  // the same for all queries of a pass
            for (auto& query : queries) attend_along(query, keys, values, start, size, cap, own, room);
            continue;
        }
        const int left = std::min(last + 1 - start, LANES);
        fetch(keys + size_t(start + LANES) * size, size);
        fetch(values + size_t(start + LANES) * size, size);
        Numbers<X>::spread(values + size_t(start) * size, left, size, room);
        for (auto& query : queries) attend_to(query, keys + size_t(start) * size, room, start, left, size, cap);
    }
    for (const auto& query : queries)
        for (int d = 0; d < size; d += LANES)
            store(query.out + d, _mm512_div_ps(load(query.out + d), _mm512_set1_ps(query.total)));
}

}  // namespace quasar
