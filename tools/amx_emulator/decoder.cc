#include "decoder.h"

#include <cstring>

namespace amx_emulator {
namespace {

enum Prefix { kNone, k66, kF3, kF2 };  // VEX.pp

struct Memory {
    bool has_sib;
    uint64_t address;
    int64_t stride;
};

template <class T>
T take(const uint8_t*& p) {
    T value;
    std::memcpy(&value, p, sizeof(value));
    p += sizeof(value);
    return value;
}

// ModRM has been read; `p` is behind it and ends up behind the displacement. None of the instructions has an
// immediate, so that is also where the next one starts.
Memory memory_operand(const Registers& registers, int mod, int rm, bool vex_x, bool vex_b, const uint8_t*& p) {
    Memory memory = {rm == 4, 0, 0};
    bool has_base = true;
    int base = rm;
    if (memory.has_sib) {
        const uint8_t sib = take<uint8_t>(p);
        base = sib & 7;
        const int index = (sib >> 3 & 7) + 8 * vex_x;
        if (index != 4) memory.stride = static_cast<int64_t>(registers.general[index] << (sib >> 6));
        has_base = base != 5 || mod != 0;
    }
    const bool ip_relative = !memory.has_sib && rm == 5 && mod == 0;
    if (ip_relative) has_base = false;
    if (has_base) memory.address = registers.general[base + 8 * vex_b];
    if (mod == 1) {
        memory.address += static_cast<uint64_t>(int64_t{take<int8_t>(p)});
    } else if (mod == 2 || !has_base) {
        memory.address += static_cast<uint64_t>(int64_t{take<int32_t>(p)});
    }
    if (ip_relative) memory.address += reinterpret_cast<uint64_t>(p);
    return memory;
}

}  // namespace

const char* name_of(Op op) {
    static const char* const names[] = {"ldtilecfg", "sttilecfg",   "tilerelease", "tilezero",
                                        "tileloadd", "tileloaddt1", "tilestored",  "tdpbf16ps",
                                        "tdpbssd",   "tdpbsud",     "tdpbusd",     "tdpbuud"};
    return names[static_cast<int>(op)];
}

bool decode(const Registers& registers, Instruction& instruction, const char*& fault) {
    const uint8_t* const start = reinterpret_cast<const uint8_t*>(registers.ip);
    const uint8_t* p = start;
    fault = nullptr;
    bool segment = false, short_address = false;
    for (;; ++p) {  // 2e, 36, 3e and 26 mean nothing in 64-bit mode
        if (*p == 0x64 || *p == 0x65) {
            segment = true;
        } else if (*p == 0x67) {
            short_address = true;
        } else if (*p != 0x2e && *p != 0x36 && *p != 0x3e && *p != 0x26) {
            break;
        }
        if (p - start == 10) return false;
    }
    if (*p++ != 0xc4) return false;  // there is no two-byte VEX with the 0F38 map
    const uint8_t vex1 = take<uint8_t>(p);
    if ((vex1 & 0x1f) != 2) return false;  // map 0F38
    const uint8_t vex2 = take<uint8_t>(p);
    const uint8_t opcode = take<uint8_t>(p);
    const bool config = opcode == 0x49, memory_op = opcode == 0x4b, bf16 = opcode == 0x5c, int8 = opcode == 0x5e;
    if (!config && !memory_op && !bf16 && !int8) return false;

    const bool vex_r = !(vex1 & 0x80), vex_x = !(vex1 & 0x40), vex_b = !(vex1 & 0x20);
    const int vvvv = ~vex2 >> 3 & 15, prefix = vex2 & 3;
    const uint8_t modrm = take<uint8_t>(p);
    const int mod = modrm >> 6, reg = modrm >> 3 & 7, rm = modrm & 7;
    instruction = {};
    instruction.c = reg;
    instruction.a = rm;
    instruction.b = vvvv & 7;
    if (vex2 & 0x80) fault = "#UD: VEX.W must be 0";
    if (vex2 & 0x04) fault = "#UD: VEX.L must be 0";
    if (vex_r && !fault) fault = "#UD: there is no tile above 7 (VEX.R)";

    if (bf16 || int8) {
        static const Op products[] = {Op::kTdpbuud, Op::kTdpbusd, Op::kTdpbsud, Op::kTdpbssd};  // by prefix
        instruction.op = bf16 ? Op::kTdpbf16ps : products[prefix];
        if (bf16 && prefix != kF3 && !fault) fault = "not emulated: 0F38 5C with another prefix (AMX-FP16 or later)";
        if (mod != 3 && !fault) fault = "#UD: a product has no memory operand";
        if ((vex_b || vvvv > 7) && !fault) fault = "#UD: there is no tile above 7 (VEX.B or VEX.vvvv)";
        instruction.length = static_cast<int>(p - start);
        return true;
    }
    if (vvvv != 0 && !fault) fault = "#UD: VEX.vvvv must be 1111b";
    if (mod == 3) {
        instruction.length = static_cast<int>(p - start);
        instruction.op = prefix == kF2 ? Op::kTilezero : Op::kTilerelease;
        const bool known = config && ((prefix == kNone && modrm == 0xc0) || (prefix == kF2 && rm == 0));
        if (!known && !fault) fault = "#UD: no such AMX instruction";
        return true;
    }
    if (config) {
        instruction.op = prefix == k66 ? Op::kSttilecfg : Op::kLdtilecfg;
        if ((prefix != kNone && prefix != k66) || reg != 0) {
            fault = "#UD: no such AMX instruction";
        }
    } else {
        instruction.op = prefix == kF3 ? Op::kTilestored : prefix == k66 ? Op::kTileloaddt1 : Op::kTileloadd;
        if (prefix == kNone) fault = "#UD: no such AMX instruction";
    }
    const Memory memory = memory_operand(registers, mod, rm, vex_x, vex_b, p);
    // For a tile the index register is the stride between rows; for a configuration it is part of the address.
    instruction.address = memory.address + (config ? static_cast<uint64_t>(memory.stride) : 0);
    instruction.stride = memory.stride;
    instruction.length = static_cast<int>(p - start);
    if (memory_op && !memory.has_sib && !fault) fault = "#UD: a tile's memory operand needs a SIB byte";
    if ((segment || short_address) && !fault) fault = "not emulated: a memory operand with an FS, GS or 67h prefix";
    return true;
}

}  // namespace amx_emulator
