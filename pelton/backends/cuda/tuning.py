"""Which candidate computes a product: on a GPU the fastest, found once per device and kept on disk."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import os
import warnings
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import triton

from ...errors import PeltonError
from ...graph import E4M3, I8, GroupQuant
from ...graph.types import ElementType
from ...paths import cache_dir
from ...program import ConstantRef, Program, View
from .activations import Activations, Numerics
from .device import Device
from .memory import TORCH_TYPES, CodeMemory
from .providers import EXCLUDE, PROVIDERS, Candidate, Left, Problem, Run, Scratch, candidates
from .stored import PRODUCTS, device_types, product_operands, shape_of
from .triton.products import dequantize_rows
from .triton.quantize import Codes
from .weights import Held

#: Products of up to so many rows share a choice.
ROWS = (1, 16, 64, 256, 1024, 4096)
#: Of the largest result: weights may be rounded to 8 bits, results are, and sums run in another order.
_TOLERANCE = 2.0**-6
_TRIES = 5
#: Rows of a weight that are expanded at a time, for what candidates are compared with.
_PIECE_ROWS = 4096
#: More than any L2 cache holds: a layer's weights come from memory, not from the try before.
_FLUSHED_BYTES = 256 << 20


def rows_up_to(most: int) -> list[int]:
    """The largest number of rows of each choice."""
    return [*(rows for rows in ROWS if rows < most), most]


def product_of(
    program: Program, numerics: Numerics, types: Sequence[ElementType], out: View, x: View, weight: ConstantRef
) -> Problem:
    """What a call of ``PRODUCTS`` asks for in the largest step. types: of the constants."""
    n, k = shape_of(program.constants[weight.index])
    wanted, to = numerics.activations.get(weight.index), program.buffers[out.buffer]
    left = wanted.codes if wanted else program.buffers[x.buffer].dtype
    return Problem(program.limits[to.rows], n, k, left, types[weight.index], to.dtype)


def problems_of(program: Program, numerics: Numerics) -> list[Problem]:
    """All different products of a program, for each number of rows that has a choice of its own."""
    types = device_types(program, numerics.compute)
    found: dict[Problem, None] = {}
    for call in program.calls:
        if call.kernel in PRODUCTS:
            x, weight = product_operands(call)
            found[product_of(program, numerics, types, call.outputs[0], x, weight)] = None
    return [problem for most in found for problem in _by_rows(most)]


def _by_rows(most: Problem) -> list[Problem]:
    return [replace(most, rows=rows) for rows in rows_up_to(most.rows)]


class Product:
    """A product with one weight, of any number of rows."""

    def __init__(self, weight: Held, problems: list[Problem]) -> None:
        self.weight = weight
        self.problems = problems
        self._limits = [problem.rows for problem in problems]
        self._runs: list[Run] = []

    def choose(self, runs: list[Run]) -> None:
        """runs: one per problem."""
        self._runs = runs

    def __call__(self, out: torch.Tensor, x: Left, bias: torch.Tensor | None) -> None:
        if len(out):
            self._runs[bisect_left(self._limits, len(out))](out, x, bias)


class Products:
    """All products of a model; ready for use when :meth:`choose` has run."""

    def __init__(self, device: Device, scratch: Scratch) -> None:
        self._device = device
        self._scratch = scratch
        self._products: list[Product] = []

    def add(self, most: Problem, weight: Held) -> Product:
        product = Product(weight, _by_rows(most))
        self._products.append(product)
        return product

    def choose(self) -> None:
        """Find out who computes what: where nothing is measured, the first candidate."""
        by_problem: dict[Problem, list[Candidate]] = {}
        samples = {problem: product.weight for product in self._products for problem in product.problems}
        tuner = Tuner(self._device) if self._device.is_cuda else None
        for problem, weight in samples.items():
            found = candidates(problem, self._device, self._scratch)
            by_problem[problem] = found if tuner is None else tuner.ordered(problem, found, weight)
        for product in self._products:
            product.choose([_bound(by_problem[problem], product.weight) for problem in product.problems])


def _bound(ordered: list[Candidate], weight: Held) -> Run:
    """The first that takes this weight."""
    return next(run for run in (candidate.bind(weight) for candidate in ordered) if run is not None)


class Tuner:
    """Times candidates on the device, and keeps what it finds."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._kept = kept_choices(device)
        self._told = False

    def ordered(self, problem: Problem, found: list[Candidate], weight: Held) -> list[Candidate]:
        """The fastest first. weight: any of the problem's."""
        if len(found) == 1:
            return found
        key = str(problem)
        if key not in self._kept:
            if not self._told:
                self._told = True
                warnings.warn(
                    f"finding the fastest kernels for {self._device.name}: once, it may take a minute", stacklevel=2
                )
            measured = self._measured(problem, found, weight)
            if measured is None:  # nothing to compare: some weights are not finite
                return found
            self._kept[key] = measured
            self._keep()
        return sorted(found, key=lambda candidate: candidate.name != self._kept[key]["choice"])

    def _keep(self) -> None:
        path = _path()
        kept = _read(path) | {device_key(self._device): self._kept}
        with contextlib.suppress(OSError):  # only a shortcut: without it the next start measures again
            path.parent.mkdir(parents=True, exist_ok=True)
            written = path.with_suffix(f".{os.getpid()}")
            written.write_text(json.dumps(kept, indent=1))
            written.replace(path)

    @cached_property
    def _flushed(self) -> torch.Tensor:
        size = _FLUSHED_BYTES if self._device.is_cuda else 1
        return torch.zeros(size, dtype=torch.uint8, device=self._device.torch_device)

    def _measured(self, problem: Problem, found: list[Candidate], weight: Held) -> dict[str, Any] | None:
        """choice, seconds by candidate, and why others were left out; None if results are not finite."""
        on, dtype = self._device.torch_device, TORCH_TYPES[problem.out]
        x = _left_side(problem, on)
        out = torch.empty(problem.rows, problem.n, dtype=dtype, device=on)
        bias = torch.randn(problem.n, device=on).to(dtype)
        want = _expected(x, weight, problem.n)
        if not bool(want.isfinite().all()):
            return None
        largest = max(float(part.abs().max()) for part in want.split(256)) or 1.0
        seconds: dict[str, float] = {}
        failed: dict[str, str] = {}
        for candidate in found:
            try:  # libraries refuse sizes and types by exceptions of many kinds
                run = candidate.bind(weight)
                if run is None:
                    failed[candidate.name] = "does not suit the weight"
                    continue
                differences = []
                # An odd number of rows, and what is added, are checked, too.
                for rows, added in ((problem.rows, None), (max(1, problem.rows - 1), bias)):
                    run(out[:rows].fill_(float("nan")), _some(x, rows), added)
                    self._device.synchronize()
                    differences.append(_difference(out[:rows], want[:rows], added))
                worst = float(np.max(differences))  # NaN if one is
                if not worst <= _TOLERANCE * largest:
                    failed[candidate.name] = f"is wrong by {worst / largest:.3g} of the largest result"
                    continue
                seconds[candidate.name] = min(self._times(run, out, x))
            except Exception as error:
                failed[candidate.name] = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
                self._require_device(candidate)
        if not seconds:
            raise PeltonError(f"nothing on this GPU computes {problem}: {failed}", "choose another quantization")
        return {"choice": min(seconds, key=lambda name: seconds[name]), "seconds": seconds, "failed": failed}

    def _require_device(self, candidate: Candidate) -> None:
        """Raises PeltonError if a candidate has left the device unusable for this process."""
        try:
            self._device.synchronize()
        except RuntimeError as error:
            name = candidate.name.split(" ")[0].rstrip(",")
            raise PeltonError(
                f"{candidate.name} broke the GPU's context ({str(error).splitlines()[0]})",
                f"leave it out: {EXCLUDE}={name}",
            ) from error

    def _times(self, run: Run, out: torch.Tensor, x: Left) -> Iterator[float]:
        for _ in range(_TRIES):
            self._flushed.zero_()
            self._device.hold(1e-3)  # until the host has started it
            begin = self._device.mark()
            run(out, x, None)
            end = self._device.mark()
            end.wait()
            yield end.seconds_since(begin)


