"""Group-quantized weights in the layout that the product kernels read: the type's bits and no more.

Codes are split into planes of 8, 4, 2 or 1 bits, the most significant first: 6 bits are 4 and 2, 5 are 4 and 1, 3 are
2 and 1; 7 bits take 8. A plane of w < 8 bits is uint8 [tiles, rows, PART]: the 8 / w codes of a byte lie PART columns
apart, the first in its lowest bits, so a piece of a tile, shifted and masked, is an operand of a product. Columns are
padded with zeros to chunks, at whose ends tiles of all planes end. 8-bit codes are [rows, columns], as
``torch._scaled_mm`` and ``torch._int_mm`` take them; the symmetric integers among them are stored as int8, less 128.

Scales, minima and zero points are as the type has them, but [groups, rows]: rows of a tile are neighbours.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch

from ...graph.types import BF16, E4M3, E8M0, F16, F32, I8, U8, GroupQuant

#: Columns of a piece of a tile.
PART = 32
#: Rows and columns that share a scale in checkpoints of DeepSeek and Qwen, and in the kernels of libraries.
FP8_BLOCK = 128
#: The type of scales in memory; FP8 and powers of two are kept as their bits.
SCALE_TYPES = {
    F32: torch.float32, F16: torch.float16, BF16: torch.bfloat16, U8: torch.uint8, I8: torch.int8, E4M3: torch.uint8,
    E8M0: torch.uint8,
}  # fmt: skip
_PLANES = {2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 7: (8,), 8: (8,)}
#: Elements of an int32 temporary while codes are packed.
_PIECE = 16 << 20


@dataclass(frozen=True)
class PackedWeight:
    """A weight [rows, cols] of a quantized type on the device.

    planes: see above. scale: ``SCALE_TYPES[type.scale]`` [groups, rows]; minimum: the same, or zero points in uint8, or
    None. outer_scale, outer_minimum: [outers, rows] in float16, float32 where the whole row shares one, or None.
    """

    type: GroupQuant
    rows: int
    cols: int
    planes: tuple[torch.Tensor, ...]
    scale: torch.Tensor
    minimum: torch.Tensor | None
    outer_scale: torch.Tensor | None
    outer_minimum: torch.Tensor | None

    @property
    def nbytes(self) -> int:
        parts = (*self.planes, self.scale, self.minimum, self.outer_scale, self.outer_minimum)
        return sum(part.nbytes for part in parts if part is not None)

    @property
    def codes(self) -> torch.Tensor:
        """8-bit codes, [rows, cols] with the row stride of the padded columns: int8, float8_e4m3fn or uint8."""
        return self.planes[0][:, : self.cols]

    @cached_property
    def block_scales(self) -> torch.Tensor | None:
        """Of blocks of ``FP8_BLOCK`` rows and columns, once all is written; None unless such rows share their scales.

        float32 [rows / 128, cols / 128], rows 16 bytes apart or a multiple. Waits for the device.
        """
        groups, rows = self.scale.shape
        blocks = self.scale.view(groups, rows // FP8_BLOCK, FP8_BLOCK)
        if not bool((blocks == blocks[:, :, :1]).all()):
            return None
        scales = torch.zeros(rows // FP8_BLOCK, -(-groups // 4) * 4, device=blocks.device)[:, :groups]
        scales.copy_(blocks[:, :, 0].t())
        return scales


def has_kernel(type: GroupQuant, cols: int) -> bool:
    """Whether products take weights of this type with so many columns: groups are whole numbers of 16 columns."""
    return (type.group_size or cols) % 16 == 0 and cols % 16 == 0


def plane_bits(type: GroupQuant) -> tuple[int, ...]:
    """Bits of each plane."""
    return _PLANES[type.bits]


def is_signed(type: GroupQuant) -> bool:
    """Whether 8-bit codes are stored less 128."""
    return type.bits == 8 and type.offset == 128


def chunk(type: GroupQuant) -> int:
    """Columns after which the tiles of all planes end together; rows are whole chunks."""
    return PART * 8 // plane_bits(type)[-1]


def packed_bytes(type: GroupQuant, rows: int, cols: int) -> int:
    """Of :func:`empty`."""
    return empty(type, rows, cols, torch.device("meta")).nbytes


def empty(type: GroupQuant, rows: int, cols: int, device: torch.device) -> PackedWeight:
    """A weight without values: :func:`write` brings them, row by row."""
    groups, padded = type.groups(cols), -(-cols // chunk(type)) * chunk(type)

    def table(there: bool, count: int, dtype: torch.dtype) -> torch.Tensor | None:
        return torch.empty(count, rows, dtype=dtype, device=device) if there else None

    if plane_bits(type) == (8,):
        kind = torch.float8_e4m3fn if type.floating else torch.int8 if is_signed(type) else torch.uint8
        planes = [torch.empty(rows, padded, dtype=kind, device=device)]
    else:
        shapes = [(padded * bits // (8 * PART), rows, PART) for bits in plane_bits(type)]
        planes = [torch.empty(shape, dtype=torch.uint8, device=device) for shape in shapes]
    outers = cols // (type.outer or cols)
    outer = torch.float16 if type.outer else torch.float32
    scale = table(True, groups, SCALE_TYPES[type.scale])
    assert scale is not None
    return PackedWeight(
        type, rows, cols, tuple(planes), scale,
        table(type.minimum or type.zero_point, groups, torch.uint8 if type.zero_point else scale.dtype),
        table(type.outer is not None, outers, outer),
        table(type.outer is not None and type.minimum, outers, outer),
    )  # fmt: skip


def write(
    weight: PackedWeight,
    first_row: int,
    codes: torch.Tensor,
    scale: torch.Tensor,
    minimum: torch.Tensor | None,
    outer_scale: torch.Tensor | None,
    outer_minimum: torch.Tensor | None,
) -> None:
    """Rows from ``first_row`` on, given as :class:`~pelton.graph.quantized.QuantizedArray` has them, on the device.

    codes: uint8 [r, cols]. The others: [r, groups] or [r, outers]; FP8 and powers of two may be typed so, or bytes.
    """
    count = len(codes)
    rows = slice(first_row, first_row + count)
    parts = (scale, minimum, outer_scale, outer_minimum)
    tables = (weight.scale, weight.minimum, weight.outer_scale, weight.outer_minimum)
    for part, into in zip(parts, tables, strict=True):
        assert (part is None) == (into is None)
        if part is not None and into is not None:
            into[:, rows] = part.view(into.dtype).t()
    if plane_bits(weight.type) == (8,):
        into = weight.planes[0].view(torch.uint8)[rows]
        into[:, weight.cols :] = 0
        if is_signed(weight.type):
            torch.bitwise_xor(codes, 128, out=into[:, : weight.cols])
        else:
            into[:, : weight.cols] = codes
        return
    step = max(1, _PIECE // weight.cols)
    for start in range(0, count, step):
        _write_planes(weight, first_row + start, codes[start : start + step])


def _write_planes(weight: PackedWeight, first_row: int, codes: torch.Tensor) -> None:
    count, cols = codes.shape
    shift = weight.type.bits
    for plane, bits in zip(weight.planes, plane_bits(weight.type), strict=True):
        shift -= bits
        tiles, pieces = len(plane), 8 // bits
        rows = torch.zeros(count, tiles * pieces * PART, dtype=torch.uint8, device=codes.device)
        rows[:, :cols] = (codes >> shift) & ((1 << bits) - 1)
        split = rows.view(count, tiles, pieces, PART)
        packed = split[:, :, 0]
        for piece in range(1, pieces):
            packed |= split[:, :, piece] << (bits * piece)
        plane[:, first_row : first_row + count] = packed.transpose(0, 1)
