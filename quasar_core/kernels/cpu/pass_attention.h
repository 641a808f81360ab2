// Attention of all heads of a layer, whose work is split among a team.
//
// Positions are cut into chunks whose places depend on nothing but the positions: a query's sums over each chunk are made by
// themselves, and joined in the chunks' order. So its result depends neither on the queries beside it nor on the threads, and
// the chunks of a head may fall to several of them (as in flash decoding: Dao and others, 2023).

#pragma once

#include <vector>

#include "attention.h"

namespace quasar {

constexpr int CHUNK = 8 * SPAN;                // positions of the first chunks
constexpr size_t MOST_SUMS = size_t(1) << 20;  // numbers that wait to be joined: beyond, each thread joins its own

// Later chunks have up to an eighth of the positions before them, so that there are few.
inline int size_of_chunk(int position) {
    int size = CHUNK;
    while (2 * 8 * size <= position) size *= 2;
    return size;
}

// The chunks, one behind the other, that hold the text's first positions where `sinks` are seen, and those from `first` on.
inline std::vector<Range> cut_positions(int sinks, int first, int last) {
    std::vector<Range> chunks;
    auto add = [&](int position) {
        const int size = size_of_chunk(position), begin = position / size * size;
        chunks.push_back({begin, begin + size});
    };
    if (sinks && first >= CHUNK) add(0);
    for (int position = first; position <= last; position = chunks.back().end) add(position);
    return chunks;
}

// What attention reads: queries [T, heads, D], keys and values [kv_heads, capacity, D]; and where it goes, out [T, heads, D].
template <typename X>
struct PassHeads {
    int heads, kv_heads, size, count, position, capacity, window, sinks;
    float cap;
    const std::vector<std::vector<int>>& paths;  // of each token of a tree
    const X *queries, *keys, *values;
    float* out;
    int group() const { return heads / kv_heads; }
    int rows() const { return count * group(); }  // queries of a key-value head
};

template <typename X>
class Attending {
public:
    // For `rows` queries of at most `size` channels in a pass whose positions end at `end`.
    void reserve(int rows, int size, int end, int threads) {
        const size_t waiting = cut_positions(0, 0, end - 1).size() * rows;
        grow(parts, std::min(waiting * size, MOST_SUMS));
        if (states.size() < waiting) states.resize(waiting);
        if (own.size() < size_t(threads)) own.resize(threads), rooms.resize(threads), sums.resize(threads);
        for (auto& room : rooms) grow(room, ROOM * size);
        for (auto& path : own) grow(path, 2 * LANES * size);
    }

    // Of one layer after the other, with the whole team; it ends with a barrier.
    void run(const PassHeads<X>& of, const Team& team) {
        const int first = of.window ? std::max(0, of.position - of.window + 1) : 0;
        const auto chunks = cut_positions(of.sinks, first, of.position + of.count - 1);
        const size_t waiting = chunks.size() * of.count * of.heads;
        if (chunks.size() == 1 || of.kv_heads % team.threads == 0 || waiting * of.size > MOST_SUMS)
            return attend_whole(of, chunks, team);
        attend_chunks(of, chunks, team);
        team.barrier();
        join_chunks(of, int(chunks.size()), team);
        team.barrier();
    }

private:
    struct State {
        float largest, total;
    };
    Buffer<float> parts;        // [kv_heads, chunks, rows, D]
    std::vector<State> states;  // [kv_heads, chunks, rows]
    std::vector<Buffer<float>> rooms, sums;  // of each thread
    std::vector<Buffer<X>> own;

    // Every head's chunks in turn, for a thread's share of the rows of all heads: a head may fall to several.
    void attend_whole(const PassHeads<X>& of, const std::vector<Range>& chunks, const Team& team) {
        const Range share = team.share(of.kv_heads * of.rows());
        for (int row = share.begin, end; row < share.end; row = end) {
            const int head = row / of.rows(), first = head * of.rows();
            end = std::min(share.end, first + of.rows());
            auto queries = queries_of(of, head, Range(row - first, end - first));
            auto whole = queries;
            attend_to_chunk(of, head, chunks.front(), whole, team);
            Buffer<float>& room = sums[team.thread];
            if (chunks.size() > 1) grow(room, queries.size() * of.size);
            for (size_t i = 0; chunks.size() > 1 && i < queries.size(); ++i) queries[i].out = room.data() + i * of.size;
            for (size_t c = 1; c < chunks.size(); ++c) {
                attend_to_chunk(of, head, chunks[c], queries, team);
                for (size_t i = 0; i < queries.size(); ++i) join(whole[i], queries[i], of.size);
            }
            for (const auto& query : whole) divide_by_shares(query, of.size);
        }
        team.barrier();
    }

