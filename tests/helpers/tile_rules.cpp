// What a processor would not do with tiles, one thing for each number that is given; 0 is in order.

#include <immintrin.h>

#include "trapped_tiles.cpp"

struct Shapes {
    uint8_t palette = 1, rest[15] = {};
    uint16_t bytes[16] = {64, 64, 64, 32};
    uint8_t rows[16] = {16, 16, 16, 16};
};

int main(int, char** arguments) {
    static uint8_t memory[1024];
    Shapes shapes;
    const int broken = std::atoi(arguments[1]);
    catch_tiles();
    if (broken == 1) _tile_zero(0);
    if (broken == 2) shapes.rows[5] = 1;
    if (broken == 3) shapes.rows[0] = 17;
    if (broken == 4) shapes.palette = 2;
    __asm__ volatile("" ::"r"(&shapes) : "memory");
    _tile_loadconfig(&shapes);
    _tile_zero(0);
    if (broken == 5) _tile_zero(6);
    if (broken == 6) _tile_stored(1, memory, 64);
    _tile_loadd(1, memory, 64);
    if (broken == 7) _tile_dpbsud(0, 1, 2);
    _tile_loadd(2, memory, 64);
    _tile_loadd(3, memory, 64);
    if (broken == 8) _tile_dpbsud(0, 3, 2);
    if (broken == 9) _tile_dpbf16ps(0, 1, 3);
    if (broken == 10) __asm__ volatile(".byte 0xc4, 0xe2, 0x72, 0x5c, 0xc1");  // tdpbf16ps of 0, 1, 1: no assembler has it
    _tile_dpbsud(0, 1, 2);
    _tile_dpbssd(0, 1, 2);
    _tile_dpbf16ps(0, 1, 2);
    if (broken == 11) return 0;
    _tile_release();
    if (broken == 12) _tile_release();
    if (broken == 13) __builtin_trap();
    return 0;
}
