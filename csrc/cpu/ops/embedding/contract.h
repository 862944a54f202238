// Rows picked by index: a token's embedding from the packed table, or rows of an activation.
#pragma once

#include "cpu/kernel.h"

namespace pelton::cpu {

struct Contract;

// embedding: out[r] = table[ids[r]] as f32.
// A quantized row is self-contained: codes (two per byte, low nibble first, when stored in 4 bits),
// then scales, then minima if any; rows are padded to a multiple of 4 bytes.
namespace embedding {
enum Operands { kOut, kTable, kIds };
enum Ints { kRowsDim, kCols, kLdOut, kVocab, kFormat, kBits, kGroupSize, kHasMin, kScaleIsF32, kOffset };
enum Format { kF32, kBf16, kF16, kQuantized };
}  // namespace embedding
extern const Contract kEmbedding;

// take_rows: out[n] = x[indices[n]]
namespace take_rows {
enum Operands { kOut, kX, kIndices };
enum Ints { kCols, kLdOut, kLdX };
}  // namespace take_rows
extern const Contract kTakeRows;

// Bytes of one packed table row.
int64_t embedding_row_bytes(const int64_t* ints);

}  // namespace pelton::cpu
