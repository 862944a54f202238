// The VEX encodings of AMX-TILE, AMX-BF16 and AMX-INT8 in 64-bit mode.
#pragma once

#include <cstdint>

namespace amx_emulator {

enum class Op {
    kLdtilecfg,
    kSttilecfg,
    kTilerelease,
    kTilezero,
    kTileloadd,
    kTileloaddt1,
    kTilestored,
    kTdpbf16ps,
    kTdpbssd,
    kTdpbsud,
    kTdpbusd,
    kTdpbuud
};
const char* name_of(Op op);

struct Registers {
    uint64_t general[16];  // in the order of their encoding: rax, rcx, rdx, rbx, rsp, rbp, rsi, rdi, r8 ...
    uint64_t ip;
};

struct Instruction {
    Op op;
    int length;        // bytes
    int c, a, b;       // tiles: the one named in ModRM.reg, ModRM.rm and VEX.vvvv
    uint64_t address;  // base and displacement, and the index for a configuration
    int64_t stride;    // index and scale; 0 without an index
};

// False if the bytes at the instruction pointer are no AMX instruction. True with `fault` set if they are one
// that the processor would refuse or that is not emulated.
bool decode(const Registers& registers, Instruction& instruction, const char*& fault);

}  // namespace amx_emulator
