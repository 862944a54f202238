"""Weights in the layout that the native kernels read. NumPy only; values are never changed.

One layout serves every ISA (csrc/cpu/ops/linear/contract.h has the details): panels of 64 output
columns, the last one padded with zeros, and k inside. Embedding tables are packed row by row.

float16 weights become float32 panels, because bfloat16 keeps fewer bits of the mantissa. A checkpoint
that was bfloat16 once may fit: ``pack_linear(weight, BF16)`` packs it if that loses nothing and raises
``ValueError`` otherwise.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import ml_dtypes
import numpy as np
import numpy.typing as npt

from pelton.graph.quantized import HostTensor, QuantizedArray
from pelton.graph.types import BF16, F16, F32, ElementType, GroupQuant

Bytes: TypeAlias = "npt.NDArray[np.uint8]"

#: Part of the key of packed weights kept on disk: raise it whenever a layout changes, or what a reader
#: of checkpoints yields.
VERSION = 1
#: Output columns per panel: kPanel of the kernels.
PANEL = 64
#: ``format`` of a linear call.
LINEAR_F32, LINEAR_BF16, LINEAR_QUANTIZED = range(3)
#: ``format`` of an embedding call.
ROWS_F32, ROWS_BF16, ROWS_F16, ROWS_QUANTIZED = range(4)


@dataclass(frozen=True, slots=True)
class Packing:
    """The numbers by which a kernel call describes a packed weight."""

    format: int
    bits: int = 0
    group_size: int = 0
    has_min: bool = False
    scale_is_f32: bool = False
    offset: int = 0

    def ints(self) -> list[int]:
        """[format, bits_stored, group_size, has_min, scale_is_f32, offset] of a ``linear`` or ``embedding`` call."""
        stored = 0 if not self.bits else _stored_bits(self.bits)
        return [self.format, stored, self.group_size, int(self.has_min), int(self.scale_is_f32), self.offset]


def _stored_bits(bits: int) -> int:
    return 4 if bits <= 4 else 8


def _scale_dtype(packing: Packing) -> type[np.floating[Any]]:
    return np.float32 if packing.scale_is_f32 else np.float16


def _quantized(format: int, dtype: GroupQuant) -> Packing:
    return Packing(format, dtype.bits, dtype.group_size, dtype.minimum, dtype.scale == F32, dtype.offset)


def linear_packing(dtype: ElementType) -> Packing:
    """How a matrix of this type is packed for ``linear``."""
    if isinstance(dtype, GroupQuant):
        if dtype.group_size % 8:
            raise ValueError(f"{dtype}: linear needs a group_size that is a multiple of 8")
        return _quantized(LINEAR_QUANTIZED, dtype)
    if dtype not in (F32, F16, BF16):
        raise ValueError(f"a weight of type {dtype} cannot be packed")
    return Packing(LINEAR_BF16 if dtype == BF16 else LINEAR_F32)


def rows_packing(dtype: ElementType) -> Packing:
    """How a table of this type is packed for ``embedding``."""
    if isinstance(dtype, GroupQuant):
        return _quantized(ROWS_QUANTIZED, dtype)
    formats = {F32: ROWS_F32, BF16: ROWS_BF16, F16: ROWS_F16}
    if dtype not in formats:
        raise ValueError(f"a table of type {dtype} cannot be packed")
    return Packing(formats[dtype])


def linear_nbytes(n: int, k: int, dtype: ElementType) -> int:
    """Bytes of :func:`pack_linear` for a weight [n, k]."""
    packing = linear_packing(dtype)
    panels = -(-n // PANEL)
    if packing.format == LINEAR_F32:
        return panels * k * PANEL * 4
    if packing.format == LINEAR_BF16:
        return panels * (k + k % 2) * PANEL * 2
    if k % packing.group_size:
        raise ValueError(f"k = {k} is not a multiple of the group size of {dtype}")
    return panels * (k // packing.group_size) * _group_nbytes(packing)


def rows_nbytes(n: int, k: int, dtype: ElementType) -> int:
    """Bytes of :func:`pack_rows` for a table [n, k]."""
    packing = rows_packing(dtype)
    if packing.format != ROWS_QUANTIZED:
        return n * k * (4 if packing.format == ROWS_F32 else 2)
    codes, scales = _row_parts(k, packing)
    return n * _align4(codes + scales * (2 if packing.has_min else 1))


def _align4(size: int) -> int:
    return -(-size // 4) * 4


def _group_nbytes(packing: Packing) -> int:
    """Codes, scales and minima of one panel and group."""
    scales = PANEL * (4 if packing.scale_is_f32 else 2) * (2 if packing.has_min else 1)
    return packing.group_size * PANEL * _stored_bits(packing.bits) // 8 + scales


def _row_parts(k: int, packing: Packing) -> tuple[int, int]:
    """Bytes of the codes and of the scales of one table row."""
    codes = _align4((k + 1) // 2 if packing.bits <= 4 else k)
    return codes, k // packing.group_size * (4 if packing.scale_is_f32 else 2)


def dtype_of(weight: HostTensor) -> ElementType:
    if isinstance(weight, QuantizedArray):
        return weight.type
    known: dict[Any, ElementType] = {
        np.dtype(np.float32): F32,
        np.dtype(np.float16): F16,
        np.dtype(ml_dtypes.bfloat16): BF16,
    }
    if weight.dtype not in known:
        raise ValueError(f"an array of {weight.dtype} cannot be packed")
    return known[weight.dtype]


def pack_linear(weight: HostTensor, kind: ElementType | None = None, out: Bytes | None = None) -> Bytes:
    """Panels of a weight [n, k] as bytes; ``out`` may be a memory-mapped array of that size.

    ``kind`` is the type to store, by default the weight's own. Only lossless changes are made.
    Works panel by panel, so that little more than ``out`` is in memory.
    """
    dtype = dtype_of(weight) if kind is None else kind
    n, k = weight.shape
    packing = linear_packing(dtype)
    size = linear_nbytes(n, k, dtype)
    out = np.empty(size, np.uint8) if out is None else _checked(out, size)
    panels = out.reshape(-(-n // PANEL), -1)
    if isinstance(weight, QuantizedArray):
        if dtype != weight.type:
            raise ValueError(f"a weight of {weight.type} cannot be packed as {dtype}")
        for p, panel in enumerate(panels):
            _pack_quantized_panel(weight[p * PANEL : (p + 1) * PANEL], packing, panel)
        return out
    if isinstance(dtype, GroupQuant):
        raise ValueError(f"a plain weight cannot be packed as {dtype}; quantize it first")
    for p, panel in enumerate(panels):
        rows = _pad_rows(_converted(weight[p * PANEL : (p + 1) * PANEL], packing.format))
        if packing.format == LINEAR_F32:
            panel.view(np.float32).reshape(k, PANEL)[:] = rows.T
        else:
            if k % 2:
                rows = np.concatenate([rows, np.zeros((PANEL, 1), rows.dtype)], axis=1)
            panel.view(np.uint32).reshape(-1, PANEL)[:] = np.ascontiguousarray(rows).view(np.uint32).T
    return out


def _checked(out: Bytes, size: int) -> Bytes:
    if out.dtype != np.uint8 or out.shape != (size,) or not out.flags.c_contiguous:
        raise ValueError(f"out must be {size} contiguous bytes")
    return out


def _converted(rows: npt.NDArray[Any], format: int) -> npt.NDArray[Any]:
    """Rows in the panel's type; a conversion that loses something is refused."""
    want = np.dtype(np.float32 if format == LINEAR_F32 else ml_dtypes.bfloat16)
    if rows.dtype == want:
        return np.asarray(rows)
    converted = rows.astype(want)
    if want != np.float32 and not np.array_equal(converted.astype(rows.dtype), rows, equal_nan=True):
        raise ValueError(f"values of {rows.dtype} do not all fit bfloat16")
    return converted


