// Multiplies made-up codes with made-up rows by a library of quasar, and prints the products' bits for 1 to 3 threads:
// what one system's library computes is compared with another's (`other_systems.py`).

#include <cstdint>
#include <cstdio>
#include <cstring>
#include <vector>

#ifdef _WIN32
#include <windows.h>
static void* find(const char* library, const char* name) {
    const HMODULE module = LoadLibraryA(library);
    return module ? reinterpret_cast<void*>(GetProcAddress(module, name)) : nullptr;
}
#else
#include <dlfcn.h>
static void* find(const char* library, const char* name) {
    void* module = dlopen(library, RTLD_NOW);
    return module ? dlsym(module, name) : nullptr;
}
#endif

constexpr int INPUTS = 256, OUTPUTS = 96, GROUPS = 2, ROWS = 7, BLOCK = 32, BITS = 4;
constexpr size_t HEADER = 128, STREAM = HEADER + INPUTS / GROUPS * BLOCK * BITS / 8, AHEAD = 65536;

static uint32_t next() {  // numbers that are the same everywhere
    static uint32_t state = 1;
    state = state * 1664525u + 1013904223u;
    return state >> 16;
}

// Scales near 1/16 in float16 and zeros of 8, for each half of a block, then the codes.
static void fill(uint8_t* stream) {
    for (size_t i = 0; i < STREAM; ++i) stream[i] = uint8_t(next());
    for (size_t half = 0; half < HEADER; half += HEADER / 2)
        for (int i = 0; i < BLOCK / 2; ++i) {
            const uint16_t scale = uint16_t(0x2c00 + (next() & 255));
            const int16_t zero = 8;
            std::memcpy(stream + half + 2 * i, &scale, 2);
            std::memcpy(stream + half + HEADER / 4 + 2 * i, &zero, 2);
        }
}

int main(int, char** arguments) {
    using Multiply = void (*)(const void*, const void*, void*, int, int, int, int, int, int, int, int);
    const auto multiply = reinterpret_cast<Multiply>(find(arguments[1], "quasar_multiply_codes"));
    if (!multiply) return std::puts("the library cannot be loaded"), 1;
    std::vector<uint8_t> memory(OUTPUTS / BLOCK * GROUPS * STREAM + AHEAD);
    uint8_t* codes = memory.data() + (64 - reinterpret_cast<uintptr_t>(memory.data()) % 64);
    for (int at = 0; at < OUTPUTS / BLOCK * GROUPS; ++at) fill(codes + at * STREAM);
    std::vector<float> x(ROWS * INPUTS), y(ROWS * OUTPUTS);
    for (float& value : x) value = float(int(next() & 2047) - 1024) / 512;
    for (int threads = 1; threads <= 3; ++threads) {
        multiply(x.data(), codes, y.data(), ROWS, INPUTS, OUTPUTS, GROUPS, INPUTS / GROUPS, BITS, 0, threads);
        for (const float value : y) {
            uint32_t bits;
            std::memcpy(&bits, &value, sizeof bits);
            std::printf("%08x", unsigned(bits));
        }
        std::puts("");
    }
}
