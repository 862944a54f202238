"""Which sequences run in the next step, with how many tokens and in which KV blocks.

``schedule`` knows no device, clock or random number: the same state, policy and ``now`` give the same
schedule, and all it changes is the state (blocks, status, num_computed_tokens). The rules:

1. RUNNING sequences that decode come first: each is one token and somebody waits.
2. RUNNING sequences in prefill get a chunk of what is left of max_num_batched_tokens.
3. WAITING and PREEMPTED ones are admitted; the first that does not fit ends admission, so that a long prompt
   is not overtaken for ever. What the prefix cache holds of a sequence is not computed again.

Within each rule the order is that of ``Request.due``: arrival, shifted by priorities and deadlines.

A sequence gets the blocks of all tokens that it has at admission, hence only decodes ask for more. With
``max_utilization`` the last in order is preempted when none is free: it loses its blocks and is later computed
again, its output tokens being part of the recomputed prompt. So is one of lower priority that came later, for a request
that does not fit otherwise. The first in order is never preempted, and one sequence alone always fits (the engine
refuses others), so every step makes progress. With ``guaranteed_no_evict`` a
sequence is admitted when its longest possible answer fits beside those of all others, and nobody is ever preempted.

``schedule_ahead`` decides on a step while the one before it runs, whose tokens nobody knows yet, where nothing but that
is unknown: all decode, nobody waits, and there are blocks for everybody.

Batches are in flight: sequences join and leave at every step. ``static`` and ``dynamic`` are the older ways, for
comparison: a batch is formed when nothing runs, from a full house or from whoever came in time, and nobody joins later.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass, field
from typing import Literal

from ..backends.base import PENDING, Batch, ScheduledSequence
from .kv_blocks import BlockPool
from .request import FinishReason, Order, Sequence, Status

CapacityPolicy = Literal["max_utilization", "guaranteed_no_evict"]
Batching = Literal["inflight", "dynamic", "static"]

#: Seconds that the first of a batch waits for it to fill.
BATCHING_DELAYS = {"inflight": 0.0, "dynamic": 0.05, "static": 1.0}


@dataclass(frozen=True, slots=True)
class Policy:
    """The limits of one step, sequences and tokens, and the rules of admission."""

    max_num_seqs: int
    max_num_batched_tokens: int
    capacity: CapacityPolicy = "max_utilization"
    batching: Batching = "inflight"
    batching_delay: float | None = None  # seconds; None: BATCHING_DELAYS
    max_num_logits: int = 0  # of one step: a row for each sequence and each token of a draft
    max_num_rows: int = 0  # of one step: these, and the hidden states that are wanted themselves


@dataclass(frozen=True, slots=True)
class Schedule:
    """One step. ``sequences[i]`` is the sequence behind ``batch.sequences[i]``; those that decode come first.

    promised: blocks that others may find from now on, though only the step will fill them. num_cached_tokens: of the
    prompts that are admitted, found in the prefix cache. num_tokens: of the step. num_decodes, decode_tokens: sequences
    that decode, and their tokens, drafts included.
    """

    batch: Batch
    sequences: tuple[Sequence, ...]
    preempted: tuple[Sequence, ...] = ()
    promised: list[int] = field(default_factory=list)
    num_cached_tokens: int = 0
    num_tokens: int = 0
    num_decodes: int = 0
    decode_tokens: int = 0


class SchedulerState:
    """All unfinished sequences, and the blocks that the running ones hold."""

    def __init__(self, num_blocks: int, block_size: int, *, caching: bool = False) -> None:
        self.block_size = block_size  # tokens
        self.blocks = BlockPool(num_blocks, caching=caching)
        self.running: dict[str, Sequence] = {}  # in order
        self.waiting: dict[str, Sequence] = {}  # WAITING or PREEMPTED, forks included
        # Heaps by order; sequences that are not waiting any more are skipped. With batches that are not in flight,
        # who comes while one runs stays in the lobby until the next one is formed.
        self._queue: list[tuple[Order, Sequence]] = []
        self._lobby: list[tuple[Order, Sequence]] = []

    def add(self, sequence: Sequence, *, at_once: bool = False) -> None:
        """Let a sequence wait: for its turn, or first for the prompt of its parent.

        at_once: it belongs to a batch that runs, if batches are not in flight.
        """
        self.waiting[sequence.request_id] = sequence
        parent = sequence.parent
        if at_once:
            heapq.heappush(self._queue, (sequence.order, sequence))
        elif parent is not None and parent.status is not Status.FINISHED and not parent.output_token_ids:
            parent.forks.append(sequence)
        else:
            heapq.heappush(self._lobby, (sequence.order, sequence))

    def release_forks(self, parent: Sequence) -> None:
        """The prompt is computed, or never will be: forks may be admitted."""
        for fork in parent.forks:
            if fork.status is not Status.FINISHED:
                # Forks belong to their parent's batch.
                heapq.heappush(self._queue, (fork.order, fork))
        parent.forks.clear()

    def find(self, request_id: str) -> Sequence | None:
        return self.running.get(request_id) or self.waiting.get(request_id)

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def blocks_at_end(self, sequence: Sequence) -> int:
        """Blocks of the longest that the sequence may become; its last token needs no place."""
        return max(self.blocks_for(sequence.request.max_total_tokens - 1), 1)

    def open_doors(self, policy: Policy, now: float, flush: bool) -> None:
        """Move who may take part in the next step from the lobby to the queue.

        flush: nobody else will come before this step, so there is nothing to wait for.
        """
        if policy.batching == "inflight":
            while self._lobby:
                heapq.heappush(self._queue, heapq.heappop(self._lobby))
            return
        if self.running or self._first(self._queue) is not None or self._first(self._lobby) is None:
            return
        present = [entry for entry in self._lobby if entry[1].status is not Status.FINISHED]
        if len(present) < policy.max_num_seqs and not flush and now < self._batch_starts(policy):
            return
        for _ in range(policy.max_num_seqs):
            entry = self._pop(self._lobby)
            if entry is None:
                break
            heapq.heappush(self._queue, entry)

    def _batch_starts(self, policy: Policy) -> float:
        delay = BATCHING_DELAYS[policy.batching] if policy.batching_delay is None else policy.batching_delay
        waiting = (s.request.arrival_time for _, s in self._lobby if s.status is not Status.FINISHED)
        return min(waiting) + delay

    @staticmethod
    def _first(heap: list[tuple[Order, Sequence]]) -> Sequence | None:
        while heap and heap[0][1].status is Status.FINISHED:
            heapq.heappop(heap)
        return heap[0][1] if heap else None

    def _pop(self, heap: list[tuple[Order, Sequence]]) -> tuple[Order, Sequence] | None:
        return None if self._first(heap) is None else heapq.heappop(heap)

    def first_waiting(self) -> Sequence | None:
        """Who is admitted next."""
        return self._first(self._queue)

    def admit(self, sequence: Sequence) -> None:
        """Let the first of the queue run."""
        heapq.heappop(self._queue)
        request_id = sequence.request_id
        del self.waiting[request_id]
        last = next(reversed(self.running.values()), None)
        self.running[request_id] = sequence
        if last is not None and sequence.order < last.order:
            self.running = dict(sorted(self.running.items(), key=lambda item: item[1].order))
        sequence.status = Status.RUNNING

    def remove(self, sequence: Sequence, reason: FinishReason, stop_reason: int | str | None = None) -> None:
        """Finish a sequence, for any reason, and free its blocks."""
        if sequence.status is Status.RUNNING:
            del self.running[sequence.request_id]
        else:
            del self.waiting[sequence.request_id]
        self.release_forks(sequence)
        self._release(sequence)
        sequence.status = Status.FINISHED
        sequence.finish_reason = reason
        sequence.stop_reason = stop_reason
        sequence.parent = None

    def preempt(self, sequence: Sequence) -> None:
        """Take a running sequence's blocks; it waits to be computed again."""
        del self.running[sequence.request_id]
        self._release(sequence)
        sequence.status = Status.PREEMPTED
        sequence.num_preemptions += 1
        self.waiting[sequence.request_id] = sequence
        if not sequence.held:
            heapq.heappush(self._queue, (sequence.order, sequence))

    def let_go(self, sequence: Sequence) -> None:
        """A sequence that was held goes on."""
        sequence.held = False
        if sequence.status is Status.PREEMPTED:
            heapq.heappush(self._queue, (sequence.order, sequence))

    def remember(self, sequence: Sequence, start: int, end: int, now: float) -> list[int]:
        """Let others find the blocks that the tokens [start, end) make full; those that were not known before."""
        cache, block_size = sequence.request.cache, self.block_size
        first, last = start // block_size, end // block_size
        if first == last or not cache.store or self.blocks.cache is None:
            return []
        keys = sequence.keys(block_size)
        return [
            sequence.block_ids[i]
            for i in range(first, last)
            if self.blocks.remember(sequence.block_ids[i], keys[i], cache, now)
        ]

    def remember_last(self, sequence: Sequence, now: float) -> list[int]:
        """As ``remember`` for the last token, if a step was scheduled to compute it before it was known."""
        count = len(sequence.token_ids)
        if sequence.num_computed_tokens < count or count % self.block_size:
            return []
        return self.remember(sequence, count - 1, count, now)

    def take_back(self, sequence: Sequence, num_tokens: int) -> None:
        """The last ``num_tokens`` that were scheduled were guesses, and wrong."""
        sequence.num_computed_tokens -= num_tokens
        needed = self.blocks_for(len(sequence.token_ids))
        self.blocks.free(reversed(sequence.block_ids[needed:]))
        sequence.block_ids = sequence.block_ids[:needed]

    def last_running(self) -> Sequence:
        return next(reversed(self.running.values()))

    def roll_back(self, planned: Schedule) -> None:
        """A step failed: nothing that it was to compute is there, and all its sequences start anew."""
        for block in planned.promised:
            self.blocks.forget(block)
        for sequence in planned.sequences:
            if sequence.status is Status.RUNNING:
                self.preempt(sequence)

    def _release(self, sequence: Sequence) -> None:
        # In reverse: a pool that is a stack hands them out in order again, and of cached ones the last goes first.
        self.blocks.free(reversed(sequence.block_ids))
        sequence.block_ids = ()
        sequence.num_computed_tokens = sequence.num_pending = 0

    def check(self) -> None:
        """Raise RuntimeError unless the blocks in use are exactly those of the running sequences."""
        self.blocks.check(s.block_ids for s in self.running.values())
        for sequence in self.waiting.values():
            if sequence.block_ids or sequence.num_computed_tokens:
                raise RuntimeError(f"{sequence.request_id} holds KV blocks without running")
        queued = {id(s) for heap in (self._queue, self._lobby) for _, s in heap}
        parked = {id(f) for s in (*self.running.values(), *self.waiting.values()) for f in s.forks}
        parked |= {id(s) for s in self.waiting.values() if s.held}
        for sequence in self.waiting.values():
            if (id(sequence) in queued) == (id(sequence) in parked):
                raise RuntimeError(f"{sequence.request_id} waits nowhere, or twice")
        orders = [s.order for s in self.running.values()]
        if orders != sorted(orders):
            raise RuntimeError("running sequences are out of order")


