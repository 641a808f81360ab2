// Products of codes with activations of 8 bits in 16-bit lanes, for registers of four 32-bit numbers without an instruction
// for them.

#pragma once

namespace quasar {

// Of the four inputs in a lane, the even ones and the odd ones in 16-bit lanes.
using Shorts = int16_t __attribute__((vector_size(16)));

struct EvenOdd {
    Shorts even, odd;
    EvenOdd() = default;
    explicit EvenOdd(IntPart codes) : even(Shorts(codes) & 0xff), odd(Shorts(UnsignedPart(codes) >> 8) & 0xff) {}
};

// An activation of 8 bits in each 16: codes of 8 bits times it fit 16 bits, and of fewer bits so do several steps' sums.
template <int BITS>
struct Dot {
    static constexpr bool SMALL = BITS < 8;
    using Sum = std::conditional_t<SMALL, Shorts, IntPart>;
    using Codes = EvenOdd;
    static constexpr int STEPS = SMALL ? 32767 / (2 * 127 * ((1 << BITS) - 1)) : 1 << 20, OFFSET = 0;
    static Codes codes(IntPart plane) { return EvenOdd(plane); }
    static Sum add(Sum sum, const Codes& codes, IntPart four) {
        const Shorts odd = Shorts(four) >> 8, even = (Shorts(four) << 8) >> 8;
        if constexpr (SMALL)
            return sum + (codes.even * even + codes.odd * odd);
        else
            return sum + (halves_of(codes.even * even) + halves_of(codes.odd * odd));
    }
    static IntPart widen(Sum sum) {
        if constexpr (SMALL)
            return halves_of(sum);
        else
            return sum;
    }

private:
    static IntPart halves_of(Shorts x) {  // the sum of both halves of each lane
        return (IntPart(UnsignedPart(x) << 16) >> 16) + (IntPart(x) >> 16);
    }
};

}  // namespace quasar
