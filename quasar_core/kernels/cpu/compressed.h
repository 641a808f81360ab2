// Weights of bfloat16 in three quarters of their bytes, without loss.
//
// The exponents of a strip's weights lie close together: fifteen of them next to one another hold nearly all, so a code of
// 4 bits tells which, and 0 is that of zeros and denormals. Sign and mantissa stay as they are: 12 bits for 16. The few
// weights that have another exponent, the outliers, are listed with their places, and put back where a strip is read: so
// products are those of the weights as they were, to the last bit. (Zhang et al., 2025, "70% Size, 100% Accuracy", code
// exponents by their entropy, in 11 bits; codes of one length are read at the memory's speed.)
//
// Of a strip, row after row: a byte for each weight, its sign before seven bits of mantissa; then sixteen bytes for every
// 32 weights (the last ones too, where they are fewer), the codes of the first sixteen in the lower halves, of the others
// in the upper.

#pragma once

#include <limits>

#include "strips.h"

namespace quasar {

constexpr int CODES = 32;  // weights whose codes lie in sixteen bytes

struct Outlier {
    int32_t column;
    uint16_t row, bits;  // within its strip; the weight as bfloat16 has it
};

struct Compressed {
    const uint8_t* strips;    // all of them, one behind the other
    const uint8_t* bases;     // [strips]: the exponent of code 1, less 1
    const int32_t* first;     // [strips + 1]: of a strip's outliers, among all of them
    const Outlier* outliers;  // in a strip by columns
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

// The outliers of a strip, column by column.
struct Outliers {
    const Outlier *next, *end;
    int column() const { return next < end ? next->column : std::numeric_limits<int>::max(); }
};

// See `strips.h`.
struct CompressedStrip {
    using Kind = Numbers<uint16_t>;
    using Taken = Words;
    static constexpr int STEP = WORDS, TERMS = Kind::TERMS_OF_WORDS, MOST = MOST_COMPRESSED;
    static constexpr int beside(int rows) { return compressed_beside(rows); }
    static constexpr int lines(int outputs) { return (outputs * STEP * 3 + 127) / 128; }

    const uint8_t* rows;
    int in, outs;
    Exponents exponents;
    Outliers outliers;
    size_t row_bytes() const { return compressed_row(in); }
    const char* row(int o) const { return reinterpret_cast<const char*>(rows + o * row_bytes()); }

    struct Reader {
        const uint8_t* w;
        int in, first;
        size_t bytes;
        ExponentTable exponents;
        Outliers outliers;
        int column;  // of the next outlier

        template <int OUTS>
        QUASAR_INLINE void take(int i, Words (&words)[OUTS]) {
            const size_t codes = in + place_of_codes(i);
#pragma GCC unroll 8
            for (int o = 0; o < OUTS; ++o) {
                const uint8_t* row = w + o * bytes;
                words[o] = restore_words(row + i, row + codes, in_upper_half(i), exponents);
            }
            for (; __builtin_expect(column < i + STEP, 0); ++outliers.next, column = outliers.column())
#pragma GCC unroll 8
                for (int o = 0; o < OUTS; ++o)
                    if (outliers.next->row == first + o) words[o] = with_word(words[o], column - i, outliers.next->bits);
        }
    };
    Reader reader(int o) const {
        const ExponentTable table = load_exponents(exponents.by_code);
        return {rows + o * row_bytes(), in, o, row_bytes(), table, outliers, outliers.column()};
    }
};

inline CompressedStrip strip_of(const Compressed& weight, int in, int out, int at) {
    const int first = at * STRIP;
    return {weight.strips + first * compressed_row(in), in, std::min(STRIP, out - first), Exponents(weight.bases[at]),
            {weight.outliers + weight.first[at], weight.outliers + weight.first[at + 1]}};
}

// The weights [outs, in] as they were.
inline void restore_strip(const CompressedStrip& strip, uint16_t* w) {
    const ExponentTable table = load_exponents(strip.exponents.by_code);
    for (int o = 0; o < strip.outs; ++o) {
        const uint8_t *low = strip.rows + o * strip.row_bytes(), *codes = low + strip.in;
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
    for (const Outlier* one = strip.outliers.next; one < strip.outliers.end; ++one)
        w[size_t(one->row) * strip.in + one->column] = one->bits;
}

// The base whose fifteen exponents hold the most of a strip's weights [outs, in], and how many they do not hold.
inline int choose_base(const uint16_t* w, size_t count, int& outliers) {
    int beside[4][256] = {}, of[256];  // equal exponents one behind the other would wait for one counter
    for (size_t i = 0; i < count; ++i) ++beside[i % 4][w[i] >> 7 & 0xff];
    for (int e = 0; e < 256; ++e) of[e] = beside[0][e] + beside[1][e] + beside[2][e] + beside[3][e];
    int held = 0, most = -1, best = 0;
    for (int e = 1; e <= 255; ++e) {  // the window that ends with e
        held += of[e] - (e > 15 ? of[e - 15] : 0);
        if (held > most) most = held, best = std::max(e - 15, 0);
    }
    outliers = int(count) - of[0] - most;
    return best;
}

// Sixteen weights: a byte and a code of each; which of them are outliers.
inline Lanes compress_lanes(const uint16_t* w, int base, uint8_t* low, uint8_t* codes) {
    unsigned outliers = 0;
    for (int i = 0; i < LANES; ++i) {
        const int exponent = w[i] >> 7 & 0xff, code = exponent - base;
        const bool held = (code >= 1 && code <= 15) || exponent == 0;
        low[i] = held ? uint8_t((w[i] >> 8 & 0x80) | (w[i] & 0x7f)) : 0;
        codes[i] = held && exponent ? uint8_t(code) : 0;
        outliers |= unsigned(!held) << i;
    }
    return Lanes(outliers);
}

// A strip [outs, in] into its bytes; its outliers to `outliers`.
inline void compress_strip(const uint16_t* w, int outs, int in, int base, uint8_t* strip, Outlier* outliers) {
    const size_t bytes = compressed_row(in);
    Outlier* end = outliers;
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
    std::sort(outliers, end, [](const Outlier& a, const Outlier& b) { return a.column < b.column; });
}

}  // namespace quasar