def _pad_rows(rows: npt.NDArray[Any]) -> npt.NDArray[Any]:
    if rows.shape[0] == PANEL:
        return rows
    return np.concatenate([rows, np.zeros((PANEL - rows.shape[0], *rows.shape[1:]), rows.dtype)])


def _pack_quantized_panel(weight: QuantizedArray, packing: Packing, panel: Bytes) -> None:
    codes = np.ascontiguousarray(_pad_rows(weight.codes))
    words = _nibble_words(codes) if packing.bits <= 4 else _byte_words(codes)
    groups = panel.reshape(-1, _group_nbytes(packing))
    code_bytes = packing.group_size * PANEL * _stored_bits(packing.bits) // 8
    # Assigning through a u32 view transposes [64, words] into [words, 64] without another copy.
    lanes = groups[:, :code_bytes].view(np.uint32).reshape(groups.shape[0], -1, PANEL)
    lanes[:] = words.reshape(PANEL, groups.shape[0], -1).transpose(1, 2, 0)
    at = code_bytes
    for part in (weight.scale, weight.minimum):
        if part is None:
            continue
        values = _pad_rows(part.astype(_scale_dtype(packing), copy=False))
        size = PANEL * values.itemsize
        groups[:, at : at + size].view(values.dtype)[:] = values.T
        at += size


