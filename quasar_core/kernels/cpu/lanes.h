// Sixteen numbers at a time, for every part of a pass: in one register, or in as many as the instruction set needs.
//
// `lanes_avx512.h` and its siblings say what one register does, a `Part` of WIDTH lanes; all else is written on `Floats` of
// 16 lanes. Within each instruction set sums are added in one order, which is the lanes'.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#if defined(QUASAR_AVX512)
#include "lanes_avx512.h"
#elif defined(QUASAR_AVX2)
#include "lanes_avx2.h"
#elif defined(QUASAR_NEON)
#include "lanes_neon.h"
#else
#include "lanes_portable.h"
#endif

namespace quasar {

constexpr int LANES = 16;  // 32-bit numbers that are taken at a time
constexpr int PARTS = LANES / WIDTH;

using Lanes = uint16_t;  // a bit for each of sixteen
constexpr Lanes ALL = 0xffff;

// The first `count` lanes, all of them where there are more.
inline Lanes first_lanes(int count) { return Lanes((1u << std::clamp(count, 0, LANES)) - 1); }

inline IntPart spread_int(int32_t x) { return IntPart{} + x; }
inline IntPart larger_ints(IntPart a, IntPart b) { return a > b ? a : b; }

struct Floats {
    Part part[PARTS];
    Floats() = default;
    Floats(float x) : Floats(each([=](int) { return spread(x); })) {}

