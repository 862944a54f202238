"""Quantized checkpoints as they lie on the hub, on the device: transformers' logits on the values of their codes."""

from __future__ import annotations

import numpy as np
import pytest

from pelton.graph import DType, GroupQuant
from tests.backends.cuda.executors import executor
from tests.checkpoint.test_quantized_hf import TOKENS, model
from tests.helpers.families import Sequences, tolerance

#: One of each method and layout. Blocks of 24 x 40 are groups of 8, which no kernel reads: those become floats.
SOME = ["gptq-3", "awq", "w8a8-asymmetric", "fp8-dynamic", "fp8-blocks", "nvfp4"]


@pytest.mark.parametrize("format", SOME)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_logits_are_those_of_the_values(format: str) -> None:
    folder, want = model("Llama", format)
    device = executor(
        folder, dtype="f32", activations="float", kv_cache_dtype="f32", max_num_seqs=1, max_num_batched_tokens=32,
        graphs=False,
    )  # fmt: skip
    panels = {c.expr.tensor.dtype for c in device.program.constants if c.packing == "panels" and c.expr is not None}
    assert any(isinstance(type, GroupQuant) for type in panels) and any(isinstance(type, DType) for type in panels)
    got = Sequences(device).step(a=TOKENS)[0]
    device.close()
    assert np.abs(got - want).max() <= tolerance(2 * 4 * 64) * np.abs(want).max()  # both compute in f32
