"""Low-rank adapters in device memory: as ``triton/lora.py`` reads them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from ...graph import AdapterType
from ..host import AdapterPart
from .memory import TORCH_TYPES
from .triton.lora import lora_parts


class AdapterTensors:
    """The adapters of one product; zeros where there is none, and for the ranks that one does not have.

    a: [slots, parts * max_rank, in_features]. b: [slots, columns, max_rank]. scratch: float32 [rows, parts * max_rank].
    """

    def __init__(self, type: AdapterType, scratch: torch.Tensor) -> None:
        dtype, device = TORCH_TYPES[type.dtype], scratch.device
        ranks = len(type.widths) * type.max_rank
        self._type = type
        self.a = torch.zeros(type.slots, ranks, type.in_features, dtype=dtype, device=device)
        self.b = torch.zeros(type.slots, sum(type.widths), type.max_rank, dtype=dtype, device=device)
        self.parts = lora_parts(type.widths, device)
        self.scratch = scratch[:, :ranks]

    def write(self, slot: int, parts: Sequence[AdapterPart]) -> None:
        """Make a slot, from 1 on, hold an adapter; (A [rank, in], B [width, rank]) per part, or None."""
        a, b = self.a[slot - 1].zero_(), self.b[slot - 1].zero_()
        column = 0
        for index, (part, width) in enumerate(zip(parts, self._type.widths, strict=True)):
            if part is not None:
                rank, first = len(part[0]), index * self._type.max_rank
                a[first : first + rank].copy_(torch.from_numpy(np.ascontiguousarray(part[0])))
                b[column : column + width, :rank].copy_(torch.from_numpy(np.ascontiguousarray(part[1])))
            column += width


def adapter_bytes(type: AdapterType) -> int:
    """Device memory of the adapters of one product."""
    ranks = len(type.widths) * type.max_rank
    return type.slots * (ranks * type.in_features + sum(type.widths) * type.max_rank) * type.dtype.bits // 8
