"""What executors on the host share: a batch becomes arrays, the step runs at once, logits become tokens."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ..graph.cost import Cost
from .base import Batch, KVSpec, SampledToken, Sampler, StepOutput, StepStats
from .step_inputs import StepInputs, step_inputs


class HostExecutor:
    """An :class:`~pelton.backends.base.Executor` but for ``_run``, ``_copy_blocks`` and ``close``.

    Steps run inside ``submit``; ``collect`` hands out results. flops and bytes: the cost of a step.
    """

    def __init__(self, kv_spec: KVSpec, sampler: Sampler, flops: Cost, bytes: Cost) -> None:
        self._kv_spec = kv_spec
        self._sampler = sampler
        self._flops, self._bytes = flops, bytes
        self._tickets: dict[int, StepOutput] = {}
        self._next_ticket = 0

    def _run(self, inputs: StepInputs) -> tuple[npt.NDArray[np.float32], float]:
        """Run a step: float32 logits [N, vocab], and seconds."""
        raise NotImplementedError

    def _copy_blocks(self, sources: list[int], targets: list[int]) -> None:
        """Copy what blocks of the KV cache hold to other blocks, in all layers."""
        raise NotImplementedError

    @property
    def kv_spec(self) -> KVSpec:
        return self._kv_spec

    def logits(self, batch: Batch, *, every: bool = False) -> npt.NDArray[np.float32]:
        """float32 [N, vocab] for the sequences that are sampled, in order; or for every token.

        The next step may overwrite the array. With ``every``, a batch may have at most ``max_num_seqs``
        tokens, the rows of logits that an arena has room for.
        """
        return self._run(step_inputs(batch, self._kv_spec.block_size, every=every))[0]

    def submit(self, batch: Batch) -> int:
        inputs = step_inputs(batch, self._kv_spec.block_size)
        if batch.copies:
            sources, targets = zip(*batch.copies, strict=True)
            self._copy_blocks(list(sources), list(targets))
        logits, seconds = self._run(inputs)
        stats = StepStats(seconds, inputs.shape.evaluate(self._flops), inputs.shape.evaluate(self._bytes))
        self._next_ticket += 1
        self._tickets[self._next_ticket] = StepOutput(self._sample(batch, logits), stats)
        return self._next_ticket

    def collect(self, ticket: int) -> StepOutput:
        return self._tickets.pop(ticket)

    def _sample(self, batch: Batch, logits: npt.NDArray[np.float32]) -> tuple[SampledToken | None, ...]:
        """Tokens in the order of the batch's sequences; ``logits`` has a row for each that is sampled."""
        specs = [s.sample for s in batch.sequences if s.sample is not None]
        tokens = iter(self._sampler(logits, specs) if specs else [])
        return tuple(None if s.sample is None else next(tokens) for s in batch.sequences)
