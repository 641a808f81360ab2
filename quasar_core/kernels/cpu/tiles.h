// AMX's tiles: eight registers of up to 16 rows of 64 bytes, and products of two of them that are added to a third.
//
// `coded_tiles.h` takes them for packed codes, `paired_tiles.h` for weights of bfloat16. A product C [m, n] += A [m, k] B [k, n]
// has in every 32 bits of A and B some numbers that follow one another along k: four of 8 bits, or two of 16.

#pragma once

#include "lanes.h"

namespace quasar {

constexpr int MOST_IN_TILE = 16, TILE_BYTES = 64;

// Tiles are named by numbers that stand in the code: those of C are 0 to 3.
#define QUASAR_WITH_EACH(DO) DO(0) DO(1) DO(2) DO(3)

// Of each tile its rows and their bytes, as the processor reads them.
struct alignas(64) TileShapes {
    uint8_t palette = 1, first_row = 0, reserved[14] = {};
    uint16_t bytes[16] = {};
    uint8_t rows[16] = {};
    void set(int first, int count, int height, int width) {
        for (int tile = first; tile < first + count; ++tile) rows[tile] = uint8_t(height), bytes[tile] = uint16_t(width);
    }
};
static_assert(sizeof(TileShapes) == 64, "as the processor reads it");

// Stands between what is written to memory and a tile that reads it: g++ does not know that tiles read.
inline void settle(const void* written) { __asm__ volatile("" ::"r"(written) : "memory"); }

// Tiles are a thread's own, so each configures them for its share of a product, and gives them back: then the system need
// not save them.
class Configured {
public:
    explicit Configured(const TileShapes& shapes) { configure(shapes); }
    ~Configured() { _tile_release(); }
    Configured(const Configured&) = delete;
    Configured& operator=(const Configured&) = delete;
    void configure(const TileShapes& shapes) {
        settle(&shapes);
        _tile_loadconfig(&shapes);
    }
};

// Rows in tiles of one height. The last tile begins early where they do not fill it: rows that it shares with the one before
// are computed twice, to the same bits, and taken once.
struct RowTiles {
    int rows, height, total;
    RowTiles(int rows, int height) : rows(rows), height(height), total((rows + height - 1) / height) {}

    static int even_height(int rows) {
        const int total = (rows + MOST_IN_TILE - 1) / MOST_IN_TILE;
        return (rows + total - 1) / total;
    }
    int place(int tile) const { return std::min(tile * height, rows - height); }  // its first row
    int begin(int tile) const { return tile * height; }                          // the first that is taken of it
    int end(int tile) const { return std::min(begin(tile) + height, rows); }
};

}  // namespace quasar
