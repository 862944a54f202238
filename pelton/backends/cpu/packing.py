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

from pelton.graph.quantized import SCALE_ARRAYS, HostTensor, QuantizedArray
from pelton.graph.types import BF16, E4M3, E8M0, F16, F32, I8, ROW, U8, DType, ElementType, GroupQuant

Bytes: TypeAlias = "npt.NDArray[np.uint8]"
Words: TypeAlias = "npt.NDArray[np.uint32]"

#: Part of the key of packed weights kept on disk: raise it whenever a layout changes, or what a reader
#: of checkpoints yields.
VERSION = 2
#: Output columns per panel: kPanel of the kernels.
PANEL = 64
#: A row that is one group is padded to a multiple of this.
UNIT = 32
#: ``format`` of a linear call.
LINEAR_F32, LINEAR_BF16, LINEAR_QUANTIZED = range(3)
#: ``codes`` of a linear call.
BYTE, NIBBLE, NIBBLE1, NIBBLE2, TWO, FP4, FP8 = range(7)
#: ``scale_format`` of a linear call.
SCALE_FORMATS = {scale: i for i, scale in enumerate((F32, F16, BF16, U8, I8, E4M3, E8M0))}
#: ``activations`` of a linear call.
FLOATS, INT8 = range(2)
#: ``format`` of an embedding call.
ROWS_F32, ROWS_BF16, ROWS_F16, ROWS_QUANTIZED = range(4)
#: Groups up to which "auto" makes activations int8: one outlier takes digits from all that share its scale.
_AUTO_GROUP, _AUTO_GROUP_4_BITS = 32, 128
#: The offset of FP4 codes once the kernels have made integers of them.
_FP4_OFFSET = 12


@dataclass(frozen=True, slots=True)
class CodeLayout:
    """A unit of codes: ``words`` words of quads, ``bits`` bits of each code in them, the rest in one more word."""

    codes: int
    words: int
    bits: int
    plane: bool

    @property
    def nbytes(self) -> int:
        """Of a unit in one column."""
        return 4 * (self.words + self.plane)


CODE_LAYOUTS = {
    BYTE: CodeLayout(4, 1, 8, False),
    NIBBLE: CodeLayout(8, 1, 4, False),
    NIBBLE1: CodeLayout(32, 4, 4, True),
    NIBBLE2: CodeLayout(16, 2, 4, True),
    TWO: CodeLayout(16, 1, 2, False),
    FP4: CodeLayout(8, 1, 4, False),
    FP8: CodeLayout(4, 1, 8, False),
}


def code_format(dtype: GroupQuant) -> int:
    """How the codes of a type lie in a panel: without a wasted bit where their groups are whole units."""
    if dtype.floating:
        return FP4 if dtype.bits == 4 else FP8
    wanted = {2: TWO, 3: NIBBLE, 4: NIBBLE, 5: NIBBLE1, 6: NIBBLE2}.get(dtype.bits, BYTE)
    fallback = NIBBLE if dtype.bits <= 4 else BYTE
    return fallback if dtype.group_size % CODE_LAYOUTS[wanted].codes else wanted


@dataclass(frozen=True, slots=True)
class LinearPacking:
    """The numbers by which a linear call describes its packed weight."""

    format: int
    dtype: GroupQuant | None = None

    @property
    def codes(self) -> int:
        return BYTE if self.dtype is None else code_format(self.dtype)

    def ints(self, activations: int = FLOATS) -> list[int]:
        """[format, codes, group_size, scale_format, zeros, outer, offset, activations] of a ``linear`` call."""
        dtype = self.dtype
        if dtype is None:
            return [self.format, 0, 0, 0, 0, 0, 0, 0]
        zeros = 1 if dtype.minimum else 2 if dtype.zero_point else 0
        outer = 0 if dtype.outer is None else dtype.outer or 1
        offset = _FP4_OFFSET if self.codes == FP4 else dtype.offset
        scale = SCALE_FORMATS[dtype.scale]
        return [self.format, self.codes, dtype.group_size, scale, zeros, outer, offset, activations]


def linear_packing(dtype: ElementType) -> LinearPacking:
    """How a matrix of this type is packed for ``linear``."""
    if isinstance(dtype, GroupQuant):
        if dtype.group_size % 8:
            raise ValueError(f"{dtype}: linear needs a group_size that is a multiple of 8")
        return LinearPacking(LINEAR_QUANTIZED, dtype)
    if dtype not in (F32, F16, BF16):
        raise ValueError(f"a weight of type {dtype} cannot be packed")
    return LinearPacking(LINEAR_BF16 if dtype == BF16 else LINEAR_F32)


