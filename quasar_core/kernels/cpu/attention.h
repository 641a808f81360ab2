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
    int sinks = 0;                     // the text's first positions, at most sixteen, are seen beside them
    float largest = LEAST, total = 0;  // of the scores so far
};

// Of each token of a tree at `position`, from the first one to itself: where states lie. None without a tree.
inline std::vector<std::vector<int>> trace_paths(const int* parents, int count, int position) {
    std::vector<std::vector<int>> paths;
    for (int t = 0; parents && t < count; ++t) {
        paths.push_back(parents[t] < 0 ? std::vector<int>() : paths[parents[t]]);
        paths.back().push_back(position + t);
    }
    return paths;
}

// The products of a query with sixteen keys; those from `left` on repeat the last.
template <typename X>
Floats scores_of(const X* q, const X* keys, int left, int size) {
    using Kind = Numbers<X>;
    const X* rows[LANES];
    for (int p = 0; p < LANES; ++p) rows[p] = keys + size_t(std::min(p, left - 1)) * size;
    Part sums[LANES];
    for (int first = 0; first < LANES; first += WIDTH) {
        Part some[WIDTH];
        for (auto& sum : some) sum = spread(0);
        int d = 0;
        for (; d + Kind::STEP <= size; d += Kind::STEP) {
            const auto part = Kind::get(q + d);
#pragma GCC unroll 16
            for (int p = 0; p < WIDTH; ++p) some[p] = Kind::add(some[p], part, Kind::get(rows[first + p] + d));
        }
        if constexpr (Kind::STEP > LANES)
            if (d < size)
                for (int p = 0; p < WIDTH; ++p)
                    some[p] = Kind::add(some[p], Kind::get(q + d, true), Kind::get(rows[first + p] + d, true));
        for (int p = 0; p < WIDTH; ++p) sums[first + p] = some[p];
    }
    return sum_lanes(sums);
}

// out · fade + sixteen values, each times its share, in COUNT registers of channels.
template <typename X, int COUNT>
void weigh(const float* shares, const float* values, int size, float fade, float* out) {
    using Kind = Numbers<X>;
    Part sums[COUNT];
    for (int c = 0; c < COUNT; ++c) sums[c] = load_part(out + c * WIDTH) * spread(fade);
    for (int step = 0; step < Kind::STEPS; ++step) {
        float share;
        std::memcpy(&share, shares + step, sizeof share);
#pragma GCC unroll 8
        for (int c = 0; c < COUNT; ++c)
            sums[c] = Kind::weigh(sums[c], spread(share), values + step * size + c * WIDTH);
    }
    for (int c = 0; c < COUNT; ++c) store_part(out + c * WIDTH, sums[c]);
}

template <typename X>
void weigh_all(const float* shares, const float* values, int size, float fade, float* out) {
    int d = 0;
    for (; d + CHANNELS * WIDTH <= size; d += CHANNELS * WIDTH)
        weigh<X, CHANNELS>(shares, values + d, size, fade, out + d);
    if (size - d >= 4 * WIDTH) weigh<X, 4>(shares, values + d, size, fade, out + d), d += 4 * WIDTH;
    for (; d < size; d += WIDTH) weigh<X, 1>(shares, values + d, size, fade, out + d);
}

// The positions from `start` to `start` + 16, of which `left` are written; values as `spread` left them.
template <typename X>
void attend_to(Query<X>& query, const X* keys, const float* values, int start, int left, int size, float cap) {
    const int below = std::max(query.first - start, 0), above = std::min(query.last - start + 1, LANES);
    const int sinks = std::min(query.sinks - start, above);
    if (below >= above && sinks <= 0) return;
    const Lanes seen = first_lanes(above) & (~first_lanes(below) | first_lanes(sinks));
    Floats scores = scores_of(query.q, keys, left, size);
    if (cap) scores = capped(scores, cap);
    const float largest = std::max(query.largest, largest_of(select(seen, scores, LEAST)));
    const Floats shares = select(seen, exponential(scores - largest), 0.0f);
    const float fade = largest == query.largest ? 1.0f : std::exp(query.largest - largest);
    query.total = query.total * fade + sum_of(shares);
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
    for (size_t byte = 0; byte < LANES * size * sizeof(X); byte += 64) __builtin_prefetch(from + byte);
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
    const int begin = first / LANES * LANES;
    for (int start = queries.front().sinks ? 0 : begin; start <= last; start = std::max(start + LANES, begin)) {
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
            store(query.out + d, load(query.out + d) / query.total);
}

}  // namespace quasar
