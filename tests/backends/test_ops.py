"""Every op on every ISA tier against its row of the op table: one-op graphs, odd sizes, ragged batches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from pelton.backends.base import Batch, KVSpec, ScheduledSequence
from pelton.backends.cpu import _native
from pelton.backends.cpu.calls import SAME_KERNEL
from pelton.backends.cpu.executor import CpuExecutor
from pelton.backends.reference.executor import ReferenceExecutor
from pelton.graph import BF16, E4M3, F16, F32, I8, I32, OPS, AdapterType, CacheType, Graph, GroupQuant, Node, make
from pelton.graph import builder as g
from pelton.graph.quantized import QuantizedArray
from pelton.nn import Step
from pelton.program import lower
from tests.helpers.families import backends, spec

ISAS = [b for b in backends() if b != "reference"]
VOCAB, BLOCKS, BLOCK = 61, 12, 16
STEP = Step()
ROWS = g.input_("logits_rows", ("L",), I32)
#: Without a kernel of their own.
COSTLESS = {"input", "weight", "slice", "first_rows", "item", "concat", "transpose", "permute_rows"}


def x(cols: int, name: str = "x") -> Node:
    """Random activations [T, cols]: rows of a table, looked up by the step's tokens."""
    return g.embedding(STEP.token_ids, g.weight(name, (VOCAB, cols), F32))


def cached(cols_q: int, heads: int, kv_heads: int, dtype: Any, rope: dict[str, Any] | None, **attrs: Any) -> Node:
    dim = cols_q // heads
    cache = g.cache_input("kv.0", CacheType(kv_heads, dim, dtype))
    q, k, v = x(cols_q, "q"), x(dim * kv_heads, "k"), x(dim * kv_heads, "v")
    if rope is not None:
        pair = make("rope_kv_write", cache, q, k, v, STEP.positions, STEP.slot_mapping, head_dim=dim, **rope)
        q, written = g.item(pair, 0), g.item(pair, 1)
    else:
        written = g.kv_write(cache, k, v, STEP.slot_mapping)
    defaults = {"num_heads": heads, "scale": dim**-0.5, "window": 0, "softcap": 0.0, "alibi": False}
    tables = (STEP.block_table, STEP.seq_lens, STEP.query_start_loc)
    return g.attention(q, written, *tables, **(defaults | attrs))


def fused(op: str, cols: int, with_bias: bool) -> Node:
    weights = [g.weight(n, (cols,), F32) for n in ("w", "b")[: 1 + with_bias]]
    attrs = {"eps": 1e-5, "weight_offset": 0.5} if op == "add_rms_norm" else {"eps": 1e-5}
    pair = make(op, x(cols), x(cols, "y"), *weights, **attrs)
    return g.mul(g.item(pair, 0), g.item(pair, 1))  # both results count


def wide(n: int, k: int, dtype: Any, bias: bool = True) -> Node:
    return g.linear(x(k), g.weight("w", (n, k), dtype), g.weight("b", (n,), F32) if bias else None)


def gated(k: int, dtype: Any, bias: Any) -> Node:
    return g.gated_linear(
        x(k), g.weight("w", (128, k), dtype), None if bias is None else g.weight("b", (128,), bias), "gelu_tanh"
    )


def adapted(cols: int, widths: tuple[int, ...], dtype: Any) -> Node:
    modules, orders = tuple(f"m.{w}" for w in widths), (((widths[0],), (0,)), *[None] * (len(widths) - 1))
    table = make("input", type=AdapterType(2, 5, cols, widths, dtype), name="lora", modules=modules, row_orders=orders)
    return g.lora(x(sum(widths), "y"), x(cols), table, g.input_("lora_slots", ("T",), I32))


