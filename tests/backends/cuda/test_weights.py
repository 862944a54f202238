"""Constants on the device: sizes as the ledger says, quantized types as the reference has them, shared ones once."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pelton.backends.cuda import stored, weights
from pelton.backends.cuda.packing import PackedWeight
from pelton.backends.cuda.triton.products import dequantize_rows
from pelton.build import plan
from pelton.config import EngineConfig
from pelton.graph import BF16, F16, F32, I32, Graph, GroupQuant
from pelton.graph import builder as g
from pelton.graph.ops import f32
from pelton.graph.quantized import HostTensor, QuantizedArray
from pelton.program import Program, lower
from pelton.quantize import QUANTIZATIONS, quantize, weight_type
from tests.backends.cuda.device import DEVICE
from tests.helpers.tiny_models import tiny_checkpoint

#: One of each way in which scales are stored, and one that no kernel reads: groups of 8.
TYPES = {
    **{name: weight_type(name) for name in QUANTIZATIONS},
    "minima": GroupQuant(4, 32, minimum=True, scale=F16),
    "zero points": GroupQuant(4, 32, zero_point=True, scale=F16),
    "groups of 8": GroupQuant(8, 8, scale=F16),
}


def product(dtype: object, rows: int = 7, cols: int = 64) -> Program:
    table = g.weight("table", (11, cols), F32)
    x = g.embedding(g.input_("token_ids", ("T",), I32), table)
    graph = Graph("one", (g.linear(x, g.concat(*(g.weight(n, (rows, cols), dtype) for n in ("a", "b")))),))
    return lower(graph, {"T": 4, "S": 4, "N": 4}, 8, stored.compute_type(graph))


def values_of(type: GroupQuant, seed: int) -> QuantizedArray:
    rng = np.random.default_rng(seed)
    if not (type.minimum or type.zero_point):
        return quantize(rng.standard_normal((7, 64)).astype(np.float32), type)
    codes, scale = rng.integers(0, 16, (7, 64)).astype(np.uint8), rng.random((7, 2)).astype(np.float16)
    low = rng.integers(0, 16, (7, 2)).astype(np.uint8) if type.zero_point else rng.random((7, 2)).astype(np.float16)
    return QuantizedArray(codes, scale, low, type)


@pytest.mark.parametrize("name", TYPES)
def test_quantized_weights_mean_on_the_device_what_the_file_says(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "_PIECE", 8 * 64 * 3)  # some rows at a time
    type = TYPES[name]
    values: dict[str, HostTensor] = {n: values_of(type, i) for i, n in enumerate("ab")}
    program = product(type)
    sent: list[int] = []
    values["table"] = np.zeros((11, 64), np.float32)
    held = weights.load(program, BF16, values.__getitem__, DEVICE, sent.append)
    index = next(i for i, c in enumerate(program.constants) if c.packing == "panels")
    want = np.concatenate([f32(values[n]) for n in "ab"])
    weight = held[index]
    if name == "groups of 8":
        assert isinstance(weight, torch.Tensor)
        # One rounding to bfloat16, of half a unit in the last place.
        assert np.abs(weight.float().cpu().numpy() - want).max() <= 2.0**-8 * np.abs(want).max()
    else:
        assert isinstance(weight, PackedWeight)
        got = torch.empty(14, 64, device=DEVICE)
        dequantize_rows(got, weight, None)
        np.testing.assert_array_equal(got.cpu().numpy(), want)
    assert sum(sent) == stored.device_bytes(program, BF16) == sum(t.nbytes for t in held)


def test_a_quantized_table_is_looked_up_as_it_is_stored() -> None:
    type = weight_type("int8")
    x = g.embedding(g.input_("token_ids", ("T",), I32), g.weight("table", (7, 64), type))
    graph = Graph("tied", (g.linear(x, g.weight("table", (7, 64), type)),))
    program = lower(graph, {"T": 4, "S": 4, "N": 4}, 8, BF16)
    held = weights.load(program, BF16, {"table": values_of(type, 0)}.__getitem__, DEVICE, lambda size: None)
    assert len(held) == 2 and held[0] is held[1]  # the output layer is the table: kept once
    assert stored.device_bytes(program, BF16) == held[0].nbytes == 7 * (64 + 2 * 2)


def test_a_tied_output_layer_is_the_table_of_embeddings() -> None:
    folder, _ = tiny_checkpoint("llama")
    planned = plan(EngineConfig(model=str(folder), device="cuda"))
    program = planned.program
    read = lambda name: planned.checkpoint.tensors[name].read()  # noqa: E731
    tensors = weights.load(program, F32, read, DEVICE, lambda size: None)
    dense = [t for t in tensors if isinstance(t, torch.Tensor)]
    assert len(dense) == len(tensors)
    packings = {c.packing: t for c, t in zip(program.constants, dense, strict=True) if t.shape == (101, 48)}
    assert packings["rows"].data_ptr() == packings["panels"].data_ptr()
    own = {t.data_ptr(): t.nbytes for t in dense}
    assert sum(own.values()) == stored.device_bytes(program, F32) == planned.ledger.weights


def test_products_run_in_the_type_of_most_weights() -> None:
    for dtype, compute in (("float32", F32), ("float16", F16), ("bfloat16", BF16)):
        folder, _ = tiny_checkpoint("llama", dtype)
        planned = plan(EngineConfig(model=str(folder), device="cuda"))
        assert stored.compute_type(planned.graph) == compute
        buffers = {b.dtype for b in planned.program.buffers}
        assert buffers == {F32, compute}  # sums between layers are float32
        assert planned.program.buffers[planned.program.output.buffer].dtype == F32
        assert {c.dtype for c in planned.program.caches} == {compute}
        assert not planned.notes