def _expected(x: Left, weight: Held, n: int) -> torch.Tensor:
    """x @ weight.T in float32, by torch, whatever either side is stored in. [rows, n]"""
    if isinstance(x, Codes):
        groups = x.scales.shape[0]
        floats = (x.codes.float().unflatten(1, (groups, -1)) * x.scales.t()[:, :, None]).flatten(1)
    else:
        floats = x.float()
    if isinstance(weight, torch.Tensor):
        return floats @ weight.float().t()
    want = torch.empty(len(floats), n, device=floats.device)
    for first in range(0, n, _PIECE_ROWS):
        part = want[:, first : first + _PIECE_ROWS]
        rows = torch.empty(part.shape[1], floats.shape[1], device=floats.device)
        dequantize_rows(rows, weight, None, first)
        torch.mm(floats, rows.t(), out=part)
    return want


def _difference(got: torch.Tensor, want: torch.Tensor, bias: torch.Tensor | None) -> float:
    """The largest of got - (want + bias); NaN if one is NaN. Some rows at a time: they may be many."""
    added = 0 if bias is None else bias.float()
    parts = zip(got.split(256), want.split(256), strict=True)
    return float(np.max([float((some.float() - (part + added)).abs().max()) for some, part in parts]))


def _some(x: Left, rows: int) -> Left:
    return x[:rows] if isinstance(x, torch.Tensor) else Codes(x.codes[:rows], x.scales[:, :rows])


