"""Running a tiny checkpoint on a backend, and transformers' greedy continuation as the oracle."""

from __future__ import annotations

import functools
import os
from typing import Any

import numpy as np

from pelton.backends.base import Batch, SampleSpec, ScheduledSequence
from pelton.build import Built, build
from pelton.config import EngineConfig, SamplingParams
from tests.helpers.tiny_models import oracle_logits, tiny_checkpoint

BLOCK = 16


def backends() -> list[str]:
    """ "reference" and every ISA tier of this machine, or only the one that PELTON_CPU_ISA forces."""
    from pelton.backends.cpu import _native

    forced = os.environ.get("PELTON_CPU_ISA")
    return ["reference", *([forced] if forced else _native.supported_isas())]


def load(folder: Any, backend: str, **options: Any) -> Built:
    """A tiny model on the oracle, or on the CPU with the ISA ``backend``."""
    device = "reference" if backend == "reference" else "cpu"
    options = {"max_num_batched_tokens": 160, "max_num_seqs": 8, "packed_cache": False, "threads": 2} | options
    isa = None if backend == "reference" else backend
    return build(EngineConfig(model=str(folder), device=device, isa=isa, kv_cache_memory=1 << 23, **options))  # type: ignore[arg-type]


def spec() -> SampleSpec:
    return SampleSpec(SamplingParams(temperature=0.0), (), (), 0)


class Sequences:
    """Feeds sequences to an executor by hand: which tokens, in which chunks, in whose company."""

    def __init__(self, executor: Any) -> None:
        self.executor = executor
        self.blocks: dict[str, list[int]] = {}
        self.length: dict[str, int] = {}
        self.free = list(range(executor.kv_spec.num_blocks - 1, -1, -1))

    def step(self, **tokens: list[int]) -> Any:
        """Append tokens to the named sequences in one batch; float32 logits [sequences, vocab]."""
        scheduled = tuple(self.scheduled(name, ids, spec()) for name, ids in tokens.items())
        return np.array(self.executor.logits(Batch(scheduled)))

    def scheduled(self, name: str, ids: list[int], sample: SampleSpec) -> ScheduledSequence:
        """Tokens that follow what the named sequence has, with blocks for them."""
        start = self.length.get(name, 0)
        blocks = self.blocks.setdefault(name, [])
        while len(blocks) * BLOCK < start + len(ids):
            blocks.append(self.free.pop())
        self.length[name] = start + len(ids)
        return ScheduledSequence(name, tuple(ids), start, tuple(blocks), sample)


@functools.cache
def greedy_oracle(family: str, count: int = 64) -> tuple[list[int], list[int], Any]:
    """(prompt, ``count`` greedy tokens, logits [count, vocab]) of transformers."""
    _, model = tiny_checkpoint(family)
    prompt = [int(t) for t in np.random.default_rng(7).integers(3, 101, 21)]
    tokens: list[int] = []
    logits = []
    for _ in range(count):
        logits.append(oracle_logits(model, prompt + tokens)[-1])
        tokens.append(int(np.argmax(logits[-1])))
    return prompt, tokens, np.stack(logits)


def tolerance(num_terms: int) -> float:
    """Relative error of logits whose longest path sums ``num_terms`` float32 products.

    Rounding errors of independent sums grow with the root of their number; 8 covers their constants
    (norms, exponentials, softmax) and both sides' errors.
    """
    return 8 * float(np.finfo(np.float32).eps) * num_terms**0.5
