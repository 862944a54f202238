// The state that AMX adds to a thread, and what its instructions do to it: the operation sections of Intel's
// Software Developer's Manual, volume 2. Palette 1, the only one there is.
#pragma once

#include <cstdint>

namespace amx_emulator {

constexpr int kTiles = 8, kRows = 16, kRowBytes = 64;

struct Tiles {
    uint8_t palette;  // 0: not configured
    uint8_t start_row;
    uint8_t rows[kTiles];
    uint16_t row_bytes[kTiles];
    alignas(64) uint8_t data[kTiles][kRows][kRowBytes];
};

// Each returns null, or the reason why the processor would raise #UD or #GP; the state is unchanged then.
// Tile numbers are below kTiles.
const char* load_config(Tiles& tiles, const uint8_t* memory);  // 64 bytes
void store_config(const Tiles& tiles, uint8_t* memory);
void release(Tiles& tiles);
const char* zero(Tiles& tiles, int tile);
const char* load(Tiles& tiles, int tile, const uint8_t* memory, int64_t stride);
const char* store(const Tiles& tiles, int tile, uint8_t* memory, int64_t stride);
// c += a x b. Pairs of bf16 into f32, quadruples of bytes into int32 that wraps around.
const char* dot_bf16(Tiles& tiles, int c, int a, int b);
const char* dot_int8(Tiles& tiles, int c, int a, int b, bool a_signed, bool b_signed);

}  // namespace amx_emulator
