"""Products of few rows with group-quantized weights (:mod:`..packing`) or dense ones, and rows of codes as floats.

A tile of the weight is the left operand, rows of x are the columns of the right one: these may then be as few as 8, and
scales of the weight's rows are one number per row of the sums. Codes enter a product exactly; the sum of a group is
scaled in float32.

16-bit operands are made from units of two bytes of a tile: the codes of even columns in the low byte, of odd columns in
the high one, so the two halves of pairs of x are two products. All that happens to a unit happens in 16 bits: a code
becomes a float by being the fraction of a known power of two, which is subtracted.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ....graph.types import E4M3, E8M0, GroupQuant
from ..packing import PART, PackedWeight, chunk, is_signed, plane_bits
from .common import FUSED, INTERPRETED_CONSTEXPR, dot, from_e2m1, from_e4m3, next_power_of_2


class ProductTile(NamedTuple):
    """A program's rows of x and of the weight, programs along the columns, and what it is compiled with."""

    rows: int
    cols: int
    splits: int
    num_warps: int
    num_stages: int


@triton.jit
def _difference(a, b):
    """a - b of 16-bit floats where that is exact."""
    if INTERPRETED_CONSTEXPR:  # the interpreter takes bfloat16 for integers
        return (a.to(tl.float32) - b.to(tl.float32)).to(a.dtype)
    return a - b


@triton.jit
def _field(units, MOVE: tl.constexpr, MASK: tl.constexpr):
    """Bits of units (int16), moved to the right, or left if negative, and masked. MASK: of where they are then."""
    if MOVE == 0:
        return units & MASK
    if INTERPRETED_CONSTEXPR:
        return (units >> MOVE if MOVE > 0 else units << -MOVE) & MASK
    # Both units of a register at once: what crosses their border is masked. The compiler would shift them one by one.
    if MOVE > 0:
        moved = tl.inline_asm_elementwise(f"shr.b32 $0, $1, {MOVE};", "=r,r", [units], tl.int16, is_pure=True, pack=2)
    else:
        moved = tl.inline_asm_elementwise(f"shl.b32 $0, $1, {-MOVE};", "=r,r", [units], tl.int16, is_pure=True, pack=2)
    return moved & MASK


@triton.constexpr_function
def select_asm(move: int, mask: int, bits: int, flip: bool) -> str:
    """PTX of :func:`_selected`, for the two units of a register at once: what crosses their border is masked.

    One instruction masks and sets bits. The compiler would need two, and shift the units one by one.
    """
    select = f"{mask * 0x10001:#x}, {bits * 0x10001:#x}, {0x6A if flip else 0xEA:#x};"
    if move == 0:
        return f"lop3.b32 $0, $1, {select}"
    return f"{{ .reg .b32 t; {'shr' if move > 0 else 'shl'}.b32 t, $1, {abs(move)}; lop3.b32 $0, t, {select} }}"


@triton.jit
def _selected(units, MOVE: tl.constexpr, MASK: tl.constexpr, BITS: tl.constexpr, FLIP: tl.constexpr):
    """:func:`_field`, with BITS set, or flipped."""
    if INTERPRETED_CONSTEXPR:
        field = _field(units, MOVE, MASK)
        return field ^ BITS if FLIP else field | BITS
    asm: tl.constexpr = select_asm(MOVE, MASK, BITS, FLIP)
    return tl.inline_asm_elementwise(asm, "=r,r", [units], tl.int16, is_pure=True, pack=2)


@triton.jit
def _byte_integer(units, AT: tl.constexpr, SIGNED: tl.constexpr, FRACTION: tl.constexpr):
    """Of 8-bit codes at bit AT of units: c - 128 as a 16-bit float. SIGNED: c is stored less 128."""
    if FRACTION == 10:
        c = _selected(units, AT, 0xFF, 0x6480 if SIGNED else 0x6400, True)
        return _difference(c.to(tl.float16, bitcast=True), tl.full(c.shape, 1152.0, tl.float16))
    else:  # a fraction of 7 bits: 128 + the low ones, less 256 or, where the eighth is set, 128
        low = _selected(units, AT, 0x7F, 0x4300, False).to(tl.bfloat16, bitcast=True)
        eighth = _selected(units, AT, 0x80, 0x4300 if SIGNED else 0x4380, True)
        return _difference(low, eighth.to(tl.bfloat16, bitcast=True))


