// AMX's tiles in plain C++; `trapped_tiles.cpp` has a processor without tiles run their instructions by it.
//
// As "Intel 64 and IA-32 Architectures Software Developer's Manual" defines them, volume 2: TDPBSUD's sums are exact,
// TDPBF16PS adds the products of even and of odd inputs apart, each fused, then both to what is there, and takes denormal
// numbers for 0 and leaves none. What a processor would not do, or not as its author thinks, ends the program with a word.

#pragma once

#include <atomic>
#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace emulated_tiles {

constexpr int TILES = 8, ROWS = 16, BYTES = 64, NUMBERS = BYTES / 4;

[[noreturn]] inline void fail(const char* what) {
    std::fprintf(stderr, "emulated tiles: %s\n", what);
    std::abort();
}

inline void check(bool holds, const char* otherwise) {
    if (!holds) fail(otherwise);
}

struct Tile {
    int rows = 0, bytes = 0;
    bool is_filled = false;  // a configuration leaves zeros, on which nobody should count
    uint8_t data[ROWS][BYTES];
};

struct Tiles {
    bool are_configured = false;
    Tile tile[TILES];
    ~Tiles() { check(!are_configured, "a thread ended without releasing its tiles"); }
};

inline thread_local Tiles own;
inline std::atomic<long> multiplied[2];  // tiles of codes, and of bfloat16

inline Tile& tile(int number, bool is_filled) {
    check(own.are_configured, "a tile was named before tiles were configured");
    check(number >= 0 && number < TILES, "there is no such tile");
    check(own.tile[number].rows > 0, "the configuration leaves this tile out");
    check(!is_filled || own.tile[number].is_filled, "a tile was read that was neither loaded nor zeroed");
    return own.tile[number];
}

inline void configure(const void* shapes) {
    uint8_t given[64];
    std::memcpy(given, shapes, sizeof given);
    check(given[0] == 1 && given[1] == 0, "palette 1 and row 0 were expected");
    for (int i = 2; i < 16; ++i) check(given[i] == 0, "a reserved byte is not 0");
    for (int i = 0; i < 16; ++i) {
        uint16_t bytes;
        std::memcpy(&bytes, given + 16 + 2 * i, sizeof bytes);
        const int rows = given[48 + i];
        check(i < TILES || (rows == 0 && bytes == 0), "there are eight tiles");
        check((rows == 0) == (bytes == 0), "a tile has rows without bytes or bytes without rows");
        check(rows <= ROWS && bytes <= BYTES && bytes % 4 == 0, "a tile has up to 16 rows of up to 64 bytes, in fours");
        if (i < TILES) own.tile[i] = Tile(), own.tile[i].rows = rows, own.tile[i].bytes = bytes;
    }
    own.are_configured = true;
}

inline void release() {
    check(own.are_configured, "tiles were released that were not configured");
    own.are_configured = false;
}

inline void zero(int number) {
    Tile& to = tile(number, false);
    std::memset(to.data, 0, sizeof to.data);
    to.is_filled = true;
}

inline void load(int number, const void* from, long stride) {
    Tile& to = tile(number, false);
    zero(number);
    for (int row = 0; row < to.rows; ++row)
        std::memcpy(to.data[row], static_cast<const uint8_t*>(from) + row * stride, size_t(to.bytes));
}

inline void store(int number, void* to, long stride) {
    const Tile& from = tile(number, true);
    for (int row = 0; row < from.rows; ++row)
        std::memcpy(static_cast<uint8_t*>(to) + row * stride, from.data[row], size_t(from.bytes));
}

struct Operands {
    Tile& c;
    const Tile &a, &b;
    Operands(int c, int a, int b) : c(tile(c, true)), a(tile(a, true)), b(tile(b, true)) {
        check(c != a && c != b && a != b, "a product takes three different tiles");
        check(this->c.rows == this->a.rows, "a product's rows are not those of its first factor");
        check(this->c.bytes == this->b.bytes, "a product's columns are not those of its second factor");
        check(this->a.bytes / 4 == this->b.rows, "the factors of a product do not fit one another");
    }
};

template <typename Code>  // int8_t or uint8_t, which B holds
void multiply_codes(int c, int a, int b) {
    const Operands of(c, a, b);
    for (int m = 0; m < of.c.rows; ++m) {
        int32_t sums[NUMBERS];
        std::memcpy(sums, of.c.data[m], sizeof sums);
        for (int k = 0; k < of.b.rows; ++k)
            for (int n = 0; n < of.c.bytes / 4; ++n)
                for (int i = 0; i < 4; ++i) sums[n] += int8_t(of.a.data[m][4 * k + i]) * Code(of.b.data[k][4 * n + i]);
        std::memcpy(of.c.data[m], sums, sizeof sums);
    }
    multiplied[0].fetch_add(1, std::memory_order_relaxed);
}

inline float without_denormals(float x) { return std::fabs(x) < FLT_MIN ? std::copysign(0.0f, x) : x; }

struct Pairs {
    float even[NUMBERS], odd[NUMBERS];
    explicit Pairs(const uint8_t* row) {
        uint32_t words[NUMBERS], low[NUMBERS], high[NUMBERS];
        std::memcpy(words, row, sizeof words);
        for (int n = 0; n < NUMBERS; ++n) low[n] = words[n] << 16, high[n] = words[n] & 0xffff0000;
        std::memcpy(even, low, sizeof even), std::memcpy(odd, high, sizeof odd);
        for (int n = 0; n < NUMBERS; ++n) even[n] = without_denormals(even[n]), odd[n] = without_denormals(odd[n]);
    }
};

inline void multiply_pairs(int c, int a, int b) {
    const Operands of(c, a, b);
    for (int m = 0; m < of.c.rows; ++m) {
        const Pairs row(of.a.data[m]);
        float even[NUMBERS] = {}, odd[NUMBERS] = {}, sums[NUMBERS];
        for (int k = 0; k < of.b.rows; ++k) {
            const Pairs column(of.b.data[k]);
            for (int n = 0; n < NUMBERS; ++n) {
                even[n] = without_denormals(std::fma(row.even[k], column.even[n], even[n]));
                odd[n] = without_denormals(std::fma(row.odd[k], column.odd[n], odd[n]));
            }
        }
        std::memcpy(sums, of.c.data[m], sizeof sums);
        for (int n = 0; n < NUMBERS; ++n)
            sums[n] = without_denormals(without_denormals(sums[n]) + without_denormals(even[n] + odd[n]));
        std::memcpy(of.c.data[m], sums, size_t(of.c.bytes));
    }
    multiplied[1].fetch_add(1, std::memory_order_relaxed);
}

}  // namespace emulated_tiles
