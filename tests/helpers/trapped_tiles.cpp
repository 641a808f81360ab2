// Runs the instructions of AMX's tiles where the processor has none: each is an illegal one there, whose signal is caught,
// and what it should do is done in C++ (`emulated_tiles.h`). So what runs is the code that a processor with tiles would run.
//
// Encodings as in Intel's manual, volume 2: three bytes of VEX, the opcode, ModRM, and where memory is named SIB and a
// displacement. Linux on x86-64.

#include "emulated_tiles.h"

#include <signal.h>
#include <ucontext.h>

namespace {

namespace tiles = emulated_tiles;
struct sigaction others;  // who hears of other illegal instructions

// A general register by the number that instructions give it.
int64_t value_of(const greg_t* registers, int number) {
    constexpr int PLACES[] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI,
                              REG_R8,  REG_R9,  REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15};
    return registers[PLACES[number]];
}

struct Instruction {
    enum Prefix { NONE, P66, F3, F2 };
    bool is_known = false, is_in_memory = false;
    int prefix, opcode, reg, rm, second;  // `second`: of VEX.vvvv
    char* address = nullptr;
    int64_t stride = 0;
    int length;

    Instruction(const uint8_t* at, const greg_t* registers) {
        const int b1 = at[1], b2 = at[2];
        if (at[0] != 0xc4 || (b1 & 31) != 2 || (b2 & 0x84)) return;  // VEX.128.0F38.W0
        is_known = true, prefix = b2 & 3, opcode = at[3], second = ~b2 >> 3 & 15;
        const int mod = at[4] >> 6, low = at[4] & 7;
        reg = (at[4] >> 3 & 7) + (b1 & 0x80 ? 0 : 8), rm = low + (b1 & 0x20 ? 0 : 8), length = 5;
        if (mod == 3) return;
        is_in_memory = true;
        const bool has_index = low == 4;
        int base = rm;
        if (has_index) {
            const int sib = at[length++], index = (sib >> 3 & 7) + (b1 & 0x40 ? 0 : 8);
            base = (sib & 7) + (b1 & 0x20 ? 0 : 8);
            if (index != 4) stride = value_of(registers, index) << (sib >> 6);
        }
        const bool is_without_base = mod == 0 && (base & 7) == 5;
        int32_t displacement = 0;
        if (mod == 1) displacement = int8_t(at[length++]);
        if (mod == 2 || is_without_base) std::memcpy(&displacement, at + length, 4), length += 4;
        int64_t from = is_without_base ? (has_index ? 0 : int64_t(at) + length) : value_of(registers, base);
        address = reinterpret_cast<char*>(from + displacement);
    }
};

// Whether it was an instruction of tiles, which has been done.
bool run(const Instruction& one) {
    if (!one.is_known) return false;
    const int kind = one.opcode << 4 | one.prefix << 1 | one.is_in_memory;
    switch (kind) {
        case 0x49 << 4 | Instruction::NONE << 1 | 1: return tiles::configure(one.address), true;
        case 0x49 << 4 | Instruction::NONE << 1: return tiles::release(), true;
        case 0x49 << 4 | Instruction::F2 << 1: return tiles::zero(one.reg), true;
        case 0x4b << 4 | Instruction::F2 << 1 | 1: return tiles::load(one.reg, one.address, one.stride), true;
        case 0x4b << 4 | Instruction::F3 << 1 | 1: return tiles::store(one.reg, one.address, one.stride), true;
        case 0x5e << 4 | Instruction::F2 << 1: return tiles::multiply_codes<int8_t>(one.reg, one.rm, one.second), true;
        case 0x5e << 4 | Instruction::F3 << 1: return tiles::multiply_codes<uint8_t>(one.reg, one.rm, one.second), true;
        case 0x5c << 4 | Instruction::F3 << 1: return tiles::multiply_pairs(one.reg, one.rm, one.second), true;
        default: return false;
    }
}

// Those that follow one another are run at once: a signal takes longer than all of them.
void on_illegal(int, siginfo_t*, void* context) {
    greg_t* registers = static_cast<ucontext_t*>(context)->uc_mcontext.gregs;
    for (int count = 0;; ++count) {
        const Instruction one(reinterpret_cast<const uint8_t*>(registers[REG_RIP]), registers);
        if (run(one))
            registers[REG_RIP] += one.length;
        else if (count)
            return;
        else
            return void(sigaction(SIGILL, &others, nullptr));  // it comes once more, to them
    }
}

}  // namespace

extern "C" {

void catch_tiles() {
    struct sigaction own = {};
    own.sa_sigaction = on_illegal, own.sa_flags = SA_SIGINFO | SA_NODEFER;
    sigaction(SIGILL, &own, &others);
}

void let_tiles_go() { sigaction(SIGILL, &others, nullptr); }

// Whether this thread has tiles; how many products of tiles there were, of codes (0) and of bfloat16 (1).
int tiles_are_configured() { return tiles::own.are_configured; }
long tiles_multiplied(int kind) { return tiles::multiplied[kind]; }
}