def int8_activations(dtype: ElementType, choice: str) -> bool:
    """Whether a weight type is multiplied with int8 activations. choice: ``EngineConfig.activations``.

    "int8": wherever kernels can, which is integers, and FP4, whose values are halves of integers. "auto": where it
    adds little to the type's own error, which the size of groups decides; docs/quantization.md has the figures.
    """
    if choice == "float" or not isinstance(dtype, GroupQuant) or code_format(dtype) == FP8:
        return False
    return choice == "int8" or 0 < dtype.group_size <= (_AUTO_GROUP if dtype.bits > 4 else _AUTO_GROUP_4_BITS)


@dataclass(frozen=True, slots=True)
class RowsPacking:
    """The numbers by which an embedding call describes its table."""

    format: int
    bits: int = 0
    group_size: int = 0
    has_min: bool = False
    scale_is_f32: bool = False
    offset: int = 0

    @property
    def scale(self) -> DType:
        return F32 if self.scale_is_f32 else F16

    def ints(self) -> list[int]:
        """[format, bits_stored, group_size, has_min, scale_is_f32, offset] of an ``embedding`` call."""
        stored = 0 if not self.bits else 4 if self.bits <= 4 else 8
        return [self.format, stored, self.group_size, int(self.has_min), int(self.scale_is_f32), self.offset]


def rows_packing(dtype: ElementType) -> RowsPacking:
    """How a table of this type is packed for ``embedding``: scales as f16 or f32, floating codes as f32 values."""
    if isinstance(dtype, GroupQuant) and not dtype.floating and dtype.group_size != ROW:
        minimum = dtype.minimum or dtype.zero_point
        exact = dtype.scale == F16 and not dtype.zero_point
        return RowsPacking(ROWS_QUANTIZED, dtype.bits, dtype.group_size, minimum, not exact, dtype.offset)
    formats: dict[Any, int] = {F32: ROWS_F32, BF16: ROWS_BF16, F16: ROWS_F16}
    if isinstance(dtype, DType) and dtype not in formats:
        raise ValueError(f"a table of type {dtype} cannot be packed")
    return RowsPacking(formats.get(dtype, ROWS_F32))


