"""Who computes a product: candidates against the first of them, what is missing, what is measured and kept."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from pelton.backends.cuda import packing, providers, tuning
from pelton.backends.cuda.device import Device
from pelton.backends.cuda.packing import PackedWeight
from pelton.backends.cuda.providers import Candidate, Problem, Scratch, candidates
from pelton.backends.cuda.tuning import Products, Tuner, kept_choices, rows_up_to
from pelton.backends.cuda.weights import Held
from pelton.errors import PeltonError
from pelton.graph import BF16, E4M3, F32, I8, DType, GroupQuant
from pelton.graph.types import ElementType
from pelton.quantize import quantize, weight_type
from tests.backends.cuda.device import DEVICE

BLOCKS = GroupQuant(8, 128, floating=True)


def weight_of(type: ElementType, rows: int, cols: int, *, blocks: bool = False) -> Held:
    values = np.random.default_rng(3).standard_normal((rows, cols)).astype(np.float32)
    if not isinstance(type, GroupQuant):
        return torch.from_numpy(values).to(DEVICE).to({BF16: torch.bfloat16, F32: torch.float32}[type])
    array = quantize(values, type)
    weight = packing.empty(type, rows, cols, DEVICE)
    parts = [p if p is None else torch.from_numpy(np.ascontiguousarray(p)).to(DEVICE) for p in array.parts()]
    codes, scale, *rest = parts
    assert codes is not None and scale is not None
    if blocks:  # 128 rows share their scales
        scale = scale[::128].repeat_interleave(128, 0)
    packing.write(weight, 0, codes, scale, *rest)
    return weight


@pytest.mark.parametrize(
    ("left", "type", "rows", "names"),
    [
        (BF16, BF16, 3, ["cuBLAS", "Triton"]),
        (BF16, BF16, 70, ["cuBLAS"]),
        (F32, weight_type("int4"), 3, ["Triton"]),
        (F32, weight_type("int4"), 70, ["Triton", "cuBLAS, expanded"]),
        (BF16, weight_type("int8"), 70, ["Triton", "cuBLAS, expanded"]),
        (I8, weight_type("w8a8"), 3, ["Triton"]),
        (I8, weight_type("w8a8"), 18, ["Triton", "cuBLASLt"]),
        (I8, weight_type("int8"), 18, ["Triton"]),
        (E4M3, weight_type("fp8"), 5, ["Triton", "cuBLASLt"]),
        (E4M3, weight_type("fp8"), 64, ["Triton", "Triton FP8", "cuBLASLt"]),
        (E4M3, BLOCKS, 64, ["Triton", "Triton FP8"]),
    ],
)
def test_candidates_agree(
    left: DType, type: ElementType, rows: int, names: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(providers, "_PIECE_BYTES", 1)  # 256 rows at a time: several pieces
    problem = Problem(rows, 272, 128, left, type, F32 if left == F32 else BF16)
    device, weight = Device(DEVICE), weight_of(type, 272, 128)
    scratch = Scratch.of([problem], device)
    found = candidates(problem, device, scratch)
    assert list(dict.fromkeys(re.sub(r" \d+x\d+, .*", "", c.name) for c in found)) == names
    x, bias = tuning._left_side(problem, DEVICE), torch.randn(272, device=DEVICE)
    results = []
    for candidate in found:
        run = candidate.bind(weight)
        assert run is not None
        for some in (rows, rows - 1):  # less than the most
            part = x[:some] if isinstance(x, torch.Tensor) else providers.Codes(x.codes[:some], x.scales[:, :some])
            out = torch.full((some, 272), float("nan"), dtype=torch.float32 if left == F32 else torch.bfloat16)
            run(out := out.to(DEVICE), part, bias)
        results.append(out.float())
    for result in results[1:]:  # float32: another order of sums; else one or two roundings of the result to 8 bits
        limit = 1e-5 if left == F32 else 2.0**-7
        assert float((result - results[0]).abs().max()) <= limit * float(results[0].abs().max())


def test_block_scales_go_through_cublaslt_if_they_are_blocks() -> None:
    weight, odd = weight_of(BLOCKS, 256, 256, blocks=True), weight_of(BLOCKS, 256, 256)
    assert isinstance(weight, PackedWeight) and isinstance(odd, PackedWeight)
    scales = weight.block_scales
    assert scales is not None and scales.stride() == (4, 1)  # a row of scales takes whole 16 bytes
    assert torch.equal(scales.repeat_interleave(128, 0).t().contiguous(), weight.scale)
    assert odd.block_scales is None
    problem = Problem(64, 256, 256, E4M3, BLOCKS, BF16)
    device = Device(DEVICE)
    names = [c.name for c in candidates(problem, device, Scratch.of([problem], device))]
    assert "cuBLASLt" in names
    products = Products(device, Scratch.of([problem], device))
    product = products.add(problem, odd)
    products.choose()  # where one does not take the weight, the next one does
    out = torch.empty(64, 256, dtype=torch.bfloat16, device=DEVICE)
    product(out, tuning._left_side(problem, DEVICE), None)
    assert bool(out.isfinite().all())


def test_what_is_missing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    device = Device(DEVICE)
    said = {(p.name, p.what): p.missing(device) for p in providers.PROVIDERS}
    assert said["FlashInfer", "FP8 x FP8, blocks of 128, few rows"] == "flashinfer is not installed"
    monkeypatch.setattr(Device, "capability", (8, 6))
    said = {(p.name, p.what): p.missing(device) for p in providers.PROVIDERS}
    assert said["Triton FP8", "FP8 x FP8 of many rows"] == "needs compute capability 8.9 or newer"
    assert said["cuBLASLt", "FP8 x FP8, one scale per row and per token"] == "needs compute capability 9.0 or newer"
    assert said["cuBLASLt", "FP8 x FP8, blocks of 128"] == "needs compute capability 9.0"
    assert said["Triton", "all types; floats x floats of few rows"] is None
    assert not device.has_fp8_products
    monkeypatch.setenv("PELTON_CUDA_WITHOUT", "cuBLASLt,FlashInfer")
    before = tuning.device_key(device)
    assert {p.missing(device) for p in providers.PROVIDERS if p.name in ("cuBLASLt", "FlashInfer")} == {
        "PELTON_CUDA_WITHOUT says so"
    }
    monkeypatch.delenv("PELTON_CUDA_WITHOUT")
    assert tuning.device_key(device) != before  # what was measured without them is not all there is


class Fakes:
    """Candidates for x @ 1 + bias that take a second, or so many."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.runs: list[str] = []
        self._clock = 0.0
        monkeypatch.setattr(Device, "mark", lambda device: _Moment(self._clock))

    def __call__(self, name: str, compute: Callable[[Any, Any], Any], seconds: float = 1.0) -> Candidate:
        def run(out: torch.Tensor, x: Any, bias: Any) -> None:
            self.runs.append(name)
            out.copy_(compute(x, 0 if bias is None else bias))
            self._clock += seconds

        return Candidate(name, lambda weight: run)