def _nibble_words(codes: Bytes) -> npt.NDArray[np.uint32]:
    """8 codes per u32: even codes in the low half, odd ones in the high half, in ascending nibbles."""
    eight = codes.view(np.uint64)
    words = _even_nibbles(eight)
    words |= _even_nibbles(eight >> np.uint64(8)) << np.uint64(16)
    return words.astype(np.uint32)


def _even_nibbles(eight: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """The low nibbles of bytes 0, 2, 4 and 6, side by side."""
    x = eight & np.uint64(0x000F000F000F000F)
    x |= x >> np.uint64(12)
    x &= np.uint64(0x000000FF000000FF)
    x |= x >> np.uint64(24)
    x &= np.uint64(0xFFFF)
    return x


def _byte_words(codes: Bytes) -> npt.NDArray[np.uint32]:
    """4 codes per u32 in the byte order 0, 2, 1, 3."""
    four = codes.view(np.uint32)
    middle = ((four & np.uint32(0x0000FF00)) << np.uint32(8)) | ((four & np.uint32(0x00FF0000)) >> np.uint32(8))
    return (four & np.uint32(0xFF0000FF)) | middle


def pack_rows(table: HostTensor, out: Bytes | None = None) -> Bytes:
    """Rows of an embedding table [vocab, cols] as bytes.

    A quantized row is self-contained, so that a token reads one piece of memory: codes (two per byte,
    the low nibble first, when stored in 4 bits) padded to 4 bytes, scales, minima, padding to 4 bytes.
    """
    dtype = dtype_of(table)
    n, k = table.shape
    packing = rows_packing(dtype)
    size = rows_nbytes(n, k, dtype)
    out = np.empty(size, np.uint8) if out is None else _checked(out, size)
    rows = out.reshape(n, -1)
    if not isinstance(table, QuantizedArray):
        rows[:] = np.ascontiguousarray(table).view(np.uint8).reshape(n, -1)
        return out
    quantized = table

    def fill(begin: int, end: int) -> None:
        part, to = quantized[begin:end], rows[begin:end]
        codes_size, scales_size = _row_parts(k, packing)
        codes = part.codes
        if packing.bits <= 4:
            if k % 2:
                codes = np.concatenate([codes, np.zeros((codes.shape[0], 1), np.uint8)], axis=1)
            codes = codes[:, 0::2] | (codes[:, 1::2] << 4)
        to[:, : codes.shape[1]] = codes
        to[:, codes.shape[1] : codes_size] = 0
        at = codes_size
        for values in (part.scale, part.minimum):
            if values is not None:
                exact = np.ascontiguousarray(values.astype(_scale_dtype(packing), copy=False))
                to[:, at : at + scales_size] = exact.view(np.uint8).reshape(exact.shape[0], -1)
                at += scales_size
        to[:, at:] = 0

    _in_chunks(n, fill)
    return out


def _in_chunks(rows: int, fill: Callable[[int, int], None]) -> None:
    # 256 rows of a table are about a megabyte: temporaries stay in the cache.
    for begin in range(0, rows, 256):
        fill(begin, min(begin + 256, rows))