def linear_nbytes(n: int, k: int, dtype: ElementType) -> int:
    """Bytes of :func:`pack_linear` for a weight [n, k].

    Raises:
        ValueError: rows of k are no whole groups, or no kernel takes the type.
    """
    packing = linear_packing(dtype)
    panels = -(-n // PANEL)
    if packing.dtype is None:
        return panels * PANEL * (k * 4 if packing.format == LINEAR_F32 else (k + k % 2) * 2)
    return panels * _panel_layout(k, packing.dtype).nbytes


@dataclass(frozen=True, slots=True)
class _PanelLayout:
    """Bytes of the parts of a panel, in the order of contract.h."""

    group: int  # elements of k, padded where the row is one group
    groups: int
    outer_groups: int  # groups in a block that has outer factors before it; all without such blocks
    outer: int  # bytes before a block
    codes: int  # of one group
    group_bytes: int

    @property
    def nbytes(self) -> int:
        return self.groups // self.outer_groups * self.outer + self.groups * self.group_bytes


def _panel_layout(k: int, dtype: GroupQuant) -> _PanelLayout:
    groups = dtype.groups(k)
    group = dtype.group_size or -(-k // UNIT) * UNIT
    layout = CODE_LAYOUTS[code_format(dtype)]
    codes = group // layout.codes * layout.nbytes * PANEL
    scale = PANEL * dtype.scale.bits // 8
    zeros = scale if dtype.minimum else PANEL if dtype.zero_point else 0
    outer_groups, outer = groups, 0
    if dtype.outer is not None:
        outer_groups = dtype.outer // group if dtype.outer else groups
        outer = PANEL * dtype.outer_dtype.bits // 8 * (2 if dtype.minimum else 1)
    return _PanelLayout(group, groups, outer_groups, outer, codes, codes + scale + zeros)


def rows_nbytes(n: int, k: int, dtype: ElementType) -> int:
    """Bytes of :func:`pack_rows` for a table [n, k]."""
    packing = rows_packing(dtype)
    if packing.format != ROWS_QUANTIZED:
        return n * k * (4 if packing.format == ROWS_F32 else 2)
    codes, scales = _row_parts(k, packing)
    return n * _align4(codes + scales * (2 if packing.has_min else 1))


def _align4(size: int) -> int:
    return -(-size // 4) * 4


def _row_parts(k: int, packing: RowsPacking) -> tuple[int, int]:
    """Bytes of the codes and of the scales of one table row."""
    codes = _align4((k + 1) // 2 if packing.bits <= 4 else k)
    return codes, k // packing.group_size * packing.scale.bits // 8


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
            _pack_quantized_panel(weight[p * PANEL : (p + 1) * PANEL], panel)
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


def _pack_quantized_panel(weight: QuantizedArray, panel: Bytes) -> None:
    dtype = weight.type
    layout = _panel_layout(weight.shape[1], dtype)
    blocks = panel.reshape(layout.groups // layout.outer_groups, -1)
    at = 0
    for outer in (weight.outer_scale, weight.outer_minimum):
        if outer is not None:
            at = _put(blocks, at, outer.astype(SCALE_ARRAYS[dtype.outer_dtype], copy=False))
    # The outer factors in front make the groups a strided view: [blocks, groups of a block, bytes].
    groups = blocks[:, layout.outer :].reshape(len(blocks), layout.outer_groups, layout.group_bytes)
    codes = _pad_rows(weight.codes)
    if codes.shape[1] < layout.groups * layout.group:
        codes = np.pad(codes, ((0, 0), (0, layout.groups * layout.group - codes.shape[1])))
    words = _code_words(np.ascontiguousarray(codes), CODE_LAYOUTS[code_format(dtype)])
    # Assigning through a u32 view transposes [64, words] into [words, 64] without another copy.
    lanes = groups[..., : layout.codes].view(np.uint32).reshape(*groups.shape[:2], -1, PANEL)
    lanes[:] = words.reshape(PANEL, *groups.shape[:2], -1).transpose(1, 2, 3, 0)
    at = layout.codes
    for part in (weight.scale, weight.minimum):
        if part is not None:
            at = _put(groups, at, part)


def _put(to: Bytes, at: int, values: npt.NDArray[Any]) -> int:
    """Write columns of factors [64 or fewer, count] at byte ``at`` of ``to`` [..., bytes]; returns the end."""
    values = _pad_rows(values)
    size = PANEL * values.itemsize
    to[..., at : at + size].view(values.dtype)[:] = values.T.reshape(*to.shape[:-1], PANEL)
    return at + size


def _code_words(codes: Bytes, layout: CodeLayout) -> Words:
    """uint8 [rows, k] as uint32 [rows, units * words], in the order that contract.h describes."""
    rows = codes.shape[0]
    quads = codes.view(np.uint32).reshape(rows, -1, layout.words, 8 // layout.bits)  # unit, word, quad of the word
    low = np.uint32((1 << layout.bits) - 1) * np.uint32(0x01010101)
    words = quads[..., 0] & low
    for i in range(1, 8 // layout.bits):
        words |= (quads[..., i] & low) << np.uint32(layout.bits * i)
    if not layout.plane:
        return words.reshape(rows, -1)
    upper = (quads.reshape(rows, words.shape[1], -1) >> np.uint32(layout.bits)) & np.uint32(0x0F0F0F0F)
    bits = 8 // upper.shape[2]  # of each code: a byte of the plane has them for all quads of the unit
    plane = upper[..., 0]
    for j in range(1, upper.shape[2]):
        plane = plane | (upper[..., j] << np.uint32(bits * j))
    return np.concatenate([words, plane[..., None]], axis=2).reshape(rows, -1)


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
    if packing.format != ROWS_QUANTIZED:

        def copy(begin: int, end: int) -> None:
            part = table[begin:end]
            values = part.dequantize() if isinstance(part, QuantizedArray) else np.ascontiguousarray(part)
            rows[begin:end] = values.view(np.uint8).reshape(end - begin, -1)

        _in_chunks(n, copy)
        return out
    assert isinstance(table, QuantizedArray)
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
        for values in (part.scales(), part.minima()):
            if values is not None:
                exact = np.ascontiguousarray(values.astype(SCALE_ARRAYS[packing.scale], copy=False))
                to[:, at : at + scales_size] = exact.view(np.uint8).reshape(exact.shape[0], -1)
                at += scales_size
        to[:, at:] = 0

    _in_chunks(n, fill)
    return out


def _in_chunks(rows: int, fill: Callable[[int, int], None]) -> None:
    # 256 rows of a table are about a megabyte: temporaries stay in the cache.
    for begin in range(0, rows, 256):
        fill(begin, min(begin + 256, rows))
