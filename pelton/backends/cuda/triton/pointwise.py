"""What works element by element, and copies of rows: no products, no sums along a row.

Where ``out`` is :class:`Codes`, results are quantized as they are in float32, and stored only so.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ....graph.ops import GATE_BLOCK
from .codes import encode, magnitude, scale_of
from .common import FUSED, next_power_of_2, tanh
from .quantize import ROW_COLUMNS, Codes, store_codes, target

#: Elements of a program. 8 a thread with the default of 4 warps: whole 16-byte accesses of 16-bit types, and no element
#: in two threads, so that an output may be an input.
_TILE = 1024

#: Columns at a time of a row that registers do not hold.
_LONG_TILE = 8192


@triton.jit
def _activation(x, KIND: tl.constexpr):
    """ACTIVATIONS of pelton/graph/ops.py, float32."""
    if KIND == "silu":
        return x / (1 + tl.exp(-x))
    elif KIND == "gelu_tanh":  # (1 + tanh(u)) / 2 = 1 / (1 + exp(-2u)), without the difference of near numbers
        return x / (1 + tl.exp(-1.5957691216057308 * (x + 0.044715 * x * x * x)))
    elif KIND == "gelu":
        return 0.5 * x * (1 + tl.erf(x * 0.7071067811865476))
    else:
        tl.static_assert(KIND == "relu")
        return tl.where(x < 0, 0.0, x)  # NaN stays NaN


@triton.jit
def _values(
    a_ptr,
    b_ptr,
    parameter,
    row,
    column,
    mask,
    a_stride,
    b_stride,
    OP: tl.constexpr,
    ALTERNATE: tl.constexpr,
):
    """Results, float32, in these columns; 0 where the mask is not."""
    at = column
    if ALTERNATE:
        at += column // ALTERNATE * ALTERNATE
    x = tl.load(a_ptr + row * a_stride + at, mask=mask, other=0.0).to(tl.float32)
    if OP == "scale":
        x = x * parameter
    elif OP == "softcap":
        x = parameter * tanh(x / parameter)
    elif OP != "add" and OP != "mul":
        x = _activation(x, OP)
    if b_ptr is not None:
        y = tl.load(b_ptr + row * b_stride + at, mask=mask, other=0.0).to(tl.float32)
        if OP == "add":
            x = x + y
        else:
            x = x * y
    return x


@triton.jit(do_not_specialize=["rows", "scales_stride"])
def _pointwise_kernel(
    out_ptr,
    scales_ptr,  # None: out is no codes
    a_ptr,
    b_ptr,  # may be None
    parameter,
    rows,
    columns,
    out_stride,
    scales_stride,
    a_stride,
    b_stride,
    OP: tl.constexpr,
    ALTERNATE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
    INT8: tl.constexpr,
):
    """ALTERNATE, if not 0: columns of a and b are blocks of that many, with as many others in between."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    first = tl.program_id(1) * BLOCK
    column = first + tl.arange(0, BLOCK)[None, :]
    mask = (row < rows) & (column < columns)
    row = row.to(tl.int64)
    x = _values(a_ptr, b_ptr, parameter, row, column, mask, a_stride, b_stride, OP, ALTERNATE)
    if scales_ptr is None:
        tl.store(out_ptr + row * out_stride + column, x, mask=mask)
    else:
        store_codes(out_ptr, scales_ptr, out_stride, scales_stride, x, row, first, rows, columns, GROUP, INT8)


@triton.jit
def _long_rows_kernel(
    codes_ptr,
    scales_ptr,
    a_ptr,
    b_ptr,  # may be None
    columns,
    codes_stride,
    a_stride,
    b_stride,
    OP: tl.constexpr,
    ALTERNATE: tl.constexpr,
    BLOCK: tl.constexpr,
    INT8: tl.constexpr,
):
    """One scale for a row that registers do not hold: everything is computed twice."""
    row = tl.program_id(0).to(tl.int64)
    index = tl.arange(0, BLOCK)[None, :]
    largest = tl.zeros([1, 1], tl.int32)
    for first in range(0, columns, BLOCK):
        column = first + index
        x = _values(a_ptr, b_ptr, 0.0, row, column, column < columns, a_stride, b_stride, OP, ALTERNATE)
        largest = tl.maximum(largest, tl.max(magnitude(x), 1, keep_dims=True))
    scale = scale_of(largest, INT8)
    tl.store(scales_ptr + row + tl.zeros([1, 1], tl.int32), scale)
    for first in range(0, columns, BLOCK):
        column = first + index
        x = _values(a_ptr, b_ptr, 0.0, row, column, column < columns, a_stride, b_stride, OP, ALTERNATE)
        tl.store(codes_ptr + row * codes_stride + column, encode(x, scale, INT8), mask=column < columns)


