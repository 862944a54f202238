"""Which sequences run in the next step, with how many tokens and in which KV blocks.

``schedule`` knows no device, clock or random number: the same state, budget and ``now`` give the same
schedule, and all it changes is the state (blocks, status). The rules:

1. RUNNING sequences that decode come first, in arrival order: each is one token and somebody waits.
2. RUNNING sequences in prefill get a chunk of what is left of max_num_batched_tokens.
3. WAITING and PREEMPTED ones are admitted in arrival order; the first that does not fit ends admission,
   so that a long prompt is not overtaken for ever.

A sequence gets the blocks of all tokens that it has at admission, hence only decodes ask for more. When
none is free the latest arrival is preempted: it loses its blocks and is later computed again, its output
tokens being part of the recomputed prompt. The earliest arrival is never preempted for another, and one
sequence alone always fits (the engine refuses others), so every step makes progress.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

from ..backends.base import Batch, ScheduledSequence
from .kv_blocks import BlockAllocator
from .request import FinishReason, Sequence, Status


@dataclass(frozen=True, slots=True)
class Budget:
    """The limits of one step: sequences and tokens."""

    max_num_seqs: int
    max_num_batched_tokens: int


@dataclass(frozen=True, slots=True)
class Schedule:
    """One step. ``sequences[i]`` is the sequence behind ``batch.sequences[i]``."""

    batch: Batch
    sequences: tuple[Sequence, ...]
    preempted: tuple[Sequence, ...] = ()


class SchedulerState:
    """All unfinished sequences, in arrival order, and the blocks that the running ones hold.

    Every sequence in ``running`` arrived before every one in ``waiting``: admission is in arrival order
    and preemption takes the latest.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.block_size = block_size  # tokens
        self.blocks = BlockAllocator(num_blocks)
        self.waiting: OrderedDict[str, Sequence] = OrderedDict()  # WAITING or PREEMPTED
        self.running: dict[str, Sequence] = {}

    def add(self, sequence: Sequence) -> None:
        self.waiting[sequence.request_id] = sequence

    def find(self, request_id: str) -> Sequence | None:
        return self.running.get(request_id) or self.waiting.get(request_id)

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def remove(self, sequence: Sequence, reason: FinishReason, stop_reason: int | None = None) -> None:
        """Finish a sequence, for any reason, and free its blocks."""
        if sequence.status is Status.RUNNING:
            del self.running[sequence.request_id]
        else:
            del self.waiting[sequence.request_id]
        self._release(sequence)
        sequence.status = Status.FINISHED
        sequence.finish_reason = reason
        sequence.stop_reason = stop_reason

    def preempt_latest(self) -> Sequence:
        """Send the latest arrival back to the head of the queue, to be computed again."""
        request_id, sequence = self.running.popitem()
        self._release(sequence)
        sequence.status = Status.PREEMPTED
        sequence.num_preemptions += 1
        self.waiting[request_id] = sequence
        self.waiting.move_to_end(request_id, last=False)
        return sequence

    def _release(self, sequence: Sequence) -> None:
        # In reverse, so that a pool that is a stack hands them out in order again.
        self.blocks.free(reversed(sequence.block_ids))
        sequence.block_ids = ()
        sequence.num_computed_tokens = 0

    def check(self) -> None:
        """Raise RuntimeError unless the blocks in use are exactly those of the running sequences."""
        self.blocks.check(s.block_ids for s in self.running.values())
        for sequence in self.waiting.values():
            if sequence.block_ids or sequence.num_computed_tokens:
                raise RuntimeError(f"{sequence.request_id} holds KV blocks without running")


def schedule(state: SchedulerState, budget: Budget, now: float) -> Schedule:
    """Decide the next step; ``now`` (seconds) stamps sequences that run for the first time.

    The result is empty only when there is no unfinished sequence.
    """
    tokens_left = budget.max_num_batched_tokens
    block_size = state.block_size
    blocks = state.blocks
    scheduled: list[ScheduledSequence] = []
    sequences: list[Sequence] = []
    preempted: list[Sequence] = []
    prefills: list[Sequence] = []

    for sequence in list(state.running.values()):
        if sequence.status is not Status.RUNNING:
            break  # preempted below, and so is everything that arrived later
        token_ids = sequence.token_ids
        num_tokens = len(token_ids)
        computed = sequence.num_computed_tokens
        if num_tokens - computed > 1:
            prefills.append(sequence)
            continue
        if not tokens_left:
            continue
        if num_tokens > len(sequence.block_ids) * block_size:
            while not blocks.num_free and (not preempted or preempted[-1] is not sequence):
                preempted.append(state.preempt_latest())
            if preempted and preempted[-1] is sequence:
                break
            sequence.block_ids += blocks.allocate(1)
        tokens_left -= 1
        scheduled.append(
            ScheduledSequence(
                sequence.request.request_id, (token_ids[-1],), computed, sequence.block_ids, sequence.sample_spec
            )
        )
        sequences.append(sequence)

    for sequence in prefills:
        if not tokens_left:
            break
        if sequence.status is Status.RUNNING:
            scheduled.append(_chunk(sequence, tokens_left, block_size))
            sequences.append(sequence)
            tokens_left -= len(scheduled[-1].token_ids)

    # The victim of a preemption would take back the very blocks that were just freed.
    while state.waiting and tokens_left and not preempted and len(state.running) < budget.max_num_seqs:
        request_id, sequence = next(iter(state.waiting.items()))
        needed = state.blocks_for(len(sequence.token_ids))
        # One block of headroom for every running sequence: without it, admission into an almost full pool
        # is undone by a preemption within a few steps, and the prefill was for nothing.
        if needed + len(state.running) > blocks.num_free:
            break
        del state.waiting[request_id]
        state.running[request_id] = sequence
        sequence.status = Status.RUNNING
        sequence.block_ids = blocks.allocate(needed)
        if sequence.first_scheduled_time is None:
            sequence.first_scheduled_time = now
        scheduled.append(_chunk(sequence, tokens_left, block_size))
        sequences.append(sequence)
        tokens_left -= len(scheduled[-1].token_ids)

    return Schedule(Batch(tuple(scheduled)), tuple(sequences), tuple(preempted))


def _chunk(sequence: Sequence, max_tokens: int, block_size: int) -> ScheduledSequence:
    """The next at most ``max_tokens`` tokens of a prefill; only the last chunk samples."""
    start = sequence.num_computed_tokens
    end = min(start + max_tokens, len(sequence.token_ids))
    return ScheduledSequence(
        request_id=sequence.request.request_id,
        token_ids=tuple(sequence.token_ids[start:end]),
        num_computed_tokens=start,
        block_ids=sequence.block_ids[: -(-end // block_size)],
        sample=sequence.sample_spec if end == len(sequence.token_ids) else None,
    )
