"""Launches of FP8 products of many rows for :mod:`tests.backends.cuda.compile_kernels`: layers of Llama 3.1 8B."""

from __future__ import annotations

import torch

from pelton.backends.cuda import packing
from pelton.backends.cuda.triton import fp8_products
from pelton.backends.cuda.triton.quantize import Codes
from pelton.graph.types import E8M0, ROW, GroupQuant

_META = torch.device("meta")
_M, _SMS = 512, 132


def launch_fp8_products() -> None:
    """All tiles with the most factors; each other kind of factors and sizes once."""
    _launch(GroupQuant(8, 128, floating=True), 4096, 4096, False, True)
    _launch(GroupQuant(8, 128, floating=True), 4096, 4096, True, False)
    _launch(GroupQuant(8, 32, scale=E8M0, floating=True), 4096, 4096, False, False)
    _launch(GroupQuant(8, ROW, floating=True), 4096, 4096, False, False)
    _launch(GroupQuant(8, ROW, floating=True), 4100, 4112, False, False)


def _launch(kind: GroupQuant, n: int, k: int, shared: bool, every: bool) -> None:
    """every: all tiles that would be tried, not the first only."""
    weight = packing.empty(kind, n, k, _META)
    codes = torch.empty(_M, k, dtype=torch.float8_e4m3fn, device=_META)
    x = Codes(codes, torch.empty(kind.groups(k), _M, device=_META))
    out = torch.empty(_M, n, dtype=torch.bfloat16, device=_META)
    for tile in fp8_products.candidate_tiles(_M, n, _SMS)[: None if every else 1]:
        fp8_products.fp8_product(out, x, weight, None, tile, shared)
