// Covering rows with register tiles.
#pragma once

#include "cpu/simd.h"

namespace pelton::cpu::PELTON_ISA {
namespace {

// Calls f<rows>(first row) for register tiles of at most kMost rows that cover `rows` rows. The last two
// are of equal height, as a tile of one or two rows uses the weights it loads poorly.
template <int kMost, class F>
PELTON_INLINE void for_row_tiles(int64_t rows, F f) {
    for (int64_t m = 0; m < rows;) {
        const int64_t left = rows - m;
        const int64_t height = left >= 2 * kMost || left == kMost ? kMost : left > kMost ? (left + 1) / 2 : left;
        switch (height) {
            case 1:
                f.template operator()<1>(m);
                break;
            case 2:
                f.template operator()<(kMost > 2 ? 2 : kMost)>(m);
                break;
            case 3:
                f.template operator()<(kMost > 3 ? 3 : kMost)>(m);
                break;
            case 4:
                f.template operator()<(kMost > 4 ? 4 : kMost)>(m);
                break;
            case 5:
                f.template operator()<(kMost > 5 ? 5 : kMost)>(m);
                break;
            default:
                f.template operator()<kMost>(m);
        }
        m += height;
    }
}

}  // namespace
}  // namespace pelton::cpu::PELTON_ISA
