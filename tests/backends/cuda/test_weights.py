"""Constants on the device: sizes as the ledger says, quantized types as the reference has them, shared ones once."""

from __future__ import annotations

import numpy as np
import pytest

from pelton.backends.cuda import weights
from pelton.build import plan
from pelton.config import EngineConfig
from pelton.graph import BF16, F16, F32, I32, Graph, GroupQuant
from pelton.graph import builder as g
from pelton.graph.quantized import QuantizedArray
from pelton.program import Program, lower
from pelton.quantize import QUANTIZATIONS, quantize, weight_type
from tests.backends.cuda.device import DEVICE
from tests.helpers.tiny_models import tiny_checkpoint

TYPES = {
    **{name: weight_type(name) for name in QUANTIZATIONS},
    "minima": GroupQuant(4, 32, minimum=True, scale=F16),
    "zero points": GroupQuant(4, 32, zero_point=True, scale=F16),
}


def product(dtype: object, rows: int = 7, cols: int = 64) -> Program:
    table = g.weight("table", (11, cols), F32)
    x = g.embedding(g.input_("token_ids", ("T",), I32), table)
    graph = Graph("one", (g.linear(x, g.concat(*(g.weight(n, (rows, cols), dtype) for n in ("a", "b")))),))
    return lower(graph, {"T": 4, "S": 4, "N": 4}, 8, weights.compute_type(graph))


@pytest.mark.parametrize("name", TYPES)
def test_quantized_weights_are_dequantized_as_the_reference_does(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "_PIECE", 8 * 64 * 3)  # three rows at a time
    type, rng = TYPES[name], np.random.default_rng(1)
    dense = {n: rng.standard_normal((7, 64)).astype(np.float32) for n in ("a", "b")}
    if type.minimum or type.zero_point:
        groups = (7, 2)
        low = rng.integers(0, 16, groups).astype(np.uint8) if type.zero_point else rng.random(groups).astype(np.float16)
        values = {
            n: QuantizedArray(
                rng.integers(0, 16, (7, 64)).astype(np.uint8), rng.random(groups).astype(np.float16), low, type
            )
            for n in dense
        }
    else:
        values = {n: quantize(v, type, n) for n, v in dense.items()}
    program = product(type)
    table = np.zeros((11, 64), np.float32)
    sent: list[int] = []
    tensors = weights.load(program, BF16, lambda n: {**values, "table": table}[n], DEVICE, sent.append)
    index = next(i for i, c in enumerate(program.constants) if c.packing == "panels")
    want = np.concatenate([values[n].dequantize() for n in ("a", "b")])
    got = tensors[index].float().cpu().numpy()
    # One rounding to bfloat16, of half a unit in the last place.
    assert np.abs(got - want).max() <= 2.0**-8 * np.abs(want).max() and got.shape == (14, 64)
    assert sum(sent) == weights.device_bytes(program, BF16) == sum(t.nbytes for t in tensors)


def test_a_tied_output_layer_is_the_table_of_embeddings() -> None:
    folder, _ = tiny_checkpoint("llama")
    planned = plan(EngineConfig(model=str(folder), device="cuda"))
    program = planned.program
    read = lambda name: planned.checkpoint.tensors[name].read()  # noqa: E731
    tensors = weights.load(program, F32, read, DEVICE, lambda size: None)
    packings = {c.packing: t for c, t in zip(program.constants, tensors, strict=True) if t.shape == (101, 48)}
    assert packings["rows"].data_ptr() == packings["panels"].data_ptr()
    own = {t.data_ptr(): t.nbytes for t in tensors}
    assert sum(own.values()) == weights.device_bytes(program, F32) == planned.ledger.weights


def test_products_run_in_the_type_of_most_weights() -> None:
    for stored, compute in (("float32", F32), ("float16", F16), ("bfloat16", BF16)):
        folder, _ = tiny_checkpoint("llama", stored)
        planned = plan(EngineConfig(model=str(folder), device="cuda"))
        assert weights.compute_type(planned.graph) == compute
        buffers = {b.dtype for b in planned.program.buffers}
        assert buffers == {F32, compute}  # sums between layers are float32
        assert planned.program.buffers[planned.program.output.buffer].dtype == F32
        assert {c.dtype for c in planned.program.caches} == {compute}
        assert not planned.notes