ROPE = {"rotary_dim": 6, "theta": 100.0}
#: name -> (graph, whether products round to bf16 on tiers with bf16 dot products)
CASES: dict[str, tuple[Callable[[], Node], bool]] = {
    "embedding f32": (lambda: x(37), False),
    "embedding bf16": (lambda: g.embedding(STEP.token_ids, g.weight("t", (VOCAB, 37), BF16)), False),
    "embedding int4": (lambda: g.embedding(STEP.token_ids, g.weight("t", (VOCAB, 64), GroupQuant(4, 32, True))), False),
    "linear f32": (lambda: wide(67, 37, F32), False),
    "linear bf16": (lambda: wide(67, 37, BF16), True),
    "linear int4": (lambda: wide(67, 96, GroupQuant(4, 32, False)), True),
    "linear int6": (lambda: wide(130, 48, GroupQuant(6, 16, False), bias=False), True),
    "linear int8 with minima": (lambda: wide(1, 64, GroupQuant(8, 64, True)), True),
    "rms_norm": (lambda: g.rms_norm(x(37), g.weight("w", (37,), F32), 1e-5, 1.0), False),
    "rms_norm by heads": (lambda: g.rms_norm(x(36), g.weight("w", (12,), BF16), 1e-5), False),
    "layer_norm": (lambda: g.layer_norm(x(37), g.weight("w", (37,), F32), g.weight("b", (37,), F32), 1e-5), False),
    "add_rms_norm": (lambda: fused("add_rms_norm", 37, False), False),
    "add_layer_norm": (lambda: fused("add_layer_norm", 37, True), False),
    "add": (lambda: g.add(x(37), x(37, "y")), False),
    "mul": (lambda: g.mul(x(37), x(37, "y")), False),
    "scale": (lambda: g.scale(x(37), 1.7), False),
    "softcap": (lambda: g.softcap(x(37), 0.8), False),
    **{f"activation {k}": (lambda k=k: g.activation(x(37), k), False) for k in ("silu", "gelu", "gelu_tanh", "relu")},
    "gated_activation": (lambda: g.gated_activation(x(37), x(37, "y"), "silu"), False),
    "gated_linear": (lambda: gated(37, F32, None), False),
    "gated_linear bf16": (lambda: gated(40, BF16, F32), True),
    "gated_linear int8": (lambda: gated(64, GroupQuant(8, 0), None), True),
    "views": (lambda: g.gated_activation(g.slice_(x(50), 3, 20), g.slice_(x(50), 31, 48), "gelu"), False),
    "take_rows": (lambda: g.take_rows(x(37), STEP.logits_indices), False),
    "first_rows": (lambda: g.scale(g.first_rows(g.take_rows(x(37), STEP.logits_indices), ROWS), 1.7), False),
    "rope": (lambda: g.rope(x(40), STEP.positions, head_dim=8, **ROPE), False),
    "rope interleaved": (lambda: g.rope(x(40), STEP.positions, head_dim=8, interleaved=True, **ROPE), False),
    "kv_write, attention": (lambda: cached(40, 5, 5, F32, None, alibi=True), False),
    "rope_kv_write, attention": (lambda: cached(48, 6, 2, F32, ROPE, softcap=3.0), False),
    "attention with a window": (lambda: cached(48, 6, 2, F32, ROPE, window=5), False),
    "attention over bf16": (lambda: cached(80, 4, 2, BF16, ROPE), True),
    "attention over f16": (lambda: cached(80, 4, 2, F16, ROPE), False),
    "kv_write, attention over f16": (lambda: cached(40, 5, 5, F16, None, alibi=True), False),
    "attention over int8": (lambda: cached(80, 4, 2, I8, ROPE), True),
    "lora": (lambda: adapted(37, (67, 5, 64), F32), False),
    "lora bf16": (lambda: adapted(37, (67, 5, 64), BF16), True),
    "kv_write, attention over int8": (lambda: cached(40, 5, 5, I8, None, alibi=True), True),
    "attention over fp8": (lambda: cached(80, 4, 2, E4M3, ROPE), True),
    "kv_write, attention over fp8": (lambda: cached(40, 5, 5, E4M3, None, alibi=True), True),
}  # fmt: skip


def weights(graph: Graph) -> dict[str, Any]:
    """Random values of each weight's type."""
    made: dict[str, Any] = {}
    for node in graph.leaves("weight"):
        rng = np.random.default_rng(list(node.name.encode()))
        shape, dtype = tuple(int(d) for d in node.tensor.shape), node.tensor.dtype
        if isinstance(dtype, GroupQuant):
            groups = (shape[0], dtype.groups(shape[1]))
            codes = rng.integers(0, 1 << dtype.bits, shape).astype(np.uint8)
            scale = (rng.standard_normal(groups) / (1 << dtype.bits)).astype(np.float32)
            minimum = rng.standard_normal(groups).astype(np.float32) if dtype.minimum else None
            made[node.name] = QuantizedArray(codes, scale, minimum, dtype)
        else:
            values = rng.standard_normal(shape).astype(np.float32)
            made[node.name] = values.astype(ml_dtypes.bfloat16) if dtype == BF16 else values
    return made


