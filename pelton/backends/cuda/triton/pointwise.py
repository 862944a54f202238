"""What works element by element, and copies of rows: no products, no sums along a row."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ....graph.ops import GATE_BLOCK
from .common import FUSED, next_power_of_2, tanh

#: Elements of a program. 8 a thread with the default of 4 warps: whole 16-byte accesses of 16-bit types, and no element
#: in two threads, so that an output may be an input.
_TILE = 1024


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


@triton.jit(do_not_specialize=["rows"])
def _pointwise_kernel(
    out_ptr,
    a_ptr,
    b_ptr,  # may be None
    parameter,
    rows,
    columns,
    out_stride,
    a_stride,
    b_stride,
    OP: tl.constexpr,
    ALTERNATE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """ALTERNATE, if not 0: columns of a and b are blocks of that many, with as many others in between."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    mask = (row < rows) & (column < columns)
    row = row.to(tl.int64)
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
    tl.store(out_ptr + row * out_stride + column, x, mask=mask)


def _pointwise(
    out: torch.Tensor, a: torch.Tensor, b: torch.Tensor | None, op: str, parameter: float = 0.0, alternate: int = 0
) -> None:
    rows, columns = out.shape
    if rows == 0:
        return
    block = min(_TILE, next_power_of_2(columns))
    tile_rows = _TILE // block
    _pointwise_kernel[(triton.cdiv(rows, tile_rows), triton.cdiv(columns, block))](
        out,
        a,
        b,
        parameter,
        rows,
        columns,
        out.stride(0),
        a.stride(0),
        0 if b is None else b.stride(0),
        OP=op,
        ALTERNATE=alternate,
        ROWS=tile_rows,
        BLOCK=block,
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


def activation(out: torch.Tensor, x: torch.Tensor, kind: str) -> None:
    """Both float [T, columns]; kind: a key of ACTIVATIONS in pelton/graph/ops.py."""
    _pointwise(out, x, None, kind)


def gated_activation(out: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, kind: str) -> None:
    """out = activation(gate) * up, all float [T, columns]."""
    _pointwise(out, gate, up, kind)


def gated_blocks(out: torch.Tensor, x: torch.Tensor, kind: str) -> None:
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
