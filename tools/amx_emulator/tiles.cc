#include "tiles.h"

#include <immintrin.h>

#include <algorithm>
#include <cstring>

namespace amx_emulator {
namespace {

bool any(const uint8_t* bytes, int count) {
    return std::any_of(bytes, bytes + count, [](uint8_t byte) { return byte != 0; });
}

const char* check_tile(const Tiles& tiles, int tile) {
    if (!tiles.palette) return "#UD: tiles are not configured (no ldtilecfg before, or a tilerelease since)";
    if (!tiles.rows[tile]) return "#UD: this tile has no rows in the configuration";
    return nullptr;
}

void clear_rows(Tiles& tiles, int tile, int from) {
    std::memset(tiles.data[tile][from], 0, static_cast<size_t>(kRows - from) * kRowBytes);
}

const char* check_product(const Tiles& tiles, int c, int a, int b) {
    for (int tile : {c, a, b}) {
        if (const char* fault = check_tile(tiles, tile)) return fault;
    }
    if (c == a || a == b || c == b) return "#UD: the three tiles of a product must differ";
    for (int tile : {c, a, b}) {
        if (tiles.row_bytes[tile] % 4) return "#UD: bytes per row must be a multiple of 4";
    }
    if (tiles.rows[c] != tiles.rows[a]) return "#UD: result and first factor have unlike numbers of rows";
    if (tiles.row_bytes[c] != tiles.row_bytes[b]) return "#UD: result and second factor have unlike bytes per row";
    if (tiles.row_bytes[a] / 4 != tiles.rows[b]) {
        return "#UD: the first factor's elements per row are not the second factor's rows";
    }
    return nullptr;
}

// The processor's own FMA in the mode that the manual prescribes: to nearest even, subnormals are zero on
// the way in and out, nothing trapped. Not inlined, so that no arithmetic moves out of the mode.
__attribute__((noinline, target("avx2,fma"))) void dot_bf16_rows(Tiles& tiles, int c, int a, int b) {
    const __m256i upper = _mm256_set1_epi32(static_cast<int>(0xffff0000u));
    const int pairs = tiles.row_bytes[a] / 4;
    for (int m = 0; m < tiles.rows[c]; ++m) {
        for (int half = 0; half < kRowBytes; half += 32) {
            __m256 even = _mm256_setzero_ps(), odd = _mm256_setzero_ps();
            for (int k = 0; k < pairs; ++k) {
                int pair;
                std::memcpy(&pair, &tiles.data[a][m][4 * k], 4);
                const __m256i x = _mm256_set1_epi32(pair);
                const __m256i y = _mm256_load_si256(reinterpret_cast<const __m256i*>(&tiles.data[b][k][half]));
                even = _mm256_fmadd_ps(_mm256_castsi256_ps(_mm256_slli_epi32(x, 16)),
                                       _mm256_castsi256_ps(_mm256_slli_epi32(y, 16)), even);
                odd = _mm256_fmadd_ps(_mm256_castsi256_ps(_mm256_and_si256(x, upper)),
                                      _mm256_castsi256_ps(_mm256_and_si256(y, upper)), odd);
            }
            float* to = reinterpret_cast<float*>(&tiles.data[c][m][half]);
            _mm256_store_ps(to, _mm256_add_ps(_mm256_load_ps(to), _mm256_add_ps(even, odd)));
        }
        std::memset(&tiles.data[c][m][tiles.row_bytes[c]], 0, kRowBytes - tiles.row_bytes[c]);
    }
    clear_rows(tiles, c, tiles.rows[c]);
    tiles.start_row = 0;
}

// Columns in the inner loop, which the compiler makes vectors of; those beyond the tile are cleared below.
template <class A, class B>
void dot_int8_rows(Tiles& tiles, int c, int a, int b) {
    for (int m = 0; m < tiles.rows[c]; ++m) {
        uint32_t total[kRowBytes / 4];
        std::memcpy(total, tiles.data[c][m], kRowBytes);
        for (int k = 0; k < tiles.row_bytes[a] / 4; ++k) {
            A x[4];
            B y[kRowBytes];
            std::memcpy(x, &tiles.data[a][m][4 * k], 4);
            std::memcpy(y, tiles.data[b][k], kRowBytes);
            for (int n = 0; n < kRowBytes / 4; ++n) {
                total[n] += static_cast<uint32_t>(x[0] * y[4 * n] + x[1] * y[4 * n + 1] + x[2] * y[4 * n + 2] +
                                                  x[3] * y[4 * n + 3]);
            }
        }
        std::memcpy(tiles.data[c][m], total, tiles.row_bytes[c]);
        std::memset(&tiles.data[c][m][tiles.row_bytes[c]], 0, kRowBytes - tiles.row_bytes[c]);
    }
    clear_rows(tiles, c, tiles.rows[c]);
    tiles.start_row = 0;
}

}  // namespace

const char* load_config(Tiles& tiles, const uint8_t* memory) {
    const uint8_t palette = memory[0];
    if (palette == 0) {
        release(tiles);
        return nullptr;
    }
    if (palette != 1) return "#GP: the palette must be 0 or 1";
    if (any(memory + 2, 14) || any(memory + 32, 16) || any(memory + 56, 8)) {
        return "#GP: reserved bytes of the configuration must be zero (those of tiles 8 to 15 included)";
    }
    uint16_t row_bytes[kTiles];
    std::memcpy(row_bytes, memory + 16, sizeof(row_bytes));
    for (int i = 0; i < kTiles; ++i) {
        if (memory[48 + i] > kRows) return "#GP: a tile has more than 16 rows";
        if (row_bytes[i] > kRowBytes) return "#GP: a tile has more than 64 bytes per row";
        if (!memory[48 + i] != !row_bytes[i]) return "#GP: a tile has rows without bytes or bytes without rows";
    }
    tiles.palette = palette;
    tiles.start_row = memory[1];
    std::memcpy(tiles.row_bytes, row_bytes, sizeof(row_bytes));
    std::memcpy(tiles.rows, memory + 48, kTiles);
    std::memset(tiles.data, 0, sizeof(tiles.data));
    return nullptr;
}

void store_config(const Tiles& tiles, uint8_t* memory) {
    std::memset(memory, 0, 64);
    if (!tiles.palette) return;
    memory[0] = tiles.palette;
    memory[1] = tiles.start_row;
    std::memcpy(memory + 16, tiles.row_bytes, sizeof(tiles.row_bytes));
    std::memcpy(memory + 48, tiles.rows, kTiles);
}

void release(Tiles& tiles) { std::memset(&tiles, 0, sizeof(tiles)); }

const char* zero(Tiles& tiles, int tile) {
    if (const char* fault = check_tile(tiles, tile)) return fault;
    clear_rows(tiles, tile, 0);
    tiles.start_row = 0;
    return nullptr;
}

const char* load(Tiles& tiles, int tile, const uint8_t* memory, int64_t stride) {
    if (const char* fault = check_tile(tiles, tile)) return fault;
    const int bytes = tiles.row_bytes[tile];
    for (int row = tiles.start_row; row < tiles.rows[tile]; ++row) {
        std::memcpy(tiles.data[tile][row], memory + row * stride, bytes);
        std::memset(tiles.data[tile][row] + bytes, 0, kRowBytes - bytes);
    }
    clear_rows(tiles, tile, tiles.rows[tile]);
    tiles.start_row = 0;
    return nullptr;
}

const char* store(const Tiles& tiles, int tile, uint8_t* memory, int64_t stride) {
    if (const char* fault = check_tile(tiles, tile)) return fault;
    for (int row = tiles.start_row; row < tiles.rows[tile]; ++row) {
        std::memcpy(memory + row * stride, tiles.data[tile][row], tiles.row_bytes[tile]);
    }
    return nullptr;
}

const char* dot_bf16(Tiles& tiles, int c, int a, int b) {
    if (const char* fault = check_product(tiles, c, a, b)) return fault;
    constexpr unsigned kMaskAll = 0x1f80, kFlushResults = 0x8000, kInputsAreZero = 0x0040;
    const unsigned mode = _mm_getcsr();
    _mm_setcsr(kMaskAll | kFlushResults | kInputsAreZero);
    dot_bf16_rows(tiles, c, a, b);
    _mm_setcsr(mode);
    return nullptr;
}

const char* dot_int8(Tiles& tiles, int c, int a, int b, bool a_signed, bool b_signed) {
    if (const char* fault = check_product(tiles, c, a, b)) return fault;
    if (a_signed) {
        b_signed ? dot_int8_rows<int8_t, int8_t>(tiles, c, a, b) : dot_int8_rows<int8_t, uint8_t>(tiles, c, a, b);
    } else {
        b_signed ? dot_int8_rows<uint8_t, int8_t>(tiles, c, a, b) : dot_int8_rows<uint8_t, uint8_t>(tiles, c, a, b);
    }
    return nullptr;
}

}  // namespace amx_emulator