@triton.jit
def _integers(
    high, low, zero, HIGH_AT: tl.constexpr, LOW_AT: tl.constexpr, HIGH: tl.constexpr, LOW: tl.constexpr,
    ZERO: tl.constexpr, OFFSET: tl.constexpr, BITS: tl.constexpr, SIGNED: tl.constexpr, FRACTION: tl.constexpr,
):  # fmt: skip
    """Codes less zero, or OFFSET, as 16-bit floats, of units in which they begin at bits HIGH_AT and, if LOW, LOW_AT.

    zero: int16 that broadcasts.
    """
    HALF: tl.constexpr = tl.float16 if FRACTION == 10 else tl.bfloat16
    ONE: tl.constexpr = 1 << FRACTION  # whose last bit of fraction is 1
    BITS_OF_ONE: tl.constexpr = 0x6400 if FRACTION == 10 else 0x4300
    # What is subtracted is a constant tensor: the compiler then moves all this behind the load of units.
    if BITS == 8:
        value = _byte_integer(high, HIGH_AT, SIGNED, FRACTION)
        if ZERO:
            value = _difference(value, _byte_integer(zero, 0, False, FRACTION))
        elif not SIGNED:
            value = _difference(value, tl.full(high.shape, OFFSET - 128, HALF))
        return value
    c = _selected(high, HIGH_AT - LOW, ((1 << HIGH) - 1) << LOW if BITS < 7 else 0x7F, BITS_OF_ONE, False)
    if LOW:
        c |= _field(low, LOW_AT, (1 << LOW) - 1)
    value = c.to(HALF, bitcast=True)
    if ZERO:
        return _difference(value, (zero | BITS_OF_ONE).to(HALF, bitcast=True))
    return _difference(value, tl.full(high.shape, ONE + OFFSET, HALF))


@triton.jit
def _scaled(bits, POWER: tl.constexpr, FRACTION: tl.constexpr):
    """The 16-bit float of these bits, times 2**POWER."""
    if FRACTION == 10:
        return bits.to(tl.float16, bitcast=True) * tl.full(bits.shape, 2.0**POWER, tl.float16)
    elif INTERPRETED_CONSTEXPR:  # the interpreter has no small bfloat16, either
        return ((bits.to(tl.int32) << 16).to(tl.float32, bitcast=True) * 2.0**POWER).to(tl.bfloat16)
    else:
        return bits.to(tl.bfloat16, bitcast=True) * tl.full(bits.shape, 2.0**POWER, tl.bfloat16)


@triton.jit
def _floats(units, AT: tl.constexpr, BITS: tl.constexpr, FRACTION: tl.constexpr):
    """E4M3 or E2M1 codes, at bit AT of units, as 16-bit floats: exponent and fraction to their place, then the bias."""
    PLACE: tl.constexpr = FRACTION - (3 if BITS == 8 else 1)
    MASK: tl.constexpr = ((1 << (BITS - 1)) - 1) << PLACE
    BIAS: tl.constexpr = (15 if FRACTION == 10 else 127) - (7 if BITS == 8 else 1)
    sign = _field(units, AT + BITS - 16, 0x8000 - 0x10000)
    return _scaled(sign | _field(units, AT - PLACE, MASK), BIAS, FRACTION)


@triton.jit
def _codes(high, low, HIGH_AT: tl.constexpr, LOW_AT: tl.constexpr, HIGH: tl.constexpr, LOW: tl.constexpr):
    """Codes, uint8, at bits HIGH_AT of bytes, and LOW_AT of those of a second plane if LOW."""
    if HIGH == 8:
        return high
    if INTERPRETED_CONSTEXPR:
        c = (high >> HIGH_AT) & ((1 << HIGH) - 1)
        if LOW:
            c = (c << LOW) | ((low >> LOW_AT) & ((1 << LOW) - 1))
        return c
    # Four at once, as in _field.
    FIRST: tl.constexpr = ((1 << HIGH) - 1) * 0x01010101
    SECOND: tl.constexpr = ((1 << LOW) - 1) * 0x01010101
    if LOW:
        return tl.inline_asm_elementwise(
            f"{{ .reg .b32 t; shr.b32 t, $1, {HIGH_AT}; and.b32 t, t, {FIRST}; shl.b32 t, t, {LOW}; "
            f"shr.b32 $0, $2, {LOW_AT}; and.b32 $0, $0, {SECOND}; or.b32 $0, $0, t; }}",
            "=&r,r,r", [high, low], tl.uint8, is_pure=True, pack=4,
        )  # fmt: skip
    return tl.inline_asm_elementwise(
        f"shr.b32 $0, $1, {HIGH_AT}; and.b32 $0, $0, {FIRST};", "=r,r", [high], tl.uint8, is_pure=True, pack=4
    )


@triton.jit
def _factor(scale, KIND: tl.constexpr):
    """Float32 of stored scales."""
    if KIND == "e8m0":  # the exponent of a float; the lowest one is below the normal ones, the highest one is NaN
        bits = tl.where(scale == 0, 0x400000, scale.to(tl.int32) << 23)
        return tl.where(scale == 255, 0x7FC00000, bits).to(tl.float32, bitcast=True)
    if KIND == "e4m3":
        return tl.where((scale & 0x7F) == 0x7F, float("nan"), from_e4m3(scale).to(tl.float32))
    return scale.to(tl.float32)


