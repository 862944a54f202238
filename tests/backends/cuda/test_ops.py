"""Every op on the device against its row of the op table: the same one-op graphs as on the CPU."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from pelton.backends.base import KVSpec
from pelton.backends.cuda.activations import Numerics
from pelton.backends.cuda.calls import Lowering
from pelton.backends.cuda.device import Device
from pelton.backends.cuda.executor import CudaExecutor
from pelton.backends.cuda.stored import compute_type
from pelton.backends.reference.executor import ReferenceExecutor
from pelton.graph import F16, OPS, Graph
from pelton.program import lower
from tests.backends.cuda.device import DEVICE
from tests.backends.test_ops import BLOCK, BLOCKS, CASES, COSTLESS, give_adapters, steps, weights


def test_every_op_has_a_launch() -> None:
    assert all(hasattr(Lowering, f"_{op}") for op in set(OPS) - COSTLESS)


@pytest.mark.parametrize("name", CASES)
def test_launch_means_what_its_row_says(name: str) -> None:
    node, rounds = CASES[name]
    graph = Graph("one_op", (node(),)).verify()
    values = weights(graph)
    kv = KVSpec(BLOCKS, BLOCK, 0, 64)
    compute = compute_type(graph)
    program = lower(graph, {"T": 64, "S": 4, "N": 64}, 64, compute)
    sampler: Any = lambda *_: []  # noqa: E731
    oracle = ReferenceExecutor(graph, values.__getitem__, kv, sampler)
    device = CudaExecutor(
        program,
        Numerics.of(program, compute, "auto", True),
        values.__getitem__,
        kv,
        sampler,
        Device(DEVICE),
        capture=None,
    )
    device.allocate(kv)
    give_adapters(graph, oracle, device)
    every = graph.outputs[0].tensor.shape[0] == "T"
    for batch in steps():
        want = oracle.logits(batch, every=every)
        device.logits(batch, every=every)
        got = device._fetched(program.output, len(want))
        # float32: as on the CPU. Next to 16-bit weights, operands and results are rounded to 2**-9 (2**-12), which the
        # interpreter does by cutting off, twice as much; a softmax and a sum of a few of them average out. Queries and
        # weights of attention become the type of the cache.
        exact = not rounds and compute.bits == 32
        narrow = any(cache.dtype == F16 for cache in program.caches)
        limit = (2**-9 if narrow else 40 * float(np.finfo(np.float32).eps)) if exact else 2**-6
        assert np.abs(got - want).max() <= limit * max(1.0, np.abs(want).max()), batch
    device.close()
