"""Quantized checkpoints as they lie on the hub, on the device: transformers' logits on the values of their codes."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from benchmarks.quality import rounded_products
from pelton.backends.cuda.activations import Activations
from pelton.backends.cuda.executor import CudaExecutor
from pelton.build import build
from pelton.config import EngineConfig
from pelton.graph import E4M3, DType, GroupQuant
from tests.backends.cuda.executors import executor
from tests.checkpoint.test_quantized_hf import TOKENS, model
from tests.helpers.families import Sequences, tolerance

#: One of each method and layout. Blocks of 24 x 40 are groups of 8, which no kernel reads: those become floats.
SOME = ["gptq-3", "awq", "w8a8-asymmetric", "fp8-dynamic", "fp8-blocks", "nvfp4"]


def step(format: str, **options: str) -> tuple[CudaExecutor, npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """The executor, closed, its logits behind a prompt, and those wanted."""
    folder, want = model("Llama", format)
    device = executor(
        folder, dtype="f32", kv_cache_dtype="f32", max_num_seqs=1, max_num_batched_tokens=32, graphs=False, **options
    )
    got = Sequences(device).step(a=TOKENS)[0]
    device.close()
    return device, got, want


@pytest.mark.parametrize("format", SOME)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_logits_are_those_of_the_values(format: str) -> None:
    device, got, want = step(format, activations="float")
    panels = {c.expr.tensor.dtype for c in device.program.constants if c.packing == "panels" and c.expr is not None}
    assert any(isinstance(type, GroupQuant) for type in panels) and any(isinstance(type, DType) for type in panels)
    assert np.abs(got - want).max() <= tolerance(2 * 4 * 64) * np.abs(want).max()  # both compute in f32


def test_blocks_of_fp8_meet_fp8_activations_in_groups() -> None:
    device, got, _ = step("fp8-blocks-whole")
    assert device.precision == "fp8"
    assert set(device._numerics.activations.values()) == {Activations(E4M3, 32)}
    folder, _ = model("Llama", "fp8-blocks-whole")
    oracle = build(EngineConfig(str(folder), device="reference", kv_cache_dtype="f32")).executor
    with rounded_products(oracle, "auto"):
        want = Sequences(oracle).step(a=TOKENS)[0]
    # A last bit that differs may flip a code, one of 64 or 96 that make a sum, by 2**-3 of its number.
    assert np.abs(got - want).max() <= 2.0**-3 / 64 * np.abs(want).max()
    assert np.median(np.abs(got - want)) <= tolerance(2 * 4 * 64) * np.abs(want).max()