def pairs(table: Node, ranks: tuple[int, ...]) -> dict[str, Any]:
    """A random adapter with these ranks in the parts of a table; 0: none."""
    type, rng = table.type, np.random.default_rng(sum(ranks))
    assert isinstance(type, AdapterType)
    return {
        module: tuple(rng.standard_normal(s).astype(np.float32) for s in ((rank, type.in_features), (width, rank)))
        for module, width, rank in zip(table.attrs["modules"], type.widths, ranks, strict=True) if rank
    }  # fmt: skip


def give_adapters(graph: Graph, *executors: Any) -> None:
    """Two random ones for every table that the graph reads."""
    for table in graph.leaves("input"):
        if isinstance(table.type, AdapterType):
            for executor in executors:
                executor.set_adapter(1, pairs(table, (5, 3, 1)))
                executor.set_adapter(2, pairs(table, (1, 0, 4)))


def steps() -> list[Batch]:
    """A chunk and a prefill; then decode tokens, a chunk and a newcomer: 37 slots over several blocks."""
    ids = [tuple(int(t) for t in np.random.default_rng(i).integers(0, VOCAB, 40)) for i in range(3)]
    return [
        Batch(
            (
                ScheduledSequence("a", ids[0][:23], 0, (5, 2), spec()),
                ScheduledSequence("b", ids[1][:3], 0, (7,), None),
            )
        ),
        Batch(
            (
                ScheduledSequence("b", ids[1][3:20], 3, (7, 1), spec(), adapter=2),
                ScheduledSequence("a", ids[0][23:24], 23, (5, 2), spec(), adapter=1),
                ScheduledSequence("c", ids[2][:1], 0, (0,), spec()),
            )
        ),
        Batch((ScheduledSequence("a", ids[0][24:37], 24, (5, 2, 3), spec(), adapter=1),)),
    ]  # fmt: skip


def test_every_op_has_a_case_and_every_kernel_an_op() -> None:
    covered = {node.op for make_node, _ in CASES.values() for node in Graph("g", (make_node(),)).nodes}
    assert covered >= set(OPS) - COSTLESS
    assert {*_native.kernels(ISAS[-1]), *SAME_KERNEL} == set(OPS) - COSTLESS


@pytest.mark.parametrize("activations", ["float", "int8"])
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", CASES)
def test_kernel_means_what_its_row_says(name: str, isa: str, activations: str) -> None:
    node, rounds = CASES[name]
    graph = Graph("one_op", (node(),)).verify()
    values = weights(graph)
    int8 = activations == "int8" and any(isinstance(v, QuantizedArray) for v in values.values())
    if activations == "int8" and not (int8 and _native.has_int8_products(isa)):
        pytest.skip("nothing to multiply as int8")
    kv = KVSpec(BLOCKS, BLOCK, 0, 64)
    program = lower(graph, {"T": 64, "S": 4, "N": 64}, 64)
    oracle = ReferenceExecutor(graph, values.__getitem__, kv, lambda *_: [])
    native = CpuExecutor(program, values.__getitem__, kv, lambda *_: [], isa=isa, threads=2, activations=activations)
    give_adapters(graph, oracle, native)
    every = graph.outputs[0].tensor.shape[0] == "T"
    for batch in steps():
        want = oracle.logits(batch, every=every)
        if every:  # the arena's rows of this output are the step's tokens
            native.logits(batch, every=True)
            view = program.output
            buffer = program.buffers[view.buffer]
            got = native._native.arena(buffer.offset + 4 * view.start, batch.num_tokens, view.cols, buffer.cols)
        else:
            got = native.logits(batch)
        # float32: 40 roundings of the sum's size, enough for sums of 96 and for polynomials of exp and erf.
        # bf16 operands: 2**-9 each, averaging out over a sum. A key on the border of two bf16 numbers may
        # be stored as either, on any tier.
        rounded = rounds and (isa in ("avx512_bf16", "amx") or "attention" in name)
        # int8 activations: half a step of 127, averaging out likewise.
        limit = 2**-6 if int8 else 2**-7 if rounded else 40 * float(np.finfo(np.float32).eps)
        assert np.abs(got - want).max() <= limit * max(1.0, np.abs(want).max()), batch
    native.close()