def failing(text: str) -> Callable[[Any, Any], Any]:
    def compute(x: Any, bias: Any) -> Any:
        raise RuntimeError(text)

    return compute


def test_choices_are_measured_once_and_kept(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PELTON_CACHE", str(tmp_path))
    problem, device, fake = Problem(4, 32, 32, F32, F32, F32), Device(DEVICE), Fakes(monkeypatch)
    found = [
        fake("slow", lambda x, b: x + b, 2.0), fake("wrong", lambda x, b: 1.1 * (x + b), 0.1),
        fake("fast", lambda x, b: 1.001 * (x + b)), fake("no bias", lambda x, b: x, 0.1),
        fake("broken", failing("no such size\nand more")), Candidate("picky", lambda weight: None),
        fake("nothing", lambda x, b: x * float("nan"), 0.1),
        fake("only bias", lambda x, b: x + b if isinstance(b, torch.Tensor) else x * float("nan"), 0.1),
    ]  # fmt: skip
    with pytest.warns(UserWarning, match="finding the fastest kernels"):
        assert Tuner(device).ordered(problem, found, torch.eye(32, device=DEVICE))[0].name == "fast"
    kept = kept_choices(device)[str(problem)]
    assert kept["choice"] == "fast" and kept["seconds"] == {"slow": 2.0, "fast": 1.0}
    assert kept["failed"]["broken"] == "no such size" and kept["failed"]["picky"] == "does not suit the weight"
    assert re.match(r"is wrong by 0\.", kept["failed"]["wrong"])
    assert {"no bias", "nothing", "only bias"} < set(kept["failed"])
    fake.runs.clear()
    assert Tuner(device).ordered(problem, found, torch.eye(32, device=DEVICE))[0].name == "fast" and not fake.runs
    (tmp_path / "products.json").write_text(json.dumps({tuning.device_key(device): [1]}))
    assert kept_choices(device) == {}  # damaged: measured again


@pytest.mark.filterwarnings("ignore:finding the fastest")
def test_a_candidate_that_mixes_scales_up_is_left_out(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PELTON_CACHE", str(tmp_path))
    problem, fake = Problem(8, 64, 64, I8, GroupQuant(8, 32), F32), Fakes(monkeypatch)

    def scaled(scales: Any) -> Callable[[Any, Any], Any]:
        return lambda x, b: (x.codes.float().view(-1, 2, 32) * scales(x.scales).t()[:, :, None]).view(-1, 64) + b

    found = [
        fake("right", scaled(lambda s: s)), fake("by group", scaled(lambda s: s.flip(0)), 0.1),
        fake("by row", scaled(lambda s: s.flip(1)), 0.1),
    ]  # fmt: skip
    assert Tuner(Device(DEVICE)).ordered(problem, found, torch.eye(64, device=DEVICE))[0].name == "right"


@pytest.mark.filterwarnings("ignore:finding the fastest")
def test_what_cannot_be_measured(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PELTON_CACHE", str(tmp_path))
    problem, device, fake = Problem(4, 32, 32, F32, F32, F32), Device(DEVICE), Fakes(monkeypatch)
    found = [fake("slower", lambda x, b: 0 * x + b, 2.0), fake("faster", lambda x, b: 0 * x + b)]
    # Weights that are not finite tell nothing about candidates, and nothing is kept; zeros do.
    broken = torch.full((32, 32), float("nan"), device=DEVICE)
    assert Tuner(device).ordered(problem, found, broken) == found and not kept_choices(device)
    assert Tuner(device).ordered(problem, found, torch.zeros(32, 32, device=DEVICE))[0].name == "faster"
    other = Problem(5, 32, 32, F32, F32, F32)
    failed = [fake("a", failing("no")), fake("cuBLASLt, x", failing("never"))]
    with pytest.raises(PeltonError, match=r"nothing on this GPU computes .*'a': 'no'.*; choose another quantization"):
        Tuner(device).ordered(other, failed, torch.eye(32, device=DEVICE))
    errors = iter([RuntimeError("illegal memory access\nand more")])

    def synchronize(device: Device) -> None:
        if error := next(errors):
            raise error

    monkeypatch.setattr(Device, "synchronize", synchronize)
    with pytest.raises(
        PeltonError, match=r"context \(illegal memory access\); leave it out: PELTON_CUDA_WITHOUT=cuBLASLt"
    ):
        Tuner(device).ordered(other, failed[::-1], torch.eye(32, device=DEVICE))


class _Moment:
    def __init__(self, time: float) -> None:
        self.time = time

    def wait(self) -> None:
        pass

    def seconds_since(self, earlier: _Moment) -> float:
        return self.time - earlier.time


def test_a_choice_serves_all_numbers_of_rows_up_to_its_own() -> None:
    assert rows_up_to(1) == [1] and rows_up_to(16) == [1, 16] and rows_up_to(300) == [1, 16, 64, 256, 300]
    device, served = Device(DEVICE), []
    problem = Problem(300, 32, 32, F32, F32, F32)
    product = tuning.Product(torch.zeros(32, 32), tuning._by_rows(problem))
    product.choose([lambda out, x, bias, p=p: served.append(p.rows) for p in product.problems])  # type: ignore[misc]
    for rows in (0, 1, 2, 16, 17, 256, 257, 300):
        product(torch.empty(rows, 32), torch.empty(rows, 32), None)
    assert served == [1, 16, 16, 64, 256, 300, 300]
    assert device.is_cuda or Scratch.of([problem], device).piece.numel() == 0