class _Step:
    """A schedule while it grows."""

    def __init__(self, state: SchedulerState, policy: Policy, now: float) -> None:
        self.state = state
        self.policy = policy
        self.now = now
        self.tokens_left = policy.max_num_batched_tokens
        self.scheduled: list[ScheduledSequence] = []
        self.sequences: list[Sequence] = []
        self.preempted: list[Sequence] = []  # for want of blocks
        self.displaced: list[Sequence] = []  # for a higher priority
        self.promised: list[int] = []
        self.num_extra_logits = 0  # rows, beyond one for each running sequence
        self.num_extra_rows = 0  # of hidden states, beyond these
        self.num_cached_tokens = 0
        self.num_decodes = self.decode_tokens = 0
        self.first_admitted = 0  # of ``scheduled``
        self.copies: list[tuple[int, int]] = []

    def result(self, preempted: tuple[Sequence, ...]) -> Schedule:
        return Schedule(
            Batch(tuple(self.scheduled), tuple(self.copies)),
            tuple(self.sequences),
            preempted,
            self.promised,
            self.num_cached_tokens,
            self.policy.max_num_batched_tokens - self.tokens_left,
            self.num_decodes,
            self.decode_tokens,
        )

    def decodes(self) -> list[Sequence]:
        """Schedule all sequences that decode; those that prefill."""
        state, blocks = self.state, self.state.blocks
        block_size, caching = state.block_size, blocks.cache is not None
        scheduled, sequences = self.scheduled, self.sequences
        left = self.tokens_left
        prefills: list[Sequence] = []
        drafted: list[Sequence] = []
        for sequence in list(state.running.values()):
            if sequence.status is not Status.RUNNING:
                break  # preempted below, and so is everything after it
            if sequence.held:
                continue
            computed = sequence.num_computed_tokens
            token_ids, pending = sequence.token_ids, sequence.num_pending
            if len(token_ids) + pending - computed > 1 or sequence.pool is not None:
                prefills.append(sequence)
                continue
            if pending and len(token_ids) + pending >= sequence.request.max_total_tokens:
                continue  # the token that is on its way is the last
            if not left:
                continue
            if computed >= len(sequence.block_ids) * block_size and not self._grow(sequence):
                break
            left -= 1
            if sequence.draft:
                drafted.append(sequence)
                continue
            token_id = PENDING if pending else token_ids[-1]
            decode = ScheduledSequence(
                sequence.request.request_id, (token_id,), computed, sequence.block_ids, sequence.sample_spec
            )
            scheduled.append(decode if not sequence.adapter_slot else decode._replace(adapter=sequence.adapter_slot))
            sequences.append(sequence)
            sequence.num_pending = pending + 1
            sequence.num_computed_tokens = computed = computed + 1
            if caching and not computed % block_size and not pending:
                self._promise(sequence, computed - 1, computed)
        self.tokens_left = left
        for sequence in drafted:
            if sequence.status is Status.RUNNING:
                self._decode_with_draft(sequence)
        self.num_decodes = len(self.scheduled)
        self.decode_tokens = self.policy.max_num_batched_tokens - self.tokens_left
        return prefills

    def _decode_with_draft(self, sequence: Sequence) -> None:
        """Schedule a decode, and as much of its draft as there is room for without taking it from others."""
        state, computed = self.state, sequence.num_computed_tokens
        left = sequence.request.max_total_tokens - len(sequence.token_ids) - 1
        room = min(self._spare_logits(), self.tokens_left, left)
        draft = sequence.draft[: max(room, 0)]
        missing = state.blocks_for(computed + 1 + len(draft)) - len(sequence.block_ids)
        if missing > 0:
            spare = max(state.blocks.num_free - len(state.running), 0)
            sequence.block_ids += state.blocks.allocate(min(missing, spare))
            draft = draft[: len(sequence.block_ids) * state.block_size - computed - 1]
        self.tokens_left -= len(draft)
        self.num_extra_logits += len(draft)
        num_blocks = state.blocks_for(computed + 1 + len(draft))
        self.scheduled.append(
            ScheduledSequence(
                sequence.request.request_id,
                (sequence.token_ids[-1], *draft),
                computed,
                sequence.block_ids[:num_blocks],
                sequence.sample_spec,
                len(draft),
                adapter=sequence.adapter_slot,
            )
        )
        self.sequences.append(sequence)
        sequence.num_pending = 1  # at least
        sequence.num_computed_tokens = computed + 1 + len(draft)
        if not draft:  # what a draft fills is known when it is verified
            self._promise(sequence, computed, computed + 1)

    def _grow(self, sequence: Sequence) -> bool:
        """One more block; False if the sequence itself had to be preempted."""
        state = self.state
        while not state.blocks.num_free:
            last = state.last_running()
            state.preempt(last)
            self.preempted.append(last)
            if last is sequence:
                return False
        sequence.block_ids += state.blocks.allocate(1)
        return True

    def _spare_logits(self) -> int:
        """Rows of logits that are left when every running sequence has its own."""
        own = self.policy.max_num_logits - len(self.state.running) - self.num_extra_logits
        return min(own, self._spare_rows())

    def _spare_rows(self) -> int:
        """The same for rows of hidden states, of which those of logits are some."""
        return self.policy.max_num_rows - len(self.state.running) - self.num_extra_logits - self.num_extra_rows

    def prefill(self, sequence: Sequence) -> None:
        """Schedule the next chunk of a prompt; only the last one samples, or brings an embedding."""
        start = sequence.num_computed_tokens
        end = min(start + self.tokens_left, len(sequence.token_ids))
        targets: tuple[int, ...] = ()
        num_hidden = 0
        if sequence.pool is not None and sequence.pool.every:
            end = min(end, start + 1 + max(self._spare_rows(), 0))
            num_hidden = end - start
            self.num_extra_rows += num_hidden - 1
        elif sequence.pool is not None:
            num_hidden = int(end == len(sequence.token_ids))
        if sequence.wants_prompt_logprobs:
            first = len(sequence.prompt_logprobs)
            if start < first:  # preempted: that much is known already
                end = min(end, first)
            else:
                end = min(end, len(sequence.request.prompt_token_ids), start + 1 + max(self._spare_logits(), 0))
                targets = sequence.request.prompt_token_ids[start + 1 : end + 1]
                self.num_extra_logits += end - start - 1
        self.scheduled.append(
            ScheduledSequence(
                sequence.request.request_id,
                tuple(sequence.token_ids[start:end]),
                start,
                sequence.block_ids[: self.state.blocks_for(end)],
                sequence.sample_spec if end == len(sequence.token_ids) and sequence.pool is None else None,
                targets=targets,
                num_top=sequence.request.params.prompt_logprobs or 0,
                adapter=sequence.adapter_slot,
                num_hidden=num_hidden,
            )
        )
        self.sequences.append(sequence)
        self.tokens_left -= end - start
        sequence.num_pending = int(end == len(sequence.token_ids) and sequence.pool is None)
        sequence.num_computed_tokens = end
        if self.state.blocks.cache is not None:
            self._promise(sequence, start, end)

    def _promise(self, sequence: Sequence, start: int, end: int) -> None:
        """Let others find the blocks that the tokens [start, end) make full."""
        self.promised += self.state.remember(sequence, start, end, self.now)

    def make_room(self) -> None:
        """Preempt running sequences for the first that waits, if its priority is higher."""
        state = self.state
        if self.policy.capacity == "guaranteed_no_evict" or (first := state.first_waiting()) is None:
            return
        while state.running and self._fits(first) is None:
            last = state.last_running()
            if last.request.priority <= first.request.priority or last.order < first.order:
                return
            state.preempt(last)
            self.displaced.append(last)

    def admissions(self) -> None:
        """Admit who waits, as long as there is room."""
        state = self.state
        self.first_admitted = len(self.scheduled)
        while self.tokens_left and (sequence := state.first_waiting()) is not None:
            if (self.num_extra_logits or self.num_extra_rows) and self._spare_logits() <= 0:
                return
            fits = self._fits(sequence)
            if fits is None:
                return
            found, parent = fits
            state.admit(sequence)
            self._give_blocks(sequence, found, parent)
            if sequence.first_scheduled_time is None:
                sequence.first_scheduled_time = self.now
                sequence.num_cached_tokens = sequence.num_computed_tokens
                self.num_cached_tokens += sequence.num_cached_tokens
            self.prefill(sequence)

    def _fits(self, sequence: Sequence) -> tuple[list[int], Sequence | None] | None:
        """Where the beginning of the sequence is to be had, cached blocks or a parent; None if there is no room."""
        state = self.state
        if len(state.running) >= self.policy.max_num_seqs:
            return None
        num_tokens = len(sequence.token_ids)
        found: list[int] = []
        num_idle = 0
        parent = sequence.parent
        if parent is not None and self._is_computed(parent, num_tokens - 1):
            num_shared = (num_tokens - 1) // state.block_size
        else:
            parent = None
            if state.blocks.cache is not None and sequence.request.cache.read:
                # The last token is computed in any case: its logits are what the request is about.
                keys = sequence.keys(state.block_size)[: (num_tokens - 1) // state.block_size]
                found, num_idle = state.blocks.find(keys)
            num_shared = len(found)
        free = state.blocks.num_free - num_idle
        if self.policy.capacity == "guaranteed_no_evict":
            promised = sum(state.blocks_at_end(s) - len(s.block_ids) for s in state.running.values())
            fits = state.blocks_at_end(sequence) - num_shared + promised <= free
        else:
            # One block of headroom for every running sequence that may want one: without it, admission into an almost
            # full pool is undone by a preemption within a few steps, and the prefill was for nothing.
            room = free - (state.blocks_for(num_tokens) - num_shared)
            fits = room >= len(state.running) or room >= sum(
                state.blocks_at_end(s) > len(s.block_ids) for s in state.running.values()
            )
        return (found, parent) if fits else None

    def _is_computed(self, sequence: Sequence, num_tokens: int) -> bool:
        """Whether the beginning of a sequence is in its blocks before this step: what is copied must be."""
        if sequence.status is not Status.RUNNING or sequence.num_computed_tokens < num_tokens:
            return False
        # Who is admitted in this step may have found blocks that this step computes.
        return not any(s is sequence and (i >= self.first_admitted or b.num_computed_tokens < num_tokens)
                       for i, (s, b) in enumerate(zip(self.sequences, self.scheduled, strict=True)))  # fmt: skip

    def _give_blocks(self, sequence: Sequence, found: list[int], parent: Sequence | None) -> None:
        """All blocks of a sequence that was just admitted, and how far they are computed."""
        blocks, block_size = self.state.blocks, self.state.block_size
        num_tokens = len(sequence.token_ids)
        needed = self.state.blocks_for(num_tokens)
        if parent is not None:
            computed = num_tokens - 1
            shared = parent.block_ids[: computed // block_size]
            blocks.fork(shared)
            own = blocks.allocate(needed - len(shared))
            if computed % block_size:  # both go on writing in this block, each in its own copy
                self.copies.append((parent.block_ids[len(shared)], own[0]))
        else:
            if found:
                blocks.take(found, sequence.request.cache, self.now)
            shared, computed = tuple(found), len(found) * block_size
            own = blocks.allocate(needed - len(shared))
        sequence.block_ids = shared + own
        sequence.num_computed_tokens = computed
        sequence.parent = None  # from here on they differ


def schedule(state: SchedulerState, policy: Policy, now: float, *, flush: bool = False) -> Schedule:
    """Decide the next step; ``now`` (seconds) stamps sequences that run for the first time.

    flush: nobody else will come before this step. The result is empty only when there is no unfinished sequence, or
    while a batch that is not in flight waits to be filled.
    """
    state.blocks.expire(now)
    if state.waiting:
        state.open_doors(policy, now, flush)
    step = _compose(state, policy, now)
    displaced = step.displaced
    while not step.scheduled and state.running and state.first_waiting() is not None:
        # All who run are held for beams that find no room.
        displaced.append(state.last_running())
        state.preempt(displaced[-1])
        step = _compose(state, policy, now)
        displaced += step.displaced
    return step.result((*displaced, *step.preempted))


def _compose(state: SchedulerState, policy: Policy, now: float) -> _Step:
    step = _Step(state, policy, now)
    if state.waiting:
        step.make_room()
    for sequence in step.decodes():
        if step.tokens_left and sequence.status is Status.RUNNING:
            step.prefill(sequence)
    # The victim of a preemption would take back the very blocks that were just freed.
    if not step.preempted and state.waiting:
        step.admissions()
    return step


def schedule_ahead(state: SchedulerState, policy: Policy, now: float) -> Schedule | None:
    """The step after the one that runs; None if that cannot be decided before the one that runs is collected."""
    if state.waiting:
        first = state.first_waiting()
        has_seat = len(state.running) < policy.max_num_seqs
        # Who waits cannot come in before the running step ends, unless there is a seat, or one to take from another.
        if first is None or has_seat or state.last_running().request.priority > first.request.priority:
            return None
    running = state.running.values()
    for sequence in running:
        # Without a token on its way it computes a prompt: what comes in beside such a long step shall not wait for one
        # more. And the next token of a beam is chosen by comparison with others.
        if not sequence.num_pending or sequence.search is not None:
            return None
    if state.blocks.num_free < len(running):
        block_size = state.block_size
        needed = sum(s.num_computed_tokens >= len(s.block_ids) * block_size for s in running)
        if needed > state.blocks.num_free:
            return None
    state.blocks.expire(now)
    step = _Step(state, policy, now)
    step.decodes()
    return step.result(()) if step.scheduled else None
