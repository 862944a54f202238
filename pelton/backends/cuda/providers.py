"""Who can compute a matrix product: one table of providers, asked for candidates by types, sizes and capability.

A provider whose package is missing, that the device is too old for, or that fails or disagrees when it is tried, is
left out and said so; Triton serves everything, so that is never an error.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import torch

from ...graph import BF16, E4M3, F32, I8, DType, GroupQuant
from ...graph.types import ElementType
from .device import Device
from .memory import TORCH_TYPES
from .packing import FP8_BLOCK, PackedWeight
from .triton import fp8_products
from .triton.products import ProductTile, candidate_tiles, dequantize_rows, product, workspace_size
from .triton.quantize import Codes
from .triton.rescale import rescale
from .weights import Held

Left: TypeAlias = "torch.Tensor | Codes"
#: out [rows, n], left [rows, k], bias [n] or None: starts the product, allocates and waits for nothing.
Run: TypeAlias = Callable[[torch.Tensor, Left, "torch.Tensor | None"], None]

#: Names of providers that are not asked, with commas between them.
EXCLUDE = "PELTON_CUDA_WITHOUT"
#: What products that go through memory work on at a time: less than the L2 cache of an H100, so that it stays there.
_PIECE_BYTES = 32 << 20
#: Rows from which on weights that are expanded once are multiplied often enough.
_EXPAND_ROWS = 33
#: Rows up to which a product of floats is worth a try of our own.
_FEW_ROWS = 16
#: Rows up to which a library that compiles kernels by the number of rows is asked: those that steps are recorded for.
_RECORDED_ROWS = 64
#: Rows from which on tensor cores have too much to do to multiply FP8 as float16.
_FP8_ROWS = 64


@dataclass(frozen=True, slots=True)
class Problem:
    """[rows, k] @ [n, k].T. rows: the most. left: type of the left side; I8 and E4M3 have scales as the weight has."""

    rows: int
    n: int
    k: int
    left: DType
    weight: ElementType
    out: DType

    def __str__(self) -> str:
        return f"{self.left} x {self.weight} -> {self.out}, {self.rows} x {self.n} x {self.k}"

    @property
    def is_row_scaled(self) -> bool:
        """One scale for each row of either side, and nothing else."""
        weight = self.weight
        return isinstance(weight, GroupQuant) and weight.group_size == 0 and not (weight.minimum or weight.zero_point)


class Scratch(NamedTuple):
    """partial: float32, flat, of sums that are still to be added. piece: bytes, flat, of weights or products."""

    partial: torch.Tensor
    piece: torch.Tensor

    @classmethod
    def of(cls, problems: list[Problem], device: Device) -> Scratch:
        partial, piece = scratch_sizes(problems, device)
        on = device.torch_device
        return cls(torch.empty(partial // 4, device=on), torch.empty(piece, dtype=torch.uint8, device=on))


def scratch_sizes(problems: list[Problem], device: Device) -> tuple[int, int]:
    """Bytes of both parts of a :class:`Scratch`."""
    sizes = [(0, 0)]
    for problem in problems:
        sizes += [provider.scratch(problem, device) for provider in _asked(problem, device)]
    partial, piece = zip(*sizes, strict=True)
    return max(partial), max(piece)


class Candidate(NamedTuple):
    """bind: to a weight; None where that weight does not suit."""

    name: str
    bind: Callable[[Held], Run | None]


@dataclass(frozen=True)
class Provider:
    """A row of the table. capability: the least, and where ``only`` is set no other. package: what must be installed.

    scratch: bytes of both parts of a :class:`Scratch` that its candidates use.
    """

    name: str
    what: str
    serves: Callable[[Problem], bool]
    candidates: Callable[[Problem, Device, Scratch], list[Candidate]]
    capability: tuple[int, int] = (8, 0)
    only: bool = False
    package: str | None = None
    scratch: Callable[[Problem, Device], tuple[int, int]] = lambda problem, device: (0, 0)

    def missing(self, device: Device) -> str | None:
        """Why it cannot be asked here; None if it can."""
        if self.name in os.environ.get(EXCLUDE, "").split(","):
            return f"{EXCLUDE} says so"
        if self.package is not None and importlib.util.find_spec(self.package) is None:
            return f"{self.package} is not installed"
        have, need = device.capability, self.capability
        if have is not None and (have < need or (self.only and have != need)):
            return f"needs compute capability {need[0]}.{need[1]}{'' if self.only else ' or newer'}"
        return None


def _asked(problem: Problem, device: Device) -> list[Provider]:
    return [p for p in PROVIDERS if p.serves(problem) and p.missing(device) is None]


def candidates(problem: Problem, device: Device, scratch: Scratch) -> list[Candidate]:
    """All that can be asked, the one to take without a measurement first."""
    return [c for provider in _asked(problem, device) for c in provider.candidates(problem, device, scratch)]


# ------------------------------------------------------------------ cuBLAS


def mm(out: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
    """out = x @ weight.T + bias. Products are of weight's type, sums float32, whatever out is rounded to."""
    x = x.to(weight.dtype)
    if out.dtype == weight.dtype:
        if bias is None:
            torch.mm(x, weight.t(), out=out)
        else:
            torch.addmm(bias.to(out.dtype), x, weight.t(), out=out)
        return
    if out.is_cuda and out.dtype == torch.float32:
        torch.mm(x, weight.t(), out_dtype=torch.float32, out=out)
    else:  # a host has no such product; nor is there one that rounds float32
        out.copy_(x.float() @ weight.float().t())
    _add(out, bias)