def _left_side(problem: Problem, device: torch.device) -> Left:
    generator = torch.Generator(device).manual_seed(0)
    x = torch.randn(problem.rows, problem.k, generator=generator, device=device)
    if problem.left not in (I8, E4M3):
        return x.to(TORCH_TYPES[problem.left])
    assert isinstance(problem.weight, GroupQuant)
    wanted = Activations(problem.left, problem.weight.group_size)
    size = CodeMemory.size(wanted, problem.rows, problem.k)
    codes = CodeMemory(torch.empty(size, dtype=torch.uint8, device=device)).of(wanted, problem.rows, problem.k)
    codes.codes.copy_((32 * x).clamp(-127, 127))
    codes.scales.copy_((torch.rand(codes.scales.shape, generator=generator, device=device) + 0.5) / 32)
    return codes


def kept_choices(device: Device) -> dict[str, Any]:
    """By problem: choice, seconds by candidate, failed by candidate; what was measured on such a device before."""
    kept = _read(_path()).get(device_key(device), {})
    return kept if isinstance(kept, dict) else {}


def device_key(device: Device) -> str:
    """What choices hold for: the device, the libraries, and our own code as it is now."""
    code = hashlib.sha256()
    for file in sorted(Path(__file__).parent.rglob("*.py")):
        code.update(file.read_bytes())
    there = [f"{p.package}{_version(p.package)}" for p in PROVIDERS if p.package is not None and not p.missing(device)]
    left_out = os.environ.get(EXCLUDE, "")
    libraries = (f"cuda{torch.version.cuda}", f"torch{torch.__version__}", f"triton{triton.__version__}", *there)
    return ":".join((device.name, *libraries, code.hexdigest()[:12], *([f"without {left_out}"] if left_out else [])))


def _version(package: str) -> str:
    names = importlib.metadata.packages_distributions().get(package, [])
    return importlib.metadata.version(names[0]) if names else ""


def _path() -> Path:
    return cache_dir() / "products.json"


def _read(path: Path) -> dict[str, Any]:
    with contextlib.suppress(OSError, ValueError):
        kept = json.loads(path.read_text())
        if isinstance(kept, dict):
            return kept
    return {}
