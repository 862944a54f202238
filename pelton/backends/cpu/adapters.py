"""How adapters lie in the table of a ``lora`` call. The layout is csrc/cpu/ops/lora/contract.h's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from ...graph import F32, AdapterType
from ..host import AdapterPart

Bytes = npt.NDArray[np.uint8]

MOST_PARTS, RANK_PANEL, COLUMN_PANEL = 8, 16, 64
_HEADER = MOST_PARTS * 8  # bytes


def table_bytes(type: AdapterType) -> int:
    """Size of the table of one call."""
    return type.slots * _slot_bytes(type)


def _per_lane(type: AdapterType) -> int:
    """Numbers in 32 bits."""
    return 1 if type.dtype == F32 else 2


def _b_offset(type: AdapterType) -> int:
    ranks = _rounded(len(type.widths) * _rounded(type.max_rank, 2), RANK_PANEL)
    return _HEADER + ranks * -(-type.in_features // _per_lane(type)) * 4


def _slot_bytes(type: AdapterType) -> int:
    columns = sum(_rounded(width, COLUMN_PANEL) for width in type.widths)
    return _b_offset(type) + columns * -(-type.max_rank // _per_lane(type)) * 4


def _rounded(value: int, step: int) -> int:
    return -(-value // step) * step


def write_slot(type: AdapterType, slot: int, parts: Sequence[AdapterPart], table: Bytes) -> None:
    """Make ``slot`` hold an adapter, or none where all parts are None.

    parts: (A [rank, in_features], B [width, rank]) in float32 per part of the columns, or None.
    """
    place = table.reshape(type.slots, -1)[slot - 1]
    header = place[:_HEADER].view(np.int32).reshape(MOST_PARTS, 2)
    header[:] = 0
    if all(part is None for part in parts):
        return
    per_lane, first = _per_lane(type), 0
    ranks: list[tuple[int, int]] = []
    for part in parts:
        rank = 0 if part is None else len(part[0])
        ranks.append((first, rank))
        first += _rounded(rank, 2)
    stacked = np.zeros((_rounded(first, RANK_PANEL), _rounded(type.in_features, per_lane)), np.float32)
    b_panel = -(-type.max_rank // per_lane) * COLUMN_PANEL * 4
    at = _b_offset(type)
    for part, width, (start, rank) in zip(parts, type.widths, ranks, strict=True):
        panels = -(-width // COLUMN_PANEL)
        if part is not None:
            stacked[start : start + rank, : type.in_features] = part[0]
            b = np.zeros((panels * COLUMN_PANEL, _rounded(rank, per_lane)), np.float32)
            b[:width, :rank] = part[1]
            _put(place[at : at + panels * b_panel].reshape(panels, -1), b, COLUMN_PANEL, type)
        at += panels * b_panel
    panels = len(stacked) // RANK_PANEL
    _put(place[_HEADER : _HEADER + panels * stacked[0].size // per_lane * RANK_PANEL * 4].reshape(panels, -1),
         stacked, RANK_PANEL, type)  # fmt: skip
    header[: len(ranks)] = ranks


def _put(to: Bytes, values: npt.NDArray[np.float32], rows: int, type: AdapterType) -> None:
    """Lay ``values`` [panels * rows, cols] out as [lanes][rows] at the start of each of the panels ``to``."""
    exact: npt.NDArray[Any] = values if type.dtype == F32 else values.astype(ml_dtypes.bfloat16)
    lanes = np.ascontiguousarray(exact).view(np.uint32).reshape(len(to), rows, -1)
    to[:, : lanes.shape[2] * rows * 4].view(np.uint32).reshape(len(to), -1, rows)[:] = lanes.transpose(0, 2, 1)