@triton.jit
def _factors(ptr, outer_ptr, group, column, rows, n, OUTER: tl.constexpr, KIND: tl.constexpr):
    """Float32 scales (or minima) of a group, in which the column is."""
    scale = _factor(tl.load(ptr + group.to(tl.int64) * n + rows), KIND)
    if OUTER is not None:
        outer = column // OUTER if OUTER else 0
        scale = scale * tl.load(outer_ptr + outer * n + rows).to(tl.float32)
    return scale


@triton.jit
def _stored_factors(
    scale_ptr, minimum_ptr, outer_ptr, outer_minimum_ptr, x_scales_ptr, column, rows, x_rows, n, x_scales_stride, m,
    GROUP: tl.constexpr, X_GROUP: tl.constexpr, OUTER: tl.constexpr, MINIMUM: tl.constexpr, ZERO: tl.constexpr,
    ROWS: tl.constexpr, BY_X: tl.constexpr,
):  # fmt: skip
    """Of the group with the column, as stored: scale, minimum or zero point, the outer ones of both, x's scale.

    What there is not, or is not to be applied (ROWS: factors of the weight, BY_X: those of x), is anything.
    """
    scale, minimum, outer, outer_minimum, by = rows, rows, rows, rows, x_rows
    at = (column // GROUP if GROUP else 0 * column).to(tl.int64) * n + rows
    if MINIMUM or ZERO:
        minimum = tl.load(minimum_ptr + at)
    if ROWS:
        scale = tl.load(scale_ptr + at)
        if OUTER is not None:
            outer_at = (column // OUTER if OUTER else 0) * n + rows
            outer = tl.load(outer_ptr + outer_at)
            if MINIMUM:
                outer_minimum = tl.load(outer_minimum_ptr + outer_at)
    if BY_X:
        x_group = column // X_GROUP if X_GROUP else 0
        by = tl.load(x_scales_ptr + x_group * x_scales_stride + x_rows, mask=x_rows < m, other=0.0)
    return scale, minimum, outer, outer_minimum, by


@triton.jit
def _block_factors(
    scale_ptr, minimum_ptr, outer_ptr, outer_minimum_ptr, x_scales_ptr, column, rows, x_rows, n, x_scales_stride, m, k,
    GROUP: tl.constexpr, X_GROUP: tl.constexpr, OUTER: tl.constexpr, MINIMUM: tl.constexpr, ZERO: tl.constexpr,
    INT8: tl.constexpr, STEP: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """:func:`_stored_factors` of each STEP of the COLUMNS from this one on, what is applied within a row."""
    factors = ()
    for step in tl.static_range(COLUMNS // STEP):
        factors += (  # type: ignore[assignment]  # Triton has tuples grow
            _stored_factors(
                scale_ptr, minimum_ptr, outer_ptr, outer_minimum_ptr, x_scales_ptr,
                tl.minimum(column + step * STEP, k - 1), rows, x_rows, n, x_scales_stride, m, GROUP, X_GROUP, OUTER,
                MINIMUM and GROUP > 0, ZERO and (GROUP > 0 or not INT8), GROUP > 0, X_GROUP > 0,
            ),
        )  # fmt: skip
    return factors


@triton.jit
def _add_group(
    total, partial, sums, factors, OFFSET: tl.constexpr, OUTER: tl.constexpr, KIND: tl.constexpr, MINIMUM: tl.constexpr,
    ZERO: tl.constexpr, INT8: tl.constexpr, ROWS: tl.constexpr, BY_X: tl.constexpr,
):  # fmt: skip
    """total + partial [BLOCK_N, BLOCK_M], in float32, times the factors of its group, :func:`_stored_factors`.

    sums: of x in the group, the same in all rows, if there are minima (INT8: zero points) to multiply them with.
    """
    stored, stored_minimum, outer, outer_minimum, by = factors
    if ROWS:
        scale = _factor(stored, KIND)
        if OUTER is not None:
            scale *= outer.to(tl.float32)
        if INT8:
            if ZERO:
                partial -= sums * (stored_minimum.to(tl.int32) + OFFSET)[:, None]
            elif OFFSET:
                partial -= sums * OFFSET
        part = partial.to(tl.float32) * scale[:, None]
        if MINIMUM:
            minimum = _factor(stored_minimum, KIND)
            if OUTER is not None:
                minimum *= outer_minimum.to(tl.float32)
            if not BY_X:  # in this order products and sums are single instructions
                return total + part + sums.to(tl.float32) * minimum[:, None]
            part += sums.to(tl.float32) * minimum[:, None]
    else:
        part = partial.to(tl.float32)
    if BY_X:
        part *= by[None, :]
    return total + part


@triton.jit(do_not_specialize=["m", "tiles", "x_scales_stride"])
def _product_kernel(
    out_ptr, x_ptr, x_scales_ptr, high_ptr, low_ptr, scale_ptr, minimum_ptr, outer_ptr, outer_minimum_ptr, bias_ptr,
    m, n, k, tiles, out_stride, x_stride, x_scales_stride, tile_stride, row_stride, split_columns,
    X: tl.constexpr, FRACTION: tl.constexpr, BITS: tl.constexpr, HIGH: tl.constexpr, LOW: tl.constexpr,
    FLOATING: tl.constexpr, SIGNED: tl.constexpr, OFFSET: tl.constexpr, GROUP: tl.constexpr, X_GROUP: tl.constexpr,
    OUTER: tl.constexpr, KIND: tl.constexpr, MINIMUM: tl.constexpr, ZERO: tl.constexpr, PARTIAL: tl.constexpr,
    PART: tl.constexpr, STEP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A program per tile of rows of x and the weight, and split of the columns.

    X: "half" (x: pairs of 16-bit floats as int32), "e4m3" (pairs of codes as int16), "int8" or "float" (float32).
    FRACTION: bits of that of 16-bit operands, 10 for float16, 7 for bfloat16.
    X_GROUP: columns of x with one scale, 0 for all, -1 if it has none.
    high, low: planes of HIGH and LOW bits, as int16 beside pairs, else bytes. tiles: of the high plane in a row. PART:
    columns of a piece. STEP: columns that share factors. PARTIAL: sums go to the workspace ``out`` [splits, m, n].
    """
    PAIRS: tl.constexpr = X == "half" or X == "e4m3"
    INT8: tl.constexpr = X == "int8"
    UNITS: tl.constexpr = PART // 2 if PAIRS else PART
    HALVES: tl.constexpr = 2 if STEP < PART else 1
    SUMS: tl.constexpr = MINIMUM or (INT8 and (ZERO or OFFSET != 0))
    HALF: tl.constexpr = tl.float16 if FRACTION == 10 else tl.bfloat16
    OPERAND: tl.constexpr = tl.int8 if INT8 else (HALF if PAIRS else tl.float32)
    SUM: tl.constexpr = tl.int32 if INT8 else tl.float32
    # No factors before the end: there is one sum.
    WHOLE: tl.constexpr = GROUP == 0 and X_GROUP <= 0
    # Factors of a block are loaded while the one before is multiplied, unless they are too many for the registers.
    CARRIED: tl.constexpr = not LOW and (not INT8 or BLOCK_M <= 8)
    tl.static_assert(STEP >= PART or 2 * STEP == PART)

    tiles_m = tl.cdiv(m, BLOCK_M)
    program = tl.program_id(0)
    split = tl.program_id(1)
    x_rows = program % tiles_m * BLOCK_M + tl.arange(0, BLOCK_M)
    own = program // tiles_m * BLOCK_N + tl.arange(0, BLOCK_N)
    rows = tl.minimum(own, n - 1)  # no masks: what surplus rows yield is not stored
    unit = tl.arange(0, UNITS)
    at = rows.to(tl.int64)[:, None] * row_stride + unit[None, :]
    x_at = x_ptr + x_rows.to(tl.int64)[None, :] * x_stride + unit[:, None]
    first, last = split * split_columns, tl.minimum(k, (split + 1) * split_columns)
    ones = tl.full((BLOCK_N, UNITS), 1, OPERAND)

    total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    partial = tl.zeros((BLOCK_N, BLOCK_M), SUM)
    sums = tl.zeros((BLOCK_N, BLOCK_M), SUM)
    following = ()
    if CARRIED:
        following = _block_factors(
            scale_ptr, minimum_ptr, outer_ptr, outer_minimum_ptr, x_scales_ptr, first, rows, x_rows, n,
            x_scales_stride, m, k, GROUP, X_GROUP, OUTER, MINIMUM, ZERO, INT8, STEP, BLOCK_K,
        )  # fmt: skip
    for start in tl.range(first, last, BLOCK_K):
        if CARRIED:
            factors = following
            following = _block_factors(
                scale_ptr, minimum_ptr, outer_ptr, outer_minimum_ptr, x_scales_ptr, start + BLOCK_K, rows, x_rows, n,
                x_scales_stride, m, k, GROUP, X_GROUP, OUTER, MINIMUM, ZERO, INT8, STEP, BLOCK_K,
            )  # fmt: skip
        for part in tl.static_range(BLOCK_K // PART):
            column = start + part * PART
            if part * HIGH % 8 == 0:
                tile = tl.minimum(column // (PART * (8 // HIGH)), tiles - 1)
                high = tl.load(high_ptr + tile.to(tl.int64) * tile_stride + at)
            low = high
            if LOW:
                if part * LOW % 8 == 0:
                    low_tile = tl.minimum(column // (PART * (8 // LOW)), tiles * LOW // HIGH - 1)
                    low_units = tl.load(low_ptr + low_tile.to(tl.int64) * tile_stride + at)
                low = low_units
            if PAIRS:
                there = (x_rows < m)[None, :] & ((column >> 1) + unit < (k >> 1))[:, None]
                x = tl.load(x_at + (column >> 1), mask=there, other=0)
            else:
                there = (x_rows < m)[None, :] & (column + unit < k)[:, None]
                x = tl.load(x_at + column, mask=there, other=0)
            for half in tl.static_range(HALVES):
                share = column + half * STEP % PART  # a column of this half
                if CARRIED:
                    own_factors = factors[(part * PART + half * (PART // HALVES)) // STEP]  # type: ignore[var-annotated]
                elif ZERO and not INT8:
                    own_factors = _block_factors(
                        scale_ptr, minimum_ptr, outer_ptr, outer_minimum_ptr, x_scales_ptr, share, rows, x_rows, n,
                        x_scales_stride, m, k, GROUP, X_GROUP, OUTER, MINIMUM, ZERO, INT8, STEP, STEP,
                    )[0]  # fmt: skip
                zero = high
                if ZERO and not INT8:
                    zero = own_factors[1][:, None].to(tl.int16)
                for odd in tl.static_range(2 if PAIRS else 1):
                    if PAIRS:
                        if FLOATING:
                            w = _floats(high, part * HIGH % 8 + 8 * odd, BITS, FRACTION)
                        else:
                            w = _integers(
                                high, low, zero, part * HIGH % 8 + 8 * odd, part * LOW % 8 + 8 * odd, HIGH, LOW, ZERO,
                                OFFSET, BITS, SIGNED, FRACTION,
                            )  # fmt: skip
                        if X == "half":
                            y = (x >> (16 * odd)).to(tl.int16).to(HALF, bitcast=True)
                        else:
                            y = _floats(x, 8 * odd, 8, FRACTION)
                    else:
                        y = x
                        code = _codes(high, low, part * HIGH % 8, part * LOW % 8, HIGH, LOW)
                        if FLOATING:
                            w = (from_e4m3(code) if BITS == 8 else from_e2m1(code)).to(tl.float32)
                        elif INT8:  # 8-bit codes are less 128 here, whatever they are in memory
                            w = ((code ^ 0x80) if BITS == 8 and not SIGNED else code).to(tl.int8, bitcast=True)
                        else:
                            w = ((code ^ 0x80) if SIGNED else code).to(tl.float32)
                            w -= zero.to(tl.float32) if ZERO else OFFSET
                    if HALVES == 2:
                        inside = (unit >= UNITS // 2) == (half == 1)
                        y = tl.where(inside[:, None], y, tl.zeros(y.shape, y.dtype))
                    partial = dot(w, y, partial, True)
                    if SUMS:
                        sums = dot(ones, y, sums, True)
                if not WHOLE and (part * PART + (half + 1) * (PART // HALVES)) % STEP == 0:
                    if not CARRIED:  # nor held any longer than needed
                        own_factors = _block_factors(
                            scale_ptr, minimum_ptr, outer_ptr, outer_minimum_ptr, x_scales_ptr, share, rows, x_rows, n,
                            x_scales_stride, m, k, GROUP, X_GROUP, OUTER, MINIMUM, ZERO, INT8, STEP, STEP,
                        )[0]  # fmt: skip
                    total = _add_group(
                        total, partial, sums, own_factors, OFFSET, OUTER, KIND, MINIMUM, ZERO, INT8, GROUP > 0,
                        X_GROUP > 0,
                    )  # fmt: skip
                    partial = tl.zeros((BLOCK_N, BLOCK_M), SUM)
                    sums = tl.zeros((BLOCK_N, BLOCK_M), SUM)
    if WHOLE or GROUP == 0 or X_GROUP == 0:
        if not WHOLE:
            partial = total
        factors = _stored_factors(
            scale_ptr, minimum_ptr, outer_ptr, outer_minimum_ptr, x_scales_ptr, first, rows, x_rows, n, x_scales_stride,
            m, GROUP, X_GROUP, OUTER, MINIMUM and GROUP == 0, INT8 and ZERO and GROUP == 0, GROUP == 0, X_GROUP == 0,
        )  # fmt: skip
        total = _add_group(
            tl.zeros((BLOCK_N, BLOCK_M), tl.float32), partial, sums, factors, OFFSET, OUTER, KIND, MINIMUM, ZERO, INT8,
            GROUP == 0, X_GROUP == 0,
        )  # fmt: skip
    _store(out_ptr, total, bias_ptr, own, x_rows, split, m, n, out_stride, PARTIAL)


@triton.jit
def _store(out_ptr, total, bias_ptr, own, x_rows, split, m, n, out_stride, PARTIAL: tl.constexpr):
    """total [BLOCK_N, BLOCK_M] to the workspace, [splits, m, n], or with the bias to the output."""
    there = (own < n)[:, None] & (x_rows < m)[None, :]
    x_rows = x_rows.to(tl.int64)
    if PARTIAL:
        at = (split * m + x_rows)[None, :] * n + own[:, None]
    else:
        at = x_rows[None, :] * out_stride + own[:, None]
        if bias_ptr is not None:
            total += tl.load(bias_ptr + own, mask=own < n, other=0.0).to(tl.float32)[:, None]
    tl.store(out_ptr + at, total.to(out_ptr.dtype.element_ty), mask=there)


@triton.jit(do_not_specialize=["m"])
def _dense_kernel(
    out_ptr, x_ptr, weight_ptr, bias_ptr, m, n, k, out_stride, x_stride, weight_stride, split_columns,
    EXACT: tl.constexpr, PARTIAL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """As :func:`_product_kernel`, of floats."""
    tiles_m = tl.cdiv(m, BLOCK_M)
    program = tl.program_id(0)
    split = tl.program_id(1)
    x_rows = program % tiles_m * BLOCK_M + tl.arange(0, BLOCK_M)
    own = program // tiles_m * BLOCK_N + tl.arange(0, BLOCK_N)
    at = weight_ptr + tl.minimum(own, n - 1).to(tl.int64)[:, None] * weight_stride
    x_at = x_ptr + x_rows.to(tl.int64)[None, :] * x_stride
    total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for start in tl.range(split * split_columns, tl.minimum(k, (split + 1) * split_columns), BLOCK_K):
        column = start + tl.arange(0, BLOCK_K)
        w = tl.load(at + column[None, :], mask=(column < k)[None, :], other=0.0)
        x = tl.load(x_at + column[:, None], mask=(column < k)[:, None] & (x_rows < m)[None, :], other=0.0)
        total = dot(w, x, total, EXACT)
    _store(out_ptr, total, bias_ptr, own, x_rows, split, m, n, out_stride, PARTIAL)


@triton.jit(do_not_specialize=["m"])
def _reduce_kernel(out_ptr, partial_ptr, bias_ptr, m, n, out_stride, SPLITS: tl.constexpr, BLOCK: tl.constexpr):
    """out [m, n]: the sum of the workspace's [SPLITS, m, n] in their order, and the bias."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for split in tl.static_range(SPLITS):
        total += tl.load(partial_ptr + (row + split * m) * n + at, mask=at < n, other=0.0)
    if bias_ptr is not None:
        total += tl.load(bias_ptr + at, mask=at < n, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * out_stride + at, total.to(out_ptr.dtype.element_ty), mask=at < n)


@triton.jit(do_not_specialize=["count", "tiles"])
def _dequantize_kernel(
    out_ptr, indices_ptr, high_ptr, low_ptr, scale_ptr, minimum_ptr, outer_ptr, outer_minimum_ptr,
    count, first, n, k, tiles, out_stride, tile_stride, row_stride,
    BITS: tl.constexpr, HIGH: tl.constexpr, LOW: tl.constexpr,
    FLOATING: tl.constexpr, SIGNED: tl.constexpr, OFFSET: tl.constexpr, GROUP: tl.constexpr, OUTER: tl.constexpr,
    KIND: tl.constexpr, MINIMUM: tl.constexpr, ZERO: tl.constexpr, PART: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A program per BLOCK_N rows of out and BLOCK_K columns, from bytes of the planes."""
    # No part has more groups than two: halves of it, in which factors are the same.
    HALVES: tl.constexpr = 2 if GROUP % PART else 1
    own = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    rows = tl.minimum(own, count - 1)
    if indices_ptr is not None:
        rows = tl.load(indices_ptr + rows)
    else:
        rows += first
    start = tl.program_id(1) * BLOCK_K
    unit = tl.arange(0, PART)
    at = rows.to(tl.int64)[:, None] * row_stride + unit[None, :]
    for part in tl.static_range(BLOCK_K // PART):
        column = start + part * PART
        if part * HIGH % 8 == 0:
            tile = tl.minimum(column // (PART * (8 // HIGH)), tiles - 1)
            high = tl.load(high_ptr + tile.to(tl.int64) * tile_stride + at)
        low = high
        if LOW:
            if part * LOW % 8 == 0:
                low_tile = tl.minimum(column // (PART * (8 // LOW)), tiles * LOW // HIGH - 1)
                low_bytes = tl.load(low_ptr + low_tile.to(tl.int64) * tile_stride + at)
            low = low_bytes
        code = _codes(high, low, part * HIGH % 8, part * LOW % 8, HIGH, LOW)
        if FLOATING:
            value = (from_e4m3(code) if BITS == 8 else from_e2m1(code)).to(tl.float32)
        else:
            value = ((code ^ 0x80) if SIGNED else code).to(tl.float32) - OFFSET
        for half in tl.static_range(HALVES):
            share = tl.minimum(column + half * (PART // HALVES), k - 1)
            group = share // GROUP if GROUP else share * 0
            whole = value
            if ZERO:
                whole -= tl.load(minimum_ptr + group.to(tl.int64) * n + rows).to(tl.float32)[:, None]
            whole *= _factors(scale_ptr, outer_ptr, group, share, rows, n, OUTER, KIND)[:, None]
            if MINIMUM:
                whole += _factors(minimum_ptr, outer_minimum_ptr, group, share, rows, n, OUTER, KIND)[:, None]
            there = (own < count)[:, None] & (column + unit < k)[None, :]
            if HALVES == 2:
                there = there & ((unit >= PART // 2) == (half == 1))[None, :]
            to = out_ptr + own.to(tl.int64)[:, None] * out_stride + (column + unit)[None, :]
            tl.store(to, whole.to(out_ptr.dtype.element_ty), mask=there)


def candidate_tiles(m: int, n: int, k: int, kind: GroupQuant | torch.dtype, num_sms: int) -> list[ProductTile]:
    """Tiles to try for a product [m, k] @ [n, k].T with a weight of that type, the best guess first; at most 8."""
    if kind == torch.float32:
        shapes = [(8 if m <= 8 else 16, 64, 4, 2), (16, 32, 2, 2)]
    elif m > 32:
        # Two planes with a third stage would not fit into the shared memory of small devices.
        stages = 2 if isinstance(kind, GroupQuant) and len(plane_bits(kind)) > 1 else 3
        # No wider ones: the sums of each group, with four warps, would each take tensor memory of Blackwell's.
        wide = (64, 128, 8, 3) if isinstance(kind, torch.dtype) else (16, 128, 2, stages)
        shapes = [(32, 64, 2, stages), wide]
    elif m > 16:
        shapes = [(32, 64, 2, 3), (16, 128, 2, 3)]
    else:
        # One or two warps: with four, Hopper's products of 64 rows would wait for each other.
        rows = 8 if m <= 8 else 16
        shapes = [(rows, 128, 2, 3), (rows, 64, 2, 3), (rows, 512 // rows, 1, 3)]
    tiles: dict[ProductTile, None] = {}
    for rows, cols, warps, stages in shapes:
        programs = triton.cdiv(m, rows) * triton.cdiv(n, cols)
        # About twelve warps hide the latencies of a multiprocessor; a split has two blocks of columns or more.
        wanted = max(1, min(16, k // 256, round(12 * num_sms / (programs * warps))))
        for splits in (wanted, max(1, wanted // 2)):
            tiles[ProductTile(rows, cols, splits, warps, stages)] = None
    return list(tiles)


def workspace_size(m: int, n: int, tile: ProductTile) -> int:
    """Elements of float32: the sums of each split."""
    return tile.splits * m * n if tile.splits > 1 else 0


class _Layout(NamedTuple):
    """How a kernel reads a weight."""

    planes: tuple[torch.Tensor, torch.Tensor | None]
    tiles: int
    part: int
    tile_stride: int
    row_stride: int


def _layout(weight: PackedWeight, dtype: torch.dtype) -> _Layout:
    """dtype: of a unit, uint8 or int16; strides are in units."""
    high, low = weight.planes[0].view(dtype), weight.planes[1].view(dtype) if len(weight.planes) > 1 else None
    if high.dim() == 3:
        return _Layout((high, low), len(high), PART, high.stride(0), high.stride(1))
    padded = weight.planes[0].shape[1]
    part = math.gcd(128, padded, weight.type.group_size) if weight.type.group_size % 16 == 0 else PART
    part = max(part, PART)
    return _Layout((high, low), padded // part, part, part // dtype.itemsize, high.stride(0))


def _kind(type: GroupQuant) -> dict[str, object]:
    """What kernels are compiled for."""
    planes = plane_bits(type)
    return {
        "BITS": type.bits, "HIGH": planes[0], "LOW": planes[1] if len(planes) > 1 else 0, "FLOATING": type.floating,
        "SIGNED": is_signed(type), "GROUP": type.group_size, "OUTER": type.outer, "MINIMUM": type.minimum,
        "ZERO": type.zero_point, "KIND": str(type.scale) if type.scale in (E8M0, E4M3) else "number",
    }  # fmt: skip


def product(
    out: torch.Tensor,
    x: torch.Tensor,
    x_scales: torch.Tensor | None,
    weight: PackedWeight | torch.Tensor,
    bias: torch.Tensor | None,
    tile: ProductTile,
    workspace: torch.Tensor,
) -> None:
    """out = x @ weight.T + bias.

    out: float [M, N]. x: float32, float16 or bfloat16 [M, K], which codes are multiplied with, or codes, int8 or
    float8_e4m3fn [M, K], with x_scales float32 [groups or 1, M]; int8 beside integers whose groups are its own, E4M3
    beside E4M3. Rows of x begin at multiples of four bytes. weight: [N, K], packed, or floats of x's type. bias: float
    [N]. workspace: float32, ``workspace_size`` elements or more, of any content.
    """
    m, k = x.shape
    n = out.shape[1]
    if m == 0:
        return
    partial = tile.splits > 1
    into, stride = (workspace, 0) if partial else (out, out.stride(0))
    grid = (triton.cdiv(m, tile.rows) * triton.cdiv(n, tile.cols), tile.splits)
    options: dict[str, object] = {"num_warps": tile.num_warps, "num_stages": tile.num_stages, **FUSED}
    extra = None if partial else bias
    if isinstance(weight, torch.Tensor):
        exact = x.dtype == torch.float32
        block = 32 if exact else 64
        _dense_kernel[grid](
            into, x, weight, extra, m, n, k, stride, x.stride(0), weight.stride(0), _split(k, block, tile.splits),
            EXACT=exact, PARTIAL=partial, BLOCK_M=tile.rows, BLOCK_N=tile.cols, BLOCK_K=block, **options,
        )  # fmt: skip
    else:
        _launch_packed(into, stride, x, x_scales, weight, extra, tile, grid, options)
    if partial:
        block = min(1024, max(128, next_power_of_2(n)))
        _reduce_kernel[(m, triton.cdiv(n, block))](
            out, workspace, bias, m, n, out.stride(0), SPLITS=tile.splits, BLOCK=block
        )


def _split(k: int, block: int, splits: int) -> int:
    """Columns of a split, whole blocks."""
    return -(-k // (block * splits)) * block


def _launch_packed(
    into: torch.Tensor, stride: int, x: torch.Tensor, x_scales: torch.Tensor | None, weight: PackedWeight,
    bias: torch.Tensor | None, tile: ProductTile, grid: tuple[int, int], options: dict[str, object],
) -> None:  # fmt: skip
    type, (m, k) = weight.type, x.shape
    if x.dtype == torch.int8:
        kind, units, pairs = "int8", x, torch.uint8
    elif x.dtype == torch.float8_e4m3fn:
        kind, units, pairs = "e4m3", x.view(torch.int16), torch.int16
    elif x.dtype == torch.float32:
        kind, units, pairs = "float", x, torch.uint8
    else:
        kind, units, pairs = "half", x.view(torch.int32), torch.int16
    layout = _layout(weight, pairs)
    x_group = -1 if x_scales is None else 0 if len(x_scales) == 1 else k // len(x_scales)
    block = max(128, chunk(type))
    step = math.gcd(block, type.group_size, max(0, x_group))
    _product_kernel[grid](
        into, units, x_scales, *layout.planes, weight.scale, weight.minimum, weight.outer_scale, weight.outer_minimum,
        bias, m, weight.rows, k, layout.tiles, stride, units.stride(0), 0 if x_scales is None else x_scales.stride(0),
        layout.tile_stride, layout.row_stride, _split(k, block, tile.splits), X=kind,
        FRACTION=7 if x.dtype == torch.bfloat16 else 10, X_GROUP=x_group, PARTIAL=tile.splits > 1,
        OFFSET=type.offset - (128 if type.bits == 8 and kind == "int8" else 0), PART=layout.part, STEP=step,
        BLOCK_M=tile.rows, BLOCK_N=tile.cols, BLOCK_K=block, **_kind(type), **options,
    )  # fmt: skip


def dequantize_rows(out: torch.Tensor, weight: PackedWeight, indices: torch.Tensor | None, first: int = 0) -> None:
    """out[i] = the floats of row indices[i], or first + i. out: float [R, cols]; indices: int32 [R]."""
    count, cols = out.shape
    if count == 0:
        return
    layout = _layout(weight, torch.uint8)
    rows, block = 16 if count < 256 else 64, max(128, chunk(weight.type))
    _dequantize_kernel[(triton.cdiv(count, rows), triton.cdiv(cols, block))](
        out, indices, *layout.planes, weight.scale, weight.minimum, weight.outer_scale, weight.outer_minimum,
        count, first, weight.rows, cols, layout.tiles, out.stride(0), layout.tile_stride, layout.row_stride,
        OFFSET=weight.type.offset, PART=layout.part, BLOCK_N=rows, BLOCK_K=block, **_kind(weight.type),
        enable_fp_fusion=False,
    )  # fmt: skip
