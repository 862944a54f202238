"""Bytes of calls, as the device moves them: weights as codes, activations as codes or floats, the cache's writes."""

from __future__ import annotations

import pytest

from pelton.backends.cuda.activations import Numerics
from pelton.backends.cuda.costs import call_costs
from pelton.build import plan
from pelton.config import EngineConfig
from pelton.graph import BF16
from tests.backends.cuda.device import DEVICE as DEVICE  # before anything asks for a GPU
from tests.helpers.tiny_models import tiny_checkpoint

pytestmark = pytest.mark.filterwarnings("ignore:rows of 48|rows of 80")


def test_a_layer_in_fp8_moves_its_codes_and_scales() -> None:
    folder, _ = tiny_checkpoint("llama", "bfloat16", layers=1)  # 48 wide, 80 between, 6 heads of 8 over 2
    planned = plan(EngineConfig(str(folder), device="cuda", quantization="fp8", kv_cache_dtype="int8"))
    numerics = Numerics.of(planned.program, BF16, "auto", True)
    every = call_costs(planned.program, numerics)
    costs = {cost.call.name.rpartition(".")[2]: cost for cost in every}
    # Rows of weights are padded to 32 columns; a scale of 4 bytes each.
    assert costs["qkv_proj"].streamed == {"1": 80 * (64 + 4)} and costs["down_proj"].streamed == {"1": 48 * (96 + 4)}
    # The norm's codes with a scale come in, 16-bit floats go out.
    assert costs["qkv_proj"].activations == {"T": 48 + 4 + 2 * 80}
    # What attention gives becomes codes first, which are read again. Of the last layer only some rows are wanted.
    assert costs["o_proj"].activations == {"N": 2 * 48 + 2 * (48 + 4) + 2 * 48}
    write = next(cost for cost in costs.values() if cost.call.kernel == "rope_kv_write")
    assert write.streamed == {"T": 2 * 2 * (8 + 4)}  # keys and values of two heads
    assert {name: cost.precision for name, cost in costs.items() if name.endswith("_proj")} == dict.fromkeys(
        ("qkv_proj", "o_proj", "gate_up_proj", "down_proj"), "fp8"
    )
    assert every[-1].call.name == "lm_head" and every[-1].precision == "bf16"  # int8 in groups, beside floats