    // A thread's share of the chunks of all heads, as many positions as another's.
    void attend_chunks(const PassHeads<X>& of, const std::vector<Range>& chunks, const Team& team) {
        const int count = int(chunks.size()), rows = of.rows();
        const Range share = share_of_chunks(of, chunks, team);
        for (int at = share.begin; at < share.end; ++at) {
            auto queries = queries_of(of, at / count, Range(0, rows));
            for (int row = 0; row < rows; ++row) queries[row].out = parts.data() + (size_t(at) * rows + row) * of.size;
            attend_to_chunk(of, at / count, chunks[at % count], queries, team);
            for (int row = 0; row < rows; ++row)
                states[size_t(at) * rows + row] = {queries[row].largest, queries[row].total};
        }
    }

    Range share_of_chunks(const PassHeads<X>& of, const std::vector<Range>& chunks, const Team& team) const {
        const int end = of.position + of.count, count = int(chunks.size());
        std::vector<int> before(1, 0);  // positions in front of each chunk
        for (const Range& chunk : chunks) before.push_back(before.back() + std::min(chunk.end, end) - chunk.begin);
        auto cut = [&](int place) {
            const int head = place / before.back(), within = place % before.back();
            int chunk = 0;
            while (chunk < count && (before[chunk] + before[chunk + 1]) / 2 < within) ++chunk;
            return head * count + chunk;
        };
        const Range places = team.share(of.kv_heads * before.back());
        return {cut(places.begin), cut(places.end)};
    }

    void join_chunks(const PassHeads<X>& of, int chunks, const Team& team) {
        const int rows = of.rows();
        const Range share = team.share(of.kv_heads * rows);
        for (int at = share.begin; at < share.end; ++at) {
            const int head = at / rows, row = at % rows;
            Query<X> whole = queries_of(of, head, Range(row, row + 1)).front();
            for (int c = 0; c < chunks; ++c) {
                const size_t from = (size_t(head) * chunks + c) * rows + row;
                Query<X> part = whole;
                part.out = parts.data() + from * of.size;
                part.largest = states[from].largest, part.total = states[from].total;
                if (c == 0)
                    std::copy(part.out, part.out + of.size, whole.out), whole.largest = part.largest, whole.total = part.total;
                else
                    join(whole, part, of.size);
            }
            divide_by_shares(whole, of.size);
        }
    }

    // The queries of a key-value head, which share its keys and values.
    std::vector<Query<X>> queries_of(const PassHeads<X>& of, int head, Range rows) const {
        std::vector<Query<X>> some;
        const int group = of.group();
        for (int row = rows.begin; row < rows.end; ++row) {
            const int t = row / group, depth = of.paths.empty() ? t : int(of.paths[t].size()) - 1;
            const int last = of.position + depth, first = of.window ? std::max(0, last - of.window + 1) : 0;
            const size_t from = (size_t(t) * of.heads + head * group + row % group) * of.size;
            some.push_back({of.queries + from, last, first, of.out + from});
            some.back().sinks = of.sinks;
            if (!of.paths.empty()) some.back().branch = of.position, some.back().path = of.paths[t].data();
        }
        return some;
    }

    void attend_to_chunk(const PassHeads<X>& of, int head, Range chunk, std::vector<Query<X>>& queries, const Team& team) {
        const size_t begin = size_t(head) * of.capacity * of.size;
        attend(queries, chunk, of.keys + begin, of.values + begin, of.size, of.cap, rooms[team.thread].data(),
               own[team.thread].data());
    }

    // Adds the sums over a later chunk; one that a query does not see changes nothing.
    static void join(Query<X>& whole, const Query<X>& part, int size) {
        if (part.largest == LEAST) return;
        const float largest = std::max(whole.largest, part.largest);
        const float fade = std::exp(whole.largest - largest), factor = std::exp(part.largest - largest);
        for (int d = 0; d < size; d += LANES)
            store(whole.out + d, fused(load(part.out + d), factor, load(whole.out + d) * fade));
        whole.total = whole.total * fade + part.total * factor, whole.largest = largest;
    }
};

}  // namespace quasar
