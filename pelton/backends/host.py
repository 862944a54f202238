"""What executors share: a batch becomes arrays, the step runs, logits become tokens."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from ..graph.cost import Cost
from ..graph.ops import permutation
from ..outputs import Logprob
from ..program import AdapterTable
from .base import (
    Batch,
    KVSpec,
    SampledToken,
    Sampler,
    SampleSpec,
    SamplingError,
    ScheduledSequence,
    StepOutput,
    StepStats,
)
from .step_inputs import StepInputs, step_inputs

#: (A [rank, in_features], B [width, rank]) in float32, or None: the part is left alone.
AdapterPart: TypeAlias = "tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]] | None"


@dataclass(slots=True)
class _Step:
    ticket: int
    batch: Batch
    inputs: StepInputs
    flops: float
    bytes: float
    begun: bool = False
    error: Exception | None = None  # why it could not begin


class BatchExecutor:
    """What all executors share that run graphs or programs: a batch becomes arrays, logits become tokens.

    flops and bytes: the cost of a step. adapters: the tables that adapters are kept in.
    """

    def __init__(
        self, kv_spec: KVSpec, sampler: Sampler, flops: Cost, bytes: Cost, adapters: Sequence[AdapterTable] = ()
    ) -> None:
        self._adapters = adapters
        self._kv_spec = kv_spec
        self._sampler = sampler
        self._flops, self._bytes = flops, bytes
        self._next_ticket = 0

    def _run(self, inputs: StepInputs) -> tuple[npt.NDArray[np.float32], float]:
        """Run a step: float32 logits [L, vocab], and seconds."""
        raise NotImplementedError

    def _hidden(self, inputs: StepInputs) -> npt.NDArray[np.float32]:
        """Of the step that ran last, float32 [N, hidden size]: the rows of logits, then the others."""
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

    @property
    def kv_spec(self) -> KVSpec:
        return self._kv_spec

    def logits(self, batch: Batch, *, every: bool = False) -> npt.NDArray[np.float32]:
        """float32 [L, vocab] for the sequences that are sampled, in order; or for every token.

        The next step may overwrite the array. With ``every``, a batch may have at most ``max_num_seqs``
        tokens, the rows of logits that an arena has room for.
        """
        return self._run(self._inputs_of(batch, every=every))[0]

    def _inputs_of(self, batch: Batch, *, every: bool = False) -> StepInputs:
        return step_inputs(batch, self._kv_spec.block_size, every=every, adapters=bool(self._adapters))

    def _hidden_of(self, inputs: StepInputs, batch: Batch) -> dict[int, npt.NDArray[np.float32]]:
        """The hidden states that the sequences want: copies, as the next step overwrites them."""
        rows, end = self._hidden(inputs), inputs.shape.num_logits
        found = {}
        for index, sequence in enumerate(batch.sequences):
            if sequence.num_hidden:
                start, end = end, end + sequence.num_hidden
                found[index] = np.array(rows[start:end])
        return found

    def _sample(self, batch: Batch, logits: npt.NDArray[np.float32], stats: StepStats) -> StepOutput:
        """What a step brought, given its logits: the rows that the sequences need, one after the other."""
        if any(s.targets for s in batch.sequences):
            return self._sample_apart(batch, logits, stats)
        sampled = [s for s in batch.sequences if s.sample is not None]
        specs = [s.sample for s in sampled if s.sample is not None]
        if not specs:
            return StepOutput(((),) * len(batch.sequences), stats)
        drafts: list[Sequence[int]] | None = None
        if any(s.num_drafts for s in sampled):
            specs, drafts = _with_drafts(sampled)
        try:
            rows = self._sampler(logits, specs, drafts)
        except SamplingError:
            return self._sample_apart(batch, logits, stats)
        if len(rows) == len(batch.sequences) == len(sampled):
            return StepOutput(tuple([(token,) for token in rows]), stats)
        tokens = iter(rows)
        return StepOutput(tuple([[next(tokens) for _ in range(s.num_logits)] for s in batch.sequences]), stats)

    def _sample_apart(self, batch: Batch, logits: npt.NDArray[np.float32], stats: StepStats) -> StepOutput:
        """The same sequence by sequence: some want log-probabilities of their prompt, or one cannot be sampled from
        and the others shall not suffer."""
        tokens: list[Sequence[SampledToken]] = []
        failures: dict[int, str] = {}
        targets: dict[int, list[dict[int, Logprob]]] = {}
        for index, (sequence, start, end) in enumerate(rows_of_logits(batch)):
            tokens.append(())
            try:
                if sequence.targets:
                    wanted = logits[start : start + len(sequence.targets)]
                    targets[index] = self._sampler.logprobs(wanted, sequence.targets, sequence.num_top)
                if sequence.sample is not None:
                    specs, drafts = _with_drafts([sequence])
                    tokens[index] = self._sampler(logits[end - len(specs) : end], specs, drafts)
            except SamplingError as error:
                failures[index] = str(error)
        return StepOutput(tuple(tokens), stats, failures, targets)


class HostExecutor(BatchExecutor):
    """An :class:`~pelton.backends.base.Executor` but for ``_run``, ``_hidden``, ``_block_bytes``, ``_write_adapter``
    and ``close``.

    A step begins when the one before it has been collected, as its logits lie where the next ones will; if none follows
    it, inside ``collect``.
    """

    def __init__(
        self, kv_spec: KVSpec, sampler: Sampler, flops: Cost, bytes: Cost, adapters: Sequence[AdapterTable] = ()
    ) -> None:
        super().__init__(kv_spec, sampler, flops, bytes, adapters)
        self._steps: deque[_Step] = deque()  # the first one runs
        self._sampled: dict[str, int] = {}  # the last token of each sequence that the last step sampled from

    def _begin(self, inputs: StepInputs) -> None:
        """Start a step beside the caller, if the backend can."""

    def _wait(self, inputs: StepInputs) -> tuple[npt.NDArray[np.float32], float]:
        """What ``_run`` gives of the step that was begun."""
        return self._run(inputs)

    def _block_bytes(self) -> list[npt.NDArray[np.uint8]]:
        """Views of the caches that may be written to: uint8 [num_blocks, bytes of a block] per layer."""
        raise NotImplementedError

    def read_blocks(self, block_ids: Sequence[int]) -> list[npt.NDArray[np.uint8]]:
        ids = list(block_ids)
        return [cache[ids] for cache in self._block_bytes()]

    def write_blocks(self, block_ids: Sequence[int], blocks: Sequence[npt.NDArray[np.uint8]]) -> None:
        ids, caches = list(block_ids), self._block_bytes()
        check_blocks(len(ids), [cache.shape[1] for cache in caches], blocks)
        for cache, block in zip(caches, blocks, strict=True):
            cache[ids] = block

    def submit(self, batch: Batch) -> int:
        self._next_ticket += 1
        inputs = self._inputs_of(batch)
        flops, num_bytes = inputs.shape.evaluate(self._flops), inputs.shape.evaluate(self._bytes)
        step = _Step(self._next_ticket, batch, inputs, flops, num_bytes)
        if not self._steps:
            self._prepare(step)
        elif not self._steps[0].begun:
            self._start(self._steps[0])
        self._steps.append(step)
        return step.ticket

    def _start(self, step: _Step) -> None:
        step.begun = True
        try:
            self._begin(step.inputs)
        except Exception as error:  # whoever asks next is told something else: it is kept for who collects
            step.error = error

    def _prepare(self, step: _Step) -> None:
        """What is to be done when the step before this one has been sampled from."""
        copies = step.batch.copies
        if copies:
            sources, targets = zip(*copies, strict=True)
            for cache in self._block_bytes():
                cache[list(targets)] = cache[list(sources)]
        if step.inputs.pending:
            token_ids = step.inputs.arrays["token_ids"]
            for place, request_id in step.inputs.pending:
                # One whose sampling failed has none, and nobody will look at what follows.
                token_ids[place] = self._sampled.get(request_id, 0)

    def collect(self, ticket: int) -> StepOutput:
        step = self._steps.popleft()
        try:
            if step.ticket != ticket:
                raise RuntimeError(f"step {ticket} is collected out of turn, or failed with the one before it")
            if step.error is not None:
                raise step.error
            # A thread to run it beside the caller is worth its while only if the caller has something to do.
            logits, seconds = self._wait(step.inputs) if step.begun else self._run(step.inputs)
            output = self._sample(step.batch, logits, StepStats(seconds, step.flops, step.bytes))
            if step.inputs.shape.num_hidden:
                output = replace(output, hidden=self._hidden_of(step.inputs, step.batch))
        except BaseException:
            self._steps.clear()
            raise
        if self._steps:
            self._sampled = last_tokens(step.batch, output)
            self._prepare(self._steps[0])
            self._start(self._steps[0])
        return output


def rows_of_logits(batch: Batch) -> Iterator[tuple[ScheduledSequence, int, int]]:
    """Each sequence, and the rows of logits [start, end) that are its."""
    end = 0
    for sequence in batch.sequences:
        start, end = end, end + sequence.num_logits
        yield sequence, start, end


def last_tokens(batch: Batch, output: StepOutput) -> dict[str, int]:
    """By request, the last token that was sampled."""
    return {s.request_id: new[-1].token_id for s, new in zip(batch.sequences, output.tokens, strict=True) if new}


def check_blocks(count: int, sizes: Sequence[int], blocks: Sequence[npt.NDArray[np.uint8]]) -> None:
    """Raises ValueError unless there are ``count`` blocks of each of these sizes, in bytes."""
    fits = [block.shape for block in blocks] == [(count, size) for size in sizes]
    if not fits or any(block.dtype != np.uint8 for block in blocks):
        raise ValueError("KV blocks of another shape than this model's")


def _with_drafts(sequences: Sequence[ScheduledSequence]) -> tuple[list[SampleSpec], list[Sequence[int]]]:
    """Of each row of logits: the spec, and what it takes for granted."""
    specs: list[SampleSpec] = []
    drafts: list[Sequence[int]] = []
    for sequence in sequences:
        assert sequence.sample is not None
        draft = sequence.token_ids[len(sequence.token_ids) - sequence.num_drafts :]
        specs += [sequence.sample] * (len(draft) + 1)
        drafts += [draft[:i] for i in range(len(draft) + 1)]
    return specs, drafts