    template <typename Make>
    static Floats each(Make make) {
        return each(make, std::make_integer_sequence<int, PARTS>());
    }
    template <typename Make, int... p>
    static Floats each(Make make, std::integer_sequence<int, p...>) {
        Floats made;
        ((made.part[p] = make(p)), ...);
        return made;
    }
};

inline Floats operator+(Floats a, Floats b) { return Floats::each([&](int p) { return a.part[p] + b.part[p]; }); }
inline Floats operator-(Floats a, Floats b) { return Floats::each([&](int p) { return a.part[p] - b.part[p]; }); }
inline Floats operator*(Floats a, Floats b) { return Floats::each([&](int p) { return a.part[p] * b.part[p]; }); }
inline Floats operator/(Floats a, Floats b) { return Floats::each([&](int p) { return a.part[p] / b.part[p]; }); }

// a · b + c, in one rounding where the processor can.
inline Floats fused(Floats a, Floats b, Floats c) {
    return Floats::each([&](int p) { return fused(a.part[p], b.part[p], c.part[p]); });
}

// The second of two that are no numbers: so a NaN stays one where it stands second.
inline Floats larger(Floats a, Floats b) {
    return Floats::each([&](int p) { return larger(a.part[p], b.part[p]); });
}
inline Floats smaller(Floats a, Floats b) {
    return Floats::each([&](int p) { return smaller(a.part[p], b.part[p]); });
}

inline Floats nearest(Floats x) {  // ties to even
    return Floats::each([&](int p) { return nearest(x.part[p]); });
}

inline Floats magnitude(Floats x) {
    return Floats::each([&](int p) { return Part(IntPart(x.part[p]) & 0x7fffffff); });
}

// Lanes, and what is chosen by them.

template <typename Tell>
Lanes lanes_where(Tell tell) {
    unsigned lanes = 0;
    for (int p = 0; p < PARTS; ++p) lanes |= tell(p) << (p * WIDTH);
    return Lanes(lanes);
}

inline Lanes is_less(Floats a, Floats b) {
    return lanes_where([&](int p) { return is_less(a.part[p], b.part[p]); });
}

inline Lanes is_nan(Floats x) {
    return lanes_where([&](int p) { return is_nan(x.part[p]); });
}

inline Floats select(Lanes lanes, Floats yes, Floats no) {
    return Floats::each([&](int p) { return select(unsigned(lanes) >> (p * WIDTH), yes.part[p], no.part[p]); });
}

// Memory.

inline Floats load(const float* x) {
    return Floats::each([&](int p) { return load_part(x + p * WIDTH); });
}

inline Floats load(const float* x, Lanes lanes) {  // 0 in the others, which are not read
    return Floats::each([&](int p) { return load_part(x + p * WIDTH, unsigned(lanes) >> (p * WIDTH)); });
}

inline Floats load(const uint16_t* x) {  // bfloat16
    return Floats::each([&](int p) { return from_bfloat16(x + p * WIDTH); });
}

inline void store(float* y, Floats x) {
    for (int p = 0; p < PARTS; ++p) store_part(y + p * WIDTH, x.part[p]);
}

inline void store(float* y, Floats x, Lanes lanes) {
    for (int p = 0; p < PARTS; ++p) store_part(y + p * WIDTH, x.part[p], unsigned(lanes) >> (p * WIDTH));
}

inline IntPart to_bfloat16(Part x) {  // in the lower halves; rounded to the nearest, ties to even; NaN kept
    const UnsignedPart bits = UnsignedPart(x), rounded = bits + ((bits >> 16 & 1) + 0x7fff);
    return IntPart(UnsignedPart(select(is_nan(x), spread_int(0x7fc00000), IntPart(rounded))) >> 16);
}

inline void store(uint16_t* y, Floats x, Lanes lanes = ALL) {  // bfloat16
    for (int p = 0; p < PARTS; ++p)
        store_low_halves(y + p * WIDTH, to_bfloat16(x.part[p]), unsigned(lanes) >> (p * WIDTH));
}

// Sums and extremes of all lanes.

#ifndef QUASAR_AVX512  // which has instructions for these
inline int32_t sum_of(IntPart x) {
    uint32_t sum = 0;
    for (int i = 0; i < WIDTH; ++i) sum += uint32_t(x[i]);
    return int32_t(sum);
}
inline int32_t largest_of(IntPart x) {
    int32_t largest = x[0];
    for (int i = 1; i < WIDTH; ++i) largest = std::max<int32_t>(largest, x[i]);
    return largest;
}
#endif

template <typename Join>
Part join_parts(Floats x, Join join) {
    Part joined = x.part[0];
    for (int p = 1; p < PARTS; ++p) joined = join(joined, x.part[p]);
    return joined;
}

inline float sum_of(Floats x) {
    return sum_of(join_parts(x, [](Part a, Part b) { return a + b; }));
}
inline float largest_of(Floats x) {
    return largest_of(join_parts(x, [](Part a, Part b) { return larger(a, b); }));
}
inline float least_of(Floats x) {
    return least_of(join_parts(x, [](Part a, Part b) { return smaller(a, b); }));
}

// Lane i of the result is the sum of the lanes of sums[i].
inline Floats sum_lanes(const Part* sums) {
    return Floats::each([&](int p) { return sum_each(sums + p * WIDTH); });
}

// Words with another in place `at`. In registers: were it put there in memory, tiles would keep more than that there.
#ifndef QUASAR_AVX512
inline Words with_word(Words words, int at, uint16_t bits) {
    using Shorts = uint16_t __attribute__((vector_size(2 * WORDS)));
    Shorts places;
    for (int i = 0; i < WORDS; ++i) places[i] = uint16_t(i);
    const Shorts there = (Shorts)(places == uint16_t(at));
    return (Words)(((Shorts)words & ~there) | (there & bits));
}
#endif

// Functions.

#ifndef QUASAR_AVX512
inline Part power_of_two(IntPart n) { return Part(UnsignedPart(n + 127) << 23); }

// x · 2^n for |n| up to 250: in two steps, as either may lie beyond a float's exponents.
inline Part times_power(Part x, Part n) {
    const IntPart all = nearest_ints(n), half = all >> 1;
    return x * power_of_two(half) * power_of_two(all - half);
}
#endif

// e^x to about one unit in the last place: 2^n · 2^f with f in [−0.5, 0.5]; 0 far below.
inline Floats exponential(Floats x) {
    x = smaller(128.0f, larger(-104.0f, x));
    const Floats n = nearest(x * 1.44269504f);
    Floats f = fused(n, -0.693145752f, x);  // ln 2 in two parts
    f = fused(n, -1.42860677e-6f, f);
    Floats y = 1.0f / 5040;
    for (float term : {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f}) y = fused(y, f, term);
    return Floats::each([&](int p) { return times_power(y.part[p], n.part[p]); });
}

inline Floats silu(Floats x) { return x / (Floats(1.0f) + exponential(Floats(0.0f) - x)); }

}  // namespace quasar
