// The likeliest tokens of a row of logits, of equal ones the first, found while the logits come.

#pragma once

#include <cmath>

#include "numbers.h"

namespace quasar {

constexpr int MOST_LIKELIEST = 8;

struct Choice {
    int64_t token;  // -1 where a logit is not a number, or the best of them is infinite
    float margin;   // of the best logit over the next
};

// The `wanted` greatest logits that a thread has seen of one row, in falling order, with their tokens. Nearly every
// register of logits lies below the last of them, which is one comparison.
class Leaders {
public:
    explicit Leaders(int wanted = 2) : wanted(wanted) {
        std::fill(logits, logits + MOST_LIKELIEST, LEAST);
        std::fill(tokens, tokens + MOST_LIKELIEST, -1);
    }

    // Logits [at, at + 16), of which `lanes` exist; they come in rising order.
    void see(int at, Lanes lanes, Floats x) {
        odd |= lanes & is_nan(x);
        const Lanes above = lanes & is_less(logits[wanted - 1], x);
        if (above) take(at, above, x);
    }

    // Take in what another thread has seen of the row.
    void merge(const Leaders& other) {
        odd |= other.odd;
        for (int i = 0; i < wanted && other.tokens[i] >= 0; ++i) insert(other.logits[i], other.tokens[i]);
    }

    // `names` are the tokens of what was seen, or null where it was seen by their numbers.
    Choice choose(const int32_t* names) const {
        const bool is_number = !odd && !std::isinf(logits[0]);
        return {is_number ? named(tokens[0], names) : -1, logits[0] - logits[1]};
    }

    // The first `count` tokens; -1 for each of a row that has no choice, and where no more logits are above −∞.
    void list(int count, int32_t* to, const int32_t* names) const {
        const bool has_choice = choose(names).token >= 0;
        for (int i = 0; i < count; ++i) to[i] = has_choice ? named(tokens[i], names) : -1;
    }

private:
    float logits[MOST_LIKELIEST];
    int32_t tokens[MOST_LIKELIEST];
    int wanted;
    Lanes odd = 0;

    static int32_t named(int32_t seen, const int32_t* names) { return names && seen >= 0 ? names[seen] : seen; }

    __attribute__((noinline)) void take(int at, Lanes above, Floats x) {
        alignas(64) float values[LANES];
        store(values, x);
        for (unsigned left = above; left; left &= left - 1) {
            const int lane = __builtin_ctz(left);
            insert(values[lane], at + lane);
        }
    }

    // Behind all that are greater, and behind equal ones of lower tokens.
    void insert(float logit, int32_t token) {
        auto is_before = [&](int i) { return logits[i] > logit || (logits[i] == logit && tokens[i] < token); };
        int place = wanted;
        while (place > 0 && !is_before(place - 1)) --place;
        if (place == wanted) return;
        for (int i = wanted - 1; i > place; --i) logits[i] = logits[i - 1], tokens[i] = tokens[i - 1];
        logits[place] = logit, tokens[place] = token;
    }
};

}  // namespace quasar
