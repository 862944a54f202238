// AMX tiles: eight registers of up to 16 rows of 64 bytes, whose shapes the thread configures before use.
// Include from files of the tier amx only. Inline assembly instead of intrinsics: GCC 12's own hide from the
// optimizer that ldtilecfg reads all 64 bytes and that a load reads memory, so it drops or moves the stores
// before them.
#pragma once

#include "cpu/simd.h"

#if defined(__AMX_TILE__) && defined(__AMX_BF16__) && defined(__AMX_INT8__)

namespace pelton::cpu::PELTON_ISA {
namespace {

constexpr int kAmxRows = 16, kAmxRowBytes = 64;

template <int kTile>
PELTON_INLINE void tile_zero() {
    __asm__ volatile("tilezero %%tmm%c0" ::"i"(kTile));
}

// Tiles 0 to 3, the results in every shape of AmxTiles.
PELTON_INLINE void tile_zero_results() {
    tile_zero<0>();
    tile_zero<1>();
    tile_zero<2>();
    tile_zero<3>();
}

// Rows `stride` bytes apart.
template <int kTile>
PELTON_INLINE void tile_load(const char* p, int64_t stride) {
    __asm__ volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(p), "r"(stride), "i"(kTile) : "memory");
}

template <int kTile>
PELTON_INLINE void tile_store(char* p, int64_t stride) {
    __asm__ volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(p), "r"(stride), "i"(kTile) : "memory");
}

// Products c += a x b of tiles, `b` with the elements that are summed interleaved: pairs of bf16 (two chains
// of f32, even and odd, of which the sum is added to c) or quadruples of bytes (int32, exact).
struct AmxBf16 {
    template <int kC, int kA, int kB>
    static PELTON_INLINE void dot() {
        __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kC), "i"(kA), "i"(kB));
    }
};

struct AmxInt8 {  // signed x unsigned
    template <int kC, int kA, int kB>
    static PELTON_INLINE void dot() {
        __asm__ volatile("tdpbsud %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kC), "i"(kA), "i"(kB));
    }
};

struct AmxSigned {  // signed x signed
    template <int kC, int kA, int kB>
    static PELTON_INLINE void dot() {
        __asm__ volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kC), "i"(kA), "i"(kB));
    }
};

struct AmxUnsigned {  // unsigned x signed
    template <int kC, int kA, int kB>
    static PELTON_INLINE void dot() {
        __asm__ volatile("tdpbusd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kC), "i"(kA), "i"(kB));
    }
};

// The calling thread's tiles for the length of a stage. At the end they are released: a thread that holds
// tiles makes every context switch save 8 KB more, and thread 0 of the pool belongs to the caller.
// Configuring clears all tiles and costs some hundred cycles, so it is left out when the shape stays.
class AmxTiles {
public:
    AmxTiles() : key_(0) {}
    ~AmxTiles() {
        if (key_) __asm__ volatile("tilerelease");
    }
    AmxTiles(const AmxTiles&) = delete;
    AmxTiles& operator=(const AmxTiles&) = delete;

    // A block of 2 x 2 results: tiles 0 and 1 are `upper` x 16, 2 and 3 `lower` x 16; 4 and 5 their first
    // factors of `bytes` per row, 6 and 7 second factors. `bytes` is a multiple of 4.
    PELTON_INLINE void shape_pair(int upper, int lower, int bytes) {
        if (!changes(upper, lower, bytes)) return;
        Config config = {};
        config.palette = 1;
        for (int t = 0; t < 4; ++t) config.set(t, t < 2 ? upper : lower, kAmxRowBytes);
        config.set(4, upper, bytes);
        config.set(5, lower, bytes);
        config.set(6, bytes / 4, kAmxRowBytes);
        config.set(7, bytes / 4, kAmxRowBytes);
        load(config);
    }

    // A block of 1 x 4 results: tiles 0 to 3 are `rows` x 16, 4 their first factor, 5 to 7 second factors.
    PELTON_INLINE void shape_single(int rows, int bytes) {
        if (!changes(rows, 0, bytes)) return;
        Config config = {};
        config.palette = 1;
        for (int t = 0; t < 4; ++t) config.set(t, rows, kAmxRowBytes);
        config.set(4, rows, bytes);
        for (int t = 5; t < 8; ++t) config.set(t, bytes / 4, kAmxRowBytes);
        load(config);
    }

private:
    struct alignas(64) Config {  // as ldtilecfg wants it
        uint8_t palette, start_row, reserved[14];
        uint16_t row_bytes[16];
        uint8_t rows[16];
        PELTON_INLINE void set(int tile, int num_rows, int bytes) {
            rows[tile] = static_cast<uint8_t>(num_rows);
            row_bytes[tile] = static_cast<uint16_t>(bytes);
        }
    };
    static_assert(sizeof(Config) == 64, "the processor reads 64 bytes");

    PELTON_INLINE bool changes(int upper, int lower, int bytes) {
        const uint32_t key = static_cast<uint32_t>(upper << 16 | lower << 8 | bytes);
        const bool change = key != key_;
        key_ = key;
        return change;
    }
    static PELTON_INLINE void load(const Config& config) { __asm__ volatile("ldtilecfg %0" ::"m"(config)); }

    uint32_t key_;  // the shape in force, 0 before the first
};

}  // namespace
}  // namespace pelton::cpu::PELTON_ISA

#endif
