"""Launches of products for :mod:`tests.backends.cuda.compile_kernels`: a layer of Llama 3.1 8B, tensors without data."""

from __future__ import annotations

import torch

from pelton.backends.cuda import packing
from pelton.backends.cuda.triton import products
from pelton.graph.types import BF16, E4M3, E8M0, F16, I8, ROW, U8, GroupQuant

_META = torch.device("meta")
_COLS, _ROWS, _SMS = 4096, 4096, 132
#: The types that models come in.
_TYPES = [
    GroupQuant(4, 32, scale=F16),
    GroupQuant(4, 32, True, F16),
    GroupQuant(4, 128, scale=BF16, zero_point=True),
    GroupQuant(8, 32, scale=F16),
    GroupQuant(8, ROW),
    GroupQuant(8, 128, floating=True),
    GroupQuant(4, 32, True, U8, outer=256),
    GroupQuant(5, 32, True, U8, outer=256),
    GroupQuant(3, 16, scale=I8, outer=256),
    GroupQuant(4, 32, scale=E8M0, floating=True),
    GroupQuant(4, 16, scale=E4M3, floating=True, outer=ROW),
]


def launch_products() -> None:
    """Each type at one token, with floats and with codes; the sizes of tiles with two of them."""
    for kind in _TYPES:
        weight = packing.empty(kind, _ROWS, _COLS, _META)
        products.dequantize_rows(torch.empty(4, _COLS, dtype=torch.bfloat16, device=_META), weight, None)
        rows = (1, 16, 64) if kind in _TYPES[:2] else (1,)
        for m in rows:
            _launch(weight, m, torch.bfloat16, True)
            if not kind.floating:
                _launch(weight, m, torch.int8, False)
        if kind.floating and kind.bits == 8:
            _launch(weight, 1, torch.float8_e4m3fn, False)
    _launch(packing.empty(_TYPES[0], _ROWS, _COLS, _META), 1, torch.float32, False)
    for dtype in (torch.bfloat16, torch.float32):
        _launch(torch.empty(_ROWS, _COLS, dtype=dtype, device=_META), 1, dtype, False)


def _launch(weight: packing.PackedWeight | torch.Tensor, m: int, dtype: torch.dtype, every: bool) -> None:
    """every: all tiles that would be tried, not the first only."""
    kind = weight.dtype if isinstance(weight, torch.Tensor) else weight.type
    x, out = (torch.empty(m, n, dtype=t, device=_META) for n, t in ((_COLS, dtype), (_ROWS, torch.bfloat16)))
    scales = None
    if not dtype.is_floating_point or dtype == torch.float8_e4m3fn:
        groups = kind.groups(_COLS) if isinstance(kind, GroupQuant) else 1
        scales = torch.empty(groups, m, device=_META)
    for tile in products.candidate_tiles(m, _ROWS, _COLS, kind, _SMS)[: None if every else 1]:
        workspace = torch.empty(products.workspace_size(m, _ROWS, tile), device=_META)
        products.product(out, x, scales, weight, None, tile, workspace)
