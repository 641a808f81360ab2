// The best of a row of logits, of equal ones the first, and how far the next best lies below it: found as they come.

#pragma once

#include <cmath>
#include <limits>

#include "lanes.h"

namespace quasar {

struct Choice {
    int64_t token;  // -1 where a logit is not a number, or the best of them is infinite
    float margin;
};

// What a thread has seen of one row, lane by lane.
struct alignas(64) Best {
    __m512 best = _mm512_set1_ps(-std::numeric_limits<float>::infinity()), next = best;
    __m512i where = _mm512_setzero_si512();
    __mmask16 odd = 0;

    // Logits [at, at + 16), of which `lanes` exist; they come in rising order.
    void see(int at, __mmask16 lanes, __m512 logits) {
        const __m512i own = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
        __m512 x = _mm512_mask_mov_ps(_mm512_set1_ps(-std::numeric_limits<float>::infinity()), lanes, logits);
        odd |= _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
        const __mmask16 better = _mm512_cmp_ps_mask(x, best, _CMP_GT_OQ);
        next = _mm512_max_ps(next, _mm512_min_ps(x, best));
        best = _mm512_max_ps(best, x);
        where = _mm512_mask_mov_epi32(where, better, _mm512_add_epi32(own, _mm512_set1_epi32(at)));
    }

    // Take in what another thread has seen of the row.
    void merge(const Best& other) {
        const __mmask16 better = _mm512_cmp_ps_mask(other.best, best, _CMP_GT_OQ) |
                                 (_mm512_cmp_ps_mask(other.best, best, _CMP_EQ_OQ) &
                                  _mm512_cmplt_epi32_mask(other.where, where));
        next = _mm512_max_ps(_mm512_max_ps(next, other.next), _mm512_min_ps(other.best, best));
        best = _mm512_max_ps(best, other.best);
        where = _mm512_mask_mov_epi32(where, better, other.where);
        odd |= other.odd;
    }

    Choice choose() const {
        const float largest = _mm512_reduce_max_ps(best);
        const __mmask16 winners = _mm512_cmp_ps_mask(best, _mm512_set1_ps(largest), _CMP_EQ_OQ);
        const int token = _mm512_mask_reduce_min_epi32(winners, where);
        const __mmask16 winner = _mm512_mask_cmp_epi32_mask(winners, where, _mm512_set1_epi32(token), _MM_CMPINT_EQ);
        const float second = _mm512_reduce_max_ps(_mm512_mask_mov_ps(best, winner, next));
        return {odd || std::isinf(largest) ? -1 : token, largest - second};
    }
};

}  // namespace quasar
