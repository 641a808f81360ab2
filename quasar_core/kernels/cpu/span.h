// What attention reads: the queries of one key-value head, and spans of its keys and values.
//
// Positions come in spans of four sixteens that begin at multiples of SPAN. A span's keys and values are laid out once for
// all queries.

#pragma once

#include <limits>
#include <vector>

#include "elementwise.h"
#include "numbers.h"
#include "team.h"

namespace quasar {

constexpr int SIXTEENS = 4, SPAN = SIXTEENS * LANES;

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

// A span's keys [words, SPAN] and values [SIXTEENS, STEPS, D], and the words of a tile's queries, as many rows.
template <typename X>
class Span {
    using Kind = Numbers<X>;

public:
    const int size, words;
    float *const keys, *const values, *const queries;

    Span(int size, float* room)
        : size(size), words(size / Kind::TOGETHER), keys(room), values(keys + SPAN * size), queries(values + SPAN * size) {}

    float* values_of(int sixteen) const { return values + sixteen * Kind::STEPS * size; }

    // Lays out one of its sixteens, of whose keys and values the first `left` are written.
    void fill(int sixteen, const X* own_keys, const X* own_values, int left) const {
        constexpr int ROWS = Kind::PACKED / Kind::TOGETHER;  // of words, which a column is unpacked to
        const int columns = size / Kind::PACKED;
        for (int column = 0; column < columns; column += WIDTH)
            for (int p = 0; p < LANES; p += WIDTH) {
                Part rows[WIDTH];
                for (int i = 0; i < WIDTH; ++i)
                    rows[i] = Kind::packed(own_keys + size_t(std::min(p + i, left - 1)) * size, column, columns - column);
                transpose(rows);
                float* to = keys + size_t(column) * ROWS * SPAN + sixteen * LANES + p;
                for (int i = 0; i < std::min(WIDTH, columns - column); ++i) Kind::unpack(rows[i], to + i * ROWS * SPAN, SPAN);
            }
        Kind::spread(own_values, left, size, values_of(sixteen));
    }
};

// The positions of the sixteen from `start` on that a query sees.
template <typename X>
Lanes seen_by(const Query<X>& query, int start) {
    const Lanes below = first_lanes(query.first - start), sinks = first_lanes(query.sinks - start);
    return Lanes(first_lanes(query.last + 1 - start) & (~below | sinks));
}

// Turns a query's scores into shares [SPAN] of the softmax so far; gives the factor by which its earlier sums fade.
template <typename X>
float to_shares(Query<X>& query, Floats* scores, int start, float cap, float* shares) {
    Floats most = LEAST, total = 0.0f;
    Lanes seen[SIXTEENS];
    for (int i = 0; i < SIXTEENS; ++i) {
        seen[i] = seen_by(query, start + i * LANES);
        if (seen[i] && cap) scores[i] = capped(scores[i], cap);
        if (seen[i]) most = larger(most, scores[i] = select(seen[i], scores[i], LEAST));
    }
    const float before = query.largest;
    query.largest = std::max(before, largest_of(most));
    const float fade = query.largest == before ? 1.0f : std::exp(before - query.largest);
    for (int i = 0; i < SIXTEENS; ++i) {
        const Floats own = seen[i] ? select(seen[i], exponential(scores[i] - query.largest), 0.0f) : Floats(0.0f);
        total = total + own;
        Numbers<X>::pack(own, shares + i * LANES);
    }
    query.total = query.total * fade + sum_of(total);
    return fade;
}

}  // namespace quasar
