"""What executors on the host share: a batch becomes arrays, the step runs at once, logits become tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from ..graph.cost import Cost
from ..graph.ops import permutation
from ..program import AdapterTable
from .base import Batch, KVSpec, SampledToken, Sampler, SampleSpec, StepOutput, StepStats
from .step_inputs import StepInputs, step_inputs

#: (A [rank, in_features], B [width, rank]) in float32, or None: the part is left alone.
AdapterPart: TypeAlias = "tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]] | None"


class HostExecutor:
    """An :class:`~pelton.backends.base.Executor` but for ``_run``, ``_block_bytes``, ``_write_adapter`` and ``close``.

    Steps run inside ``submit``; ``collect`` hands out results. flops and bytes: the cost of a step.
    adapters: the tables that adapters are kept in.
    """

    def __init__(
        self, kv_spec: KVSpec, sampler: Sampler, flops: Cost, bytes: Cost, adapters: Sequence[AdapterTable] = ()
    ) -> None:
        self._adapters = adapters
        self._kv_spec = kv_spec
        self._sampler = sampler
        self._flops, self._bytes = flops, bytes
        self._tickets: dict[int, StepOutput] = {}
        self._next_ticket = 0

    def _run(self, inputs: StepInputs) -> tuple[npt.NDArray[np.float32], float]:
        """Run a step: float32 logits [N, vocab], and seconds."""
        raise NotImplementedError

    def _block_bytes(self) -> list[npt.NDArray[np.uint8]]:
        """Views of the caches that may be written to: uint8 [num_blocks, bytes of a block] per layer."""
        raise NotImplementedError

    def _write_adapter(self, index: int, slot: int, parts: Sequence[AdapterPart]) -> None:
        """Make a slot of the table ``index`` hold an adapter."""
        raise NotImplementedError

    def set_adapter(
        self, slot: int, weights: Mapping[str, tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]] | None
    ) -> None:
        given = dict(weights or {})
        for index, table in enumerate(self._adapters):
            parts: list[AdapterPart] = []
            for module, width, order in zip(table.modules, table.type.widths, table.row_orders, strict=True):
                pair = given.pop(module, None)
                if pair is not None:
                    a, b = pair
                    rank = len(a)
                    fits = a.shape == (rank, table.type.in_features) and b.shape == (width, rank)
                    if not fits or not 1 <= rank <= table.type.max_rank or not 1 <= slot <= table.type.slots:
                        raise ValueError(f"no place for an adapter of {module} with shapes {a.shape} and {b.shape}")
                    pair = (a, b if order is None else b[permutation(*order)])
                parts.append(pair)
            self._write_adapter(index, slot, parts)
        if given:
            raise ValueError(f"no product is the module {next(iter(given))}")

    def read_blocks(self, block_ids: Sequence[int]) -> list[npt.NDArray[np.uint8]]:
        ids = list(block_ids)
        return [cache[ids] for cache in self._block_bytes()]

    def write_blocks(self, block_ids: Sequence[int], blocks: Sequence[npt.NDArray[np.uint8]]) -> None:
        ids, caches = list(block_ids), self._block_bytes()
        expected = [(len(ids), cache.shape[1]) for cache in caches]
        if [block.shape for block in blocks] != expected or any(block.dtype != np.uint8 for block in blocks):
            raise ValueError("KV blocks of another shape than this model's")
        for cache, block in zip(caches, blocks, strict=True):
            cache[ids] = block

    @property
    def kv_spec(self) -> KVSpec:
        return self._kv_spec

    def logits(self, batch: Batch, *, every: bool = False) -> npt.NDArray[np.float32]:
        """float32 [N, vocab] for the sequences that are sampled, in order; or for every token.

        The next step may overwrite the array. With ``every``, a batch may have at most ``max_num_seqs``
        tokens, the rows of logits that an arena has room for.
        """
        return self._run(self._inputs_of(batch, every=every))[0]

    def _inputs_of(self, batch: Batch, *, every: bool = False) -> StepInputs:
        return step_inputs(batch, self._kv_spec.block_size, every=every, adapters=bool(self._adapters))

    def submit(self, batch: Batch) -> int:
        inputs = self._inputs_of(batch)
        if batch.copies:
            sources, targets = zip(*batch.copies, strict=True)
            for cache in self._block_bytes():
                cache[list(targets)] = cache[list(sources)]
        logits, seconds = self._run(inputs)
        stats = StepStats(seconds, inputs.shape.evaluate(self._flops), inputs.shape.evaluate(self._bytes))
        self._next_ticket += 1
        self._tickets[self._next_ticket] = StepOutput(self._sample(batch, logits), stats)
        return self._next_ticket

    def collect(self, ticket: int) -> StepOutput:
        return self._tickets.pop(ticket)

    def _sample(self, batch: Batch, logits: npt.NDArray[np.float32]) -> tuple[Sequence[SampledToken], ...]:
        """Tokens in the order of the batch's sequences; ``logits`` has a row for each that is sampled."""
        specs = [s.sample for s in batch.sequences if s.sample is not None]
        if any(s.num_drafts for s in batch.sequences):
            return self._sample_drafts(batch, logits)
        tokens = iter(self._sampler(logits, specs) if specs else [])
        return tuple([() if s.sample is None else (next(tokens),) for s in batch.sequences])

    def _sample_drafts(self, batch: Batch, logits: npt.NDArray[np.float32]) -> tuple[Sequence[SampledToken], ...]:
        specs: list[SampleSpec] = []
        drafts: list[tuple[int, ...]] = []  # what each row takes for granted
        for sequence in batch.sequences:
            if sequence.sample is not None:
                draft = sequence.token_ids[len(sequence.token_ids) - sequence.num_drafts :]
                specs += [sequence.sample] * (len(draft) + 1)
                drafts += [draft[:i] for i in range(len(draft) + 1)]
        tokens = iter(self._sampler(logits, specs, drafts))
        return tuple(
            [() if s.sample is None else [next(tokens) for _ in range(s.num_drafts + 1)] for s in batch.sequences]
        )
