// A product with bfloat16 weights in three quarters of their bytes, without loss.
//
// The exponents of a strip's weights lie close together: fifteen of them next to one another hold nearly all, so a code of
// 4 bits tells which, and 0 is that of zeros and denormals. Sign and mantissa stay as they are: 12 bits for 16. The few
// weights that have another exponent stand apart, with their places, and are put back where a strip is read: so products
// are those of the weights as they were, to the last bit. (Zhang et al., 2025, "70% Size, 100% Accuracy", code exponents
// by their entropy, in 11 bits; codes of one length are read at the memory's speed.)
//
// Of a strip, row after row: a byte for each weight, its sign before seven bits of mantissa; then sixteen bytes for every
// 32 weights (the last ones too, where they are fewer), the codes of the first sixteen in the lower halves, of the others
// in the upper.

#pragma once

#include <limits>

#include "rows.h"

namespace quasar {

constexpr int CODES = 32;  // weights whose codes lie in sixteen bytes

struct Apart {
    int32_t column;
    uint16_t row, bits;  // within its strip; the weight as bfloat16 has it
};

struct Compressed {
    const uint8_t* strips;      // all of them, one behind the other
    const uint8_t* bases;       // [strips]: the exponent of code 1, less 1
    const int32_t* first;       // [strips + 1]: of a strip's weights that stand apart, among all of them
    const Apart* apart;         // in a strip by columns
};

inline size_t compressed_row(int in) {  // bytes
    return size_t(in) + (in + CODES - 1) / CODES * (CODES / 2);
}

// Where the codes of inputs i, i + 1, … stand behind a row's bytes, and whether in the upper halves.
inline size_t place_of_codes(int i) { return i / CODES * (CODES / 2) + i % (CODES / 2); }
inline bool in_upper_half(int i) { return i % CODES >= CODES / 2; }

// The upper half of a bfloat16's bits by code: its exponent.
struct Exponents {
    alignas(64) uint16_t by_code[32];
    explicit Exponents(int base) {
        for (int code = 0; code < 32; ++code) by_code[code] = uint16_t(code % 16 ? (base + code % 16) << 7 : 0);
    }
};

// The weights of a strip that stand apart, column by column.
struct ApartOf {
    const Apart *next, *end;
    int column() const { return next < end ? next->column : std::numeric_limits<int>::max(); }
};

// As `multiply_rows_tile`, of weights [OUTS, compressed_row(in)], the first of which is `first` in its strip.
template <int OUTS, int ROWS>
void multiply_compressed_tile(const uint8_t* w, int first, const Exponents& exponents, ApartOf apart,
                              const Numbers<uint16_t>::Row* x, int in, Coming coming, Part* sums) {
    using Kind = Numbers<uint16_t>;
    const size_t bytes = compressed_row(in);
    const ExponentTable table = load_exponents(exponents.by_code);
    Part sum[ROWS][OUTS];
    for (auto& line : sum)
        for (auto& one : line) one = spread(0);
    int column = apart.column();
    auto add = [&](int i, auto last) QUASAR_INLINE {
        Words words[OUTS];
        const size_t codes = in + place_of_codes(i);
#pragma GCC unroll 8
        for (int o = 0; o < OUTS; ++o) {
            const uint8_t* row = w + o * bytes;
            words[o] = restore_words(row + i, row + codes, in_upper_half(i), table);
            if (decltype(last)::value) words[o] = first_words(words[o]);
        }
        for (; column < i + WORDS; ++apart.next, column = apart.column())
#pragma GCC unroll 8
            for (int o = 0; o < OUTS; ++o)
                if (apart.next->row == first + o) words[o] = with_word(words[o], column - i, apart.next->bits);
        Kind::for_terms([&](auto term) QUASAR_INLINE {
            constexpr int TERM = decltype(term)::value;
#pragma GCC unroll 8
            for (int t = 0; t < ROWS; ++t) {
                auto row = Kind::template term_beside_words<TERM>(x + size_t(t) * in + i, decltype(last)::value);
                hold(row);
#pragma GCC unroll 8
                for (int o = 0; o < OUTS; ++o)
                    sum[t][o] = Kind::add(sum[t][o], Kind::template term_of_words<TERM>(words[o]), row);
            }
        });
    };
    int i = 0;
    for (; i + WORDS <= in; i += WORDS) {
        coming.fetch();
        add(i, std::false_type());
    }
    if constexpr (WORDS > LANES)
        if (i < in) add(i, std::true_type());
    for (int t = 0; t < ROWS; ++t)
        for (int o = 0; o < OUTS; ++o) sums[t * STRIP + o] = sum[t][o];
}

// A strip of outputs as it is read.
struct CompressedStrip {
    const uint8_t* rows;
    int in, outs;
    Exponents exponents;
    ApartOf apart;
    const uint8_t* row(int o) const { return rows + o * compressed_row(in); }
};

inline CompressedStrip strip_of(const Compressed& weight, int in, int out, int at) {
    const int first = at * STRIP;
    return {weight.strips + first * compressed_row(in), in, std::min(STRIP, out - first), Exponents(weight.bases[at]),
            {weight.apart + weight.first[at], weight.apart + weight.first[at + 1]}};
}

// As `multiply_strip`.
template <int ROWS>
void multiply_compressed_strip(const CompressedStrip& strip, const Numbers<uint16_t>::Row* x, int tile, int tiles, Floats* y) {
    constexpr int BESIDE = compressed_beside(ROWS), LINES = (BESIDE * WORDS * 3 + 127) / 128;
    static_assert(STRIP % BESIDE == 0, "a strip is cut into tiles");
    Part sums[ROWS * STRIP];
    auto multiply = [&](int o, auto outs, Coming coming) {
        multiply_compressed_tile<decltype(outs)::value, ROWS>(strip.row(o), o, strip.exponents, strip.apart, x, strip.in,
                                                              coming, sums + o);
    };
    int o = 0;
    for (; o + BESIDE <= strip.outs; o += BESIDE) {
        const size_t before = BESIDE * compressed_row(strip.in) * tile / tiles;
        const Coming coming{reinterpret_cast<const char*>(strip.row(o + STRIP)) + before, (LINES + tiles - 1) / tiles};
        multiply(o, std::integral_constant<int, BESIDE>(), coming);
    }
    for (; o < strip.outs; ++o) multiply(o, std::integral_constant<int, 1>(), {nullptr, 0});
    for (; o < STRIP; ++o)
        for (int t = 0; t < ROWS; ++t) sums[t * STRIP + o] = spread(0);
    for (int t = 0; t < ROWS; ++t) y[t] = sum_lanes(sums + t * STRIP);
}

template <int ROWS = 1, typename... Arguments>
void multiply_compressed_strip_of(int rows, const CompressedStrip& strip, Arguments... arguments) {
    if constexpr (ROWS < MOST_COMPRESSED)
        if (rows > ROWS) return multiply_compressed_strip_of<ROWS + 1>(rows, strip, arguments...);
    multiply_compressed_strip<ROWS>(strip, arguments...);
}

// As `multiply_strips`.
template <typename Put>
void multiply_compressed(const Compressed& weight, const Numbers<uint16_t>::Row* x, int in, Range strips, int count, int out,
                         Put put) {
    Floats y[MOST_COMPRESSED];
    for (int at = strips.begin; at < strips.end; ++at) {
        const CompressedStrip strip = strip_of(weight, in, out, at);
        Tiles tiles(count, MOST_COMPRESSED);
        for (int tile = 0, row = 0; tile < tiles.total; ++tile) {
            const int rows = tiles.next();
            multiply_compressed_strip_of(rows, strip, x + size_t(row) * in, tile, tiles.total, y);
            for (int t = 0; t < rows; ++t) put(row + t, at * STRIP, first_lanes(strip.outs), y[t]);
            row += rows;
        }
    }
}

// The weights [outs, in] as they were.
inline void restore_strip(const CompressedStrip& strip, uint16_t* w) {
    const ExponentTable table = load_exponents(strip.exponents.by_code);
    for (int o = 0; o < strip.outs; ++o) {
        const uint8_t *low = strip.row(o), *codes = low + strip.in;
        int i = 0;
        for (; i + WORDS <= strip.in; i += WORDS) {
            const Words words = restore_words(low + i, codes + place_of_codes(i), in_upper_half(i), table);
            std::memcpy(w + size_t(o) * strip.in + i, &words, sizeof words);
        }
        for (; i < strip.in; ++i) {
            const int both = codes[place_of_codes(i)];
            const uint16_t exponent = strip.exponents.by_code[in_upper_half(i) ? both >> 4 : both & 15];
            w[size_t(o) * strip.in + i] = uint16_t((low[i] & 0x80) << 8 | (low[i] & 0x7f) | exponent);
        }
    }
    for (const Apart* one = strip.apart.next; one < strip.apart.end; ++one)
        w[size_t(one->row) * strip.in + one->column] = one->bits;
}

// The base whose fifteen exponents hold the most of a strip's weights [outs, in], and how many they do not hold.
inline int choose_base(const uint16_t* w, size_t count, int& apart) {
    int beside[4][256] = {}, of[256];  // equal exponents one behind the other would wait for one counter
    for (size_t i = 0; i < count; ++i) ++beside[i % 4][w[i] >> 7 & 0xff];
    for (int e = 0; e < 256; ++e) of[e] = beside[0][e] + beside[1][e] + beside[2][e] + beside[3][e];
    int held = 0, most = -1, best = 0;
    for (int e = 1; e <= 255; ++e) {  // the window that ends with e
        held += of[e] - (e > 15 ? of[e - 15] : 0);
        if (held > most) most = held, best = std::max(e - 15, 0);
    }
    apart = int(count) - of[0] - most;
    return best;
}

// Sixteen weights: a byte and a code of each; which of them stand apart.
inline Lanes compress_lanes(const uint16_t* w, int base, uint8_t* low, uint8_t* codes) {
    unsigned apart = 0;
    for (int i = 0; i < LANES; ++i) {
        const int exponent = w[i] >> 7 & 0xff, code = exponent - base;
        const bool held = (code >= 1 && code <= 15) || exponent == 0;
        low[i] = held ? uint8_t((w[i] >> 8 & 0x80) | (w[i] & 0x7f)) : 0;
        codes[i] = held && exponent ? uint8_t(code) : 0;
        apart |= unsigned(!held) << i;
    }
    return Lanes(apart);
}

// A strip [outs, in] into its bytes; what stands apart to `apart`.
inline void compress_strip(const uint16_t* w, int outs, int in, int base, uint8_t* strip, Apart* apart) {
    const size_t bytes = compressed_row(in);
    Apart* end = apart;
    for (int o = 0; o < outs; ++o) {
        uint8_t *low = strip + o * bytes, *pairs = low + in;
        for (int i = 0; i < in; i += LANES) {
            uint8_t codes[LANES];
            const uint16_t* own = w + size_t(o) * in + i;
            for (unsigned left = compress_lanes(own, base, low + i, codes), at = 0; left; left >>= 1, ++at)
                if (left & 1) *end++ = {int32_t(i + at), uint16_t(o), own[at]};
            uint8_t* to = pairs + place_of_codes(i);
            for (int at = 0; at < LANES; ++at) to[at] = in_upper_half(i) ? uint8_t(to[at] | codes[at] << 4) : codes[at];
        }
    }
    std::sort(apart, end, [](const Apart& a, const Apart& b) { return a.column < b.column; });
}

}  // namespace quasar