def _dense(problem: Problem, device: Device, scratch: Scratch) -> list[Candidate]:
    def bind(weight: Held) -> Run:
        assert isinstance(weight, torch.Tensor)
        return lambda out, x, bias: mm(out, _floats(x), weight, bias)

    return [Candidate("cuBLAS", bind)]


def _piece_rows(problem: Problem, bytes_per_row: int) -> int:
    """Rows of the weight of a piece."""
    return min(problem.n, max(256, _PIECE_BYTES // bytes_per_row // 256 * 256))


def _expanded_bytes(problem: Problem) -> int:
    return _piece_rows(problem, problem.k * problem.left.bits // 8) * problem.k * problem.left.bits // 8


def _expanded(problem: Problem, device: Device, scratch: Scratch) -> list[Candidate]:
    """Weights become floats piece by piece, which costs the same for any number of rows."""
    dtype = TORCH_TYPES[problem.left]
    step = _piece_rows(problem, problem.k * problem.left.bits // 8)
    expanded = scratch.piece[: _expanded_bytes(problem)].view(dtype).view(step, problem.k)

    def bind(weight: Held) -> Run:
        assert isinstance(weight, PackedWeight)

        def run(out: torch.Tensor, x: Left, bias: torch.Tensor | None) -> None:
            for first in range(0, problem.n, step):
                count = min(step, problem.n - first)
                dequantize_rows(expanded[:count], weight, None, first)
                mm(out[:, first : first + count], _floats(x), expanded[:count], _some(bias, first, count))

        return run

    return [Candidate("cuBLAS, expanded", bind)]


def _int_rows(problem: Problem) -> int:
    return _piece_rows(problem, 4 * problem.rows)


def _int8_lt(problem: Problem, device: Device, scratch: Scratch) -> list[Candidate]:
    """Exact sums go through memory, as there is no such product with scales."""
    step = _int_rows(problem)
    sums = scratch.piece[: 4 * problem.rows * step].view(torch.int32)

    def bind(weight: Held) -> Run:
        assert isinstance(weight, PackedWeight)
        codes, scale = weight.codes, weight.scale.view(-1)

        def run(out: torch.Tensor, x: Left, bias: torch.Tensor | None) -> None:
            assert isinstance(x, Codes)
            rows = len(out)
            for first in range(0, problem.n, step):
                count = min(step, problem.n - first)
                piece = sums[: rows * count].view(rows, count)
                torch._int_mm(x.codes, codes[first : first + count].t(), out=piece)
                rescale(
                    out[:, first : first + count], piece, x.scales[0], scale[first : first + count],
                    _some(bias, first, count),
                )  # fmt: skip

        return run

    return [Candidate("cuBLASLt", bind)]


def _fp8_rows_lt(problem: Problem, device: Device, scratch: Scratch) -> list[Candidate]:
    def bind(weight: Held) -> Run:
        assert isinstance(weight, PackedWeight)
        codes = weight.codes.t()

        def run(out: torch.Tensor, x: Left, bias: torch.Tensor | None) -> None:
            assert isinstance(x, Codes)
            # No fast accumulation: Hopper would add up in 14 bits.
            torch._scaled_mm(
                x.codes, codes, scale_a=x.scales[0].unsqueeze(1), scale_b=weight.scale, out_dtype=out.dtype, out=out,
                use_fast_accum=False,
            )  # fmt: skip
            _add(out, bias)

        return run

    return [Candidate("cuBLASLt", bind)]


def _fp8_blocks_lt(problem: Problem, device: Device, scratch: Scratch) -> list[Candidate]:
    ours = _fp8_triton if problem.rows >= _FP8_ROWS else _triton
    fallback = ours(problem, device, scratch)[0]

    def bind(weight: Held) -> Run | None:
        assert isinstance(weight, PackedWeight)
        codes, scales, other = weight.codes.t(), weight.block_scales, fallback.bind(weight)
        if scales is None or other is None:
            return None

        def run(out: torch.Tensor, x: Left, bias: torch.Tensor | None) -> None:
            assert isinstance(x, Codes)
            if len(out) % 4:  # scales would have to lie otherwise
                other(out, x, bias)
                return
            torch._scaled_mm(
                x.codes, codes, scale_a=x.scales.t(), scale_b=scales.t(), out_dtype=out.dtype, out=out,
                use_fast_accum=False,
            )  # fmt: skip
            _add(out, bias)

        return run

    return [Candidate("cuBLASLt", bind)]


# ------------------------------------------------------------------ others


def _tiles(problem: Problem, device: Device) -> list[ProductTile]:
    weight = problem.weight
    kind = weight if isinstance(weight, GroupQuant) else TORCH_TYPES[weight]
    return candidate_tiles(problem.rows, problem.n, problem.k, kind, device.num_sms)


def _triton(problem: Problem, device: Device, scratch: Scratch) -> list[Candidate]:
    def candidate(tile: ProductTile) -> Candidate:
        def bind(weight: Held) -> Run:
            def run(out: torch.Tensor, x: Left, bias: torch.Tensor | None) -> None:
                if isinstance(x, Codes):
                    product(out, x.codes, x.scales, weight, bias, tile, scratch.partial)
                else:
                    product(out, x, None, weight, bias, tile, scratch.partial)

            return run

        rows, cols, splits, warps, stages = tile
        return Candidate(f"Triton {rows}x{cols}, {splits} splits, {warps} warps, {stages} stages", bind)

    return [candidate(tile) for tile in _tiles(problem, device)]


def _fp8_triton(problem: Problem, device: Device, scratch: Scratch) -> list[Candidate]:
    def candidate(tile: fp8_products.Fp8Tile) -> Candidate:
        def bind(weight: Held) -> Run:
            assert isinstance(weight, PackedWeight)
            shared = _is_fp8_blocks(problem) and weight.block_scales is not None

            def run(out: torch.Tensor, x: Left, bias: torch.Tensor | None) -> None:
                assert isinstance(x, Codes)
                fp8_products.fp8_product(out, x, weight, bias, tile, shared)

            return run

        rows, cols, warps, stages = tile
        return Candidate(f"Triton FP8 {rows}x{cols}, {warps} warps, {stages} stages", bind)

    return [candidate(tile) for tile in fp8_products.candidate_tiles(problem.rows, problem.n, device.num_sms)]


def _flashinfer_blocks(problem: Problem, device: Device, scratch: Scratch) -> list[Candidate]:
    """DeepGEMM's kernels for blocks of 128, in ``fp8_blockscale_gemm_sm90``."""

    def bind(weight: Held) -> Run | None:
        try:
            from flashinfer.gemm import fp8_blockscale_gemm_sm90  # type: ignore[import-not-found]
        except ImportError:  # another version, or one that does not load
            return None
        assert isinstance(weight, PackedWeight)
        codes, scales = weight.codes, weight.block_scales
        if scales is None:
            return None
        scales = scales.contiguous()

        def run(out: torch.Tensor, x: Left, bias: torch.Tensor | None) -> None:
            assert isinstance(x, Codes)
            fp8_blockscale_gemm_sm90(x.codes, codes, x.scales, scales, out=out)
            _add(out, bias)

        return run

    return [Candidate("FlashInfer", bind)]


def _add(out: torch.Tensor, bias: torch.Tensor | None) -> None:
    if bias is not None:
        out.add_(bias)


def _floats(x: Left) -> torch.Tensor:
    assert isinstance(x, torch.Tensor)
    return x


def _some(bias: torch.Tensor | None, first: int, count: int) -> torch.Tensor | None:
    return None if bias is None else bias[first : first + count]


def _is_codes(problem: Problem) -> bool:
    return problem.left in (I8, E4M3)


def _is_fp8(problem: Problem) -> bool:
    weight = problem.weight
    fp8 = isinstance(weight, GroupQuant) and weight.floating and weight.bits == 8 and weight.group_size % 32 == 0
    return problem.left == E4M3 and fp8


def _is_fp8_blocks(problem: Problem) -> bool:
    weight = problem.weight
    blocks = isinstance(weight, GroupQuant) and weight.group_size == FP8_BLOCK and weight.scale == F32
    return _is_fp8(problem) and blocks and problem.n % FP8_BLOCK == 0 and problem.k % FP8_BLOCK == 0


#: In the order of trust: of candidates that nobody has timed, the first is taken.
PROVIDERS: tuple[Provider, ...] = (
    Provider(
        "cuBLAS", "floats x floats", lambda p: not isinstance(p.weight, GroupQuant), _dense,
    ),
    Provider(
        "Triton", "all types; floats x floats of few rows",
        lambda p: isinstance(p.weight, GroupQuant) or (p.rows <= _FEW_ROWS and p.left == p.weight), _triton,
        scratch=lambda p, device: (max(4 * workspace_size(p.rows, p.n, tile) for tile in _tiles(p, device)), 0),
    ),
    Provider(
        "Triton FP8", "FP8 x FP8 of many rows", lambda p: _is_fp8(p) and p.rows >= _FP8_ROWS, _fp8_triton,
        capability=(8, 9),
    ),
    Provider(
        "cuBLAS, expanded", "floats x codes of many rows: weights become floats, 32 MiB at a time",
        lambda p: isinstance(p.weight, GroupQuant) and not _is_codes(p) and p.rows >= _EXPAND_ROWS, _expanded,
        scratch=lambda p, device: (0, _expanded_bytes(p)),
    ),
    Provider(
        "cuBLASLt", "int8 x int8, one scale per row and per token",
        lambda p: p.left == I8 and p.is_row_scaled and p.weight == GroupQuant(8, 0)
        and p.rows > 16 and p.n % 8 == 0 and p.k % 8 == 0,
        _int8_lt, scratch=lambda p, device: (0, 4 * p.rows * _int_rows(p)),
    ),
    Provider(
        "cuBLASLt", "FP8 x FP8, one scale per row and per token",
        lambda p: p.left == E4M3 and p.is_row_scaled and p.n % 16 == 0 and p.k % 16 == 0,
        _fp8_rows_lt, capability=(9, 0),
    ),
    Provider(
        "cuBLASLt", "FP8 x FP8, blocks of 128", lambda p: _is_fp8_blocks(p) and p.rows > _FEW_ROWS, _fp8_blocks_lt,
        capability=(9, 0), only=True,
    ),
    Provider(
        "FlashInfer", "FP8 x FP8, blocks of 128, few rows",
        lambda p: _is_fp8_blocks(p) and p.out == BF16 and p.rows <= _RECORDED_ROWS, _flashinfer_blocks,
        capability=(9, 0), only=True, package="flashinfer",
    ),
)  # fmt: skip