def _pointwise(
    out: torch.Tensor | Codes,
    a: torch.Tensor,
    b: torch.Tensor | None,
    op: str,
    parameter: float = 0.0,
    alternate: int = 0,
) -> None:
    rows, columns = (out.codes if isinstance(out, Codes) else out).shape
    if rows == 0:
        return
    b_stride = 0 if b is None else b.stride(0)
    width = next_power_of_2(columns)
    block = min(_TILE, width)
    if isinstance(out, Codes):
        groups = out.scales.shape[0]
        if groups == 1 and columns > ROW_COLUMNS:
            x, scales, _, int8 = target(out, _LONG_TILE)
            _long_rows_kernel[(rows,)](
                x,
                scales,
                a,
                b,
                columns,
                x.stride(0),
                a.stride(0),
                b_stride,
                OP=op,
                ALTERNATE=alternate,
                BLOCK=_LONG_TILE,
                INT8=int8,
                num_warps=16,
                **FUSED,
            )
            return
        block = width if groups == 1 else max(block, columns // groups)
    tile_rows = max(1, _TILE // block)
    x, scales, group, int8 = target(out, block)
    _pointwise_kernel[(triton.cdiv(rows, tile_rows), triton.cdiv(columns, block))](
        x,
        scales,
        a,
        b,
        parameter,
        rows,
        columns,
        x.stride(0),
        0 if scales is None else scales.stride(0),
        a.stride(0),
        b_stride,
        OP=op,
        ALTERNATE=alternate,
        ROWS=tile_rows,
        BLOCK=block,
        GROUP=group,
        INT8=int8,
        num_warps=min(16, tile_rows * block // 256),
        **FUSED,
    )


def add(out: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """out = a + b, all float [T, columns]. out may be an input, here and below."""
    _pointwise(out, a, b, "add")


def mul(out: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """out = a * b, all float [T, columns]."""
    _pointwise(out, a, b, "mul")


def scale(out: torch.Tensor, x: torch.Tensor, factor: float) -> None:
    """out = factor * x, both float [T, columns]."""
    _pointwise(out, x, None, "scale", factor)


def softcap(out: torch.Tensor, x: torch.Tensor, cap: float) -> None:
    """out = cap * tanh(x / cap), both float [T, columns]."""
    _pointwise(out, x, None, "softcap", cap)


def activation(out: torch.Tensor | Codes, x: torch.Tensor, kind: str) -> None:
    """Both float [T, columns]; kind: a key of ACTIVATIONS in pelton/graph/ops.py."""
    _pointwise(out, x, None, kind)


def gated_activation(out: torch.Tensor | Codes, gate: torch.Tensor, up: torch.Tensor, kind: str) -> None:
    """out = activation(gate) * up, all float [T, columns]."""
    _pointwise(out, gate, up, kind)


def gated_blocks(out: torch.Tensor | Codes, x: torch.Tensor, kind: str) -> None:
    """What is behind the product of a ``gated_linear``: activation(gate) * up.

    x: float [T, 2 * columns], blocks of GATE_BLOCK gates and as many ups in turns; out: float [T, columns], not in x.
    """
    _pointwise(out, x, x[:, GATE_BLOCK:], kind, alternate=GATE_BLOCK)


@triton.jit
def _gather_rows_kernel(out_ptr, table_ptr, indices_ptr, columns, out_stride, table_stride, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    source = tl.load(indices_ptr + row).to(tl.int64)
    x = tl.load(table_ptr + source * table_stride + column, mask=column < columns)
    tl.store(out_ptr + row * out_stride + column, x.to(tl.float32), mask=column < columns)


def gather_rows(out: torch.Tensor, table: torch.Tensor, indices: torch.Tensor) -> None:
    """out[i] = table[indices[i]]; out: float [N, columns], table: float [rows, columns], indices: int [N].

    Indices must be rows of the table: nothing checks them.
    """
    rows, columns = out.shape
    if rows == 0:
        return
    block = min(_TILE, next_power_of_2(columns))
    _gather_rows_kernel[(rows, triton.cdiv(columns, block))](
        out, table, indices, columns, out.stride(0), table.stride(0), BLOCK=block, **FUSED
    )


@triton.jit(do_not_specialize=["count"])
def _fill_pending_kernel(token_ids_ptr, sources_ptr, sampled_ptr, count, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    source = tl.load(sources_ptr + i, mask=i < count, other=-1)
    token = tl.load(sampled_ptr + source, mask=source >= 0)
    tl.store(token_ids_ptr + i, token, mask=source >= 0)


def fill_pending(token_ids: torch.Tensor, sources: torch.Tensor, sampled: torch.Tensor) -> None:
    """token_ids[i] = sampled[sources[i]] where sources[i] >= 0; int32 [T], [T] and [tokens of the step before]."""
    count = token_ids.shape[0]
    if count == 0:
        return
    _fill_pending_kernel[(triton.cdiv(count, 128),)](token_ids, sources, sampled, count, BLOCK=128)
