"""Whole models in low precision: the oracle's logits on the same codes, activations rounded as the rule says."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from benchmarks.quality import rounded_products
from pelton.backends.cuda.activations import Activations, activations_of
from pelton.build import build, plan
from pelton.config import EngineConfig
from pelton.graph import E4M3, I8, GroupQuant
from pelton.quantize import QUANTIZATIONS, weight_type
from tests.backends.cuda.executors import executor
from tests.helpers.families import Sequences, tolerance
from tests.helpers.tiny_models import tiny_checkpoint

pytestmark = pytest.mark.filterwarnings("ignore:rows of 48|rows of 80")
TOKENS = [int(t) for t in np.random.default_rng(5).integers(3, 101, 21)]


def oracle(folder: Any, quantization: str) -> Any:
    """The reference executor."""
    config = EngineConfig(str(folder), device="reference", quantization=quantization, kv_cache_dtype="f32")  # type: ignore[arg-type]
    return build(config).executor


def steps(run: Any) -> npt.NDArray[Any]:
    """Logits of a prompt, of a token behind it, and of that beside another prompt."""
    sequences = Sequences(run)
    rows = [sequences.step(a=TOKENS), sequences.step(a=TOKENS[:1]), sequences.step(a=TOKENS[1:2], b=TOKENS[:7])]
    return np.concatenate(rows)


@pytest.mark.parametrize(("family", "quantization"), [*(("llama", q) for q in QUANTIZATIONS), ("gpt2", "int4")])
def test_codes_beside_floats_give_the_oracles_logits(family: str, quantization: str) -> None:
    folder, _ = tiny_checkpoint(family, layers=1)
    reference = oracle(folder, quantization)
    device = executor(
        folder, quantization=quantization, activations="float", dtype="f32", kv_cache_dtype="f32", max_num_seqs=2
    )
    assert not device._numerics.activations and device.precision == "f32"
    got, want = steps(device), steps(reference)
    assert np.abs(got - want).max() <= tolerance(4 * 80) * np.abs(want).max()  # both compute in float32
    device.close()


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize(("quantization", "choice", "precision"), [("fp8", "auto", "fp8"), ("w8a8", "int8", "int8")])
def test_codes_beside_codes_give_the_oracles_logits(
    family: str, quantization: str, choice: str, precision: str
) -> None:
    folder, _ = tiny_checkpoint(family, layers=1)
    reference = oracle(folder, quantization)
    device = executor(folder, quantization=quantization, dtype="f32", kv_cache_dtype="f32", max_num_seqs=2)
    assert device.precision == precision
    # The norms before qkv and gate_up, and the gated activation: not what attention gives, nor the hidden states.
    kernels = [
        c.kernel for c in device.program.calls if c.outputs and c.outputs[-1].buffer in device._numerics.quantized
    ]
    assert len(kernels) == 3 and {k.split("_")[-1] for k in kernels} == {"norm", "activation"}
    with rounded_products(reference, choice):
        got, want = steps(device), steps(reference)
    # A sum that differs in its last bit may round to the neighbouring code, one of 48 or 80 that make a sum: in FP8
    # 2**-3 of a number, and rarely two of them at once.
    assert np.abs(got - want).max() <= 2.0**-3 / 48 * np.abs(want).max()
    assert np.median(np.abs(got - want)) <= tolerance(4 * 80) * np.abs(want).max()
    device.close()


def test_what_weights_are_multiplied_with() -> None:
    fp8, blocks, mx = (
        GroupQuant(8, 0, floating=True),
        GroupQuant(8, 128, floating=True),
        GroupQuant(8, 32, floating=True),
    )
    for type in (fp8, blocks, mx):
        assert activations_of(type, "auto", True) == Activations(E4M3, type.group_size)
        assert activations_of(type, "auto", False) is None  # before Ada
        assert activations_of(type, "float", True) is None
    assert activations_of(GroupQuant(8, 16, floating=True), "auto", True) is None
    for type in (weight_type("int8"), weight_type("w8a8"), GroupQuant(4, 128, zero_point=True)):
        assert activations_of(type, "auto", True) is None
        assert activations_of(type, "int8", True) == Activations(I8, type.group_size)
    assert activations_of(weight_type("nvfp4"), "int8", True) is None


def test_w8a8_means_int8_activations_on_every_device() -> None:
    assert EngineConfig(quantization="w8a8").product_activations == "int8"
    assert EngineConfig(quantization="w8a8", activations="float").product_activations == "float"
    assert EngineConfig(quantization="int8").product_activations == "auto"


def test_the_ledger_counts_codes_and_scales() -> None:
    folder, _ = tiny_checkpoint("llama", "bfloat16", layers=1)
    sizes = {
        choice: plan(EngineConfig(str(folder), device="cuda", quantization=choice)).ledger.weights  # type: ignore[arg-type]
        for choice in (None, "fp8", "int4")
    }
    table, products, norms = 101 * 48, 48 * (48 + 2 * 16 + 48 + 2 * 80 + 80), 3 * 48
    rope = 256 * 8  # positions, turned columns
    assert sizes[None] == 2 * (table + products) + 4 * (norms + rope)
    # Rows are padded to 32 columns: those of 48 and 80 to 64 and 96. The head is int8 in groups of 16.
    out = {48: 48 + 2 * 16 + 48 + 2 * 80, 80: 48}
    head = 101 * (64 + 2 * 3)
    assert sizes["fp8"] == 2 * table + head + out[48] * (64 + 4) + out[80] * (96 + 4) + 4 * (norms + rope)
