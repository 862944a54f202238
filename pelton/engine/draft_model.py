"""Drafts from a small model: it says what it would, and the large one checks all of it in one step.

The draft model samples with the request's own parameters and the very random number that will be used to check the
token. Two distributions that are alike then mostly pick the same token, at any temperature.

Its keys and values lie in a cache of its own, in the same blocks that the sequence has in the other: who shares a
prefix there shares it here. What it computes may be missing or wrong without harm, as drafts are only guesses; so it
looks at sequences only when it is asked, and catches up with what it has not seen.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field, replace
from typing import Any

import numpy.typing as npt

from ..backends.base import Batch, Executor, SampleSpec, ScheduledSequence
from ..config import SamplingParams
from .prefix_cache import Key
from .request import Sequence
from .scheduler import Schedule

#: Tokens of one step of the draft model, beyond the last of each sequence: nobody waits long for its reading.
CATCH_UP = 256


@dataclass(slots=True)
class _Progress:
    """How far the draft model has got with a sequence."""

    spec: SampleSpec
    output: list[int]  # of the spec: the sequence's, and while a draft grows the draft as well
    num_preemptions: int
    num_computed: int = 0  # of the known tokens, then the draft
    num_known: int = 0
    draft: list[int] = field(default_factory=list)


@dataclass(slots=True)
class _Row:
    """A sequence while its draft grows."""

    index: int  # in the batch
    sequence: Sequence
    scheduled: ScheduledSequence
    progress: _Progress | None = None  # from its first step on, as it may share what others compute in that step

    def is_done(self, draft: SequenceOf[int]) -> bool:
        return len(draft) == self.scheduled.num_drafts or draft[-1] in self.sequence.request.stop_token_ids


class DraftModel:
    """Fills the drafts of a schedule.

    Args:
        executor: of the draft model. As many blocks, of the same size, as the other's; belongs to the caller.
        vocab_size: of its logits, at most that of the model that checks.
    """

    def __init__(self, executor: Executor, vocab_size: int) -> None:
        self._executor = executor
        self._block_size = executor.kv_spec.block_size
        self._vocab_size = vocab_size
        self._holds: dict[int, Key] = {}  # block -> what is in it, if it is full
        self.seconds: float | None = None  # of one token for all sequences, if the last call was typical

    def fill(self, planned: Schedule) -> Schedule:
        """The schedule with drafts for all ``num_drafts``, or with fewer where the draft model has no more to say."""
        rows = [
            _Row(index, sequence, scheduled)
            for index, (sequence, scheduled) in enumerate(zip(planned.sequences, planned.batch.sequences, strict=True))
            if scheduled.num_drafts
        ]
        self.seconds = None
        steps, start, longest = 0, time.perf_counter(), 1
        growing = rows
        try:
            while growing:
                growing, most = self._step(growing)
                steps, longest = steps + 1, max(longest, most)
        except BaseException:
            self._holds.clear()  # of what was to be computed
            for row in rows:
                row.sequence.draft_progress = None
            raise
        if steps and longest <= 2:  # nothing to catch up with
            self.seconds = (time.perf_counter() - start) / steps
        sequences = list(planned.batch.sequences)
        missing = 0
        for row in rows:
            sequences[row.index] = self._with_draft(row)
            missing += row.scheduled.num_drafts - sequences[row.index].num_drafts
        return replace(
            planned,
            batch=replace(planned.batch, sequences=tuple(sequences)),
            num_tokens=planned.num_tokens - missing,
            decode_tokens=planned.decode_tokens - missing,
        )

    def _progress_of(self, sequence: Sequence) -> _Progress:
        progress: _Progress | None = sequence.draft_progress
        if progress is None or progress.num_preemptions != sequence.num_preemptions:
            output: list[int] = []
            progress = _Progress(self._spec(sequence, output), output, sequence.num_preemptions, self._found(sequence))
            sequence.draft_progress = progress
        else:
            # Of the last draft, what was right stays computed.
            known, before = sequence.token_ids, progress.num_known
            right = 0
            while (
                right < len(progress.draft)
                and before + right < len(known)
                and progress.draft[right] == known[before + right]
            ):
                right += 1
            if right < len(progress.draft):
                progress.spec = replace(progress.spec)  # a sampler counts on an output that only grows
            progress.num_computed = min(progress.num_computed, before + right, len(known) - 1)
            progress.num_computed = max(progress.num_computed, self._found(sequence))
        progress.num_known = len(sequence.token_ids)
        progress.draft = []
        progress.output[:] = self._own(sequence.output_token_ids)
        return progress

    def _spec(self, sequence: Sequence, output: list[int]) -> SampleSpec:
        """How the draft model samples: as the other, but for what it does not know and what is of no use."""
        spec, vocab = sequence.sample_spec, self._vocab_size
        params: SamplingParams = spec.params
        allowed = params.allowed_token_ids
        params = replace(
            params,
            logprobs=None,
            prompt_logprobs=None,
            logits_processors=(),  # Python for every token costs more than it may bring
            bad_words=[word for word in params.bad_words if not isinstance(word, str) and max(word) < vocab],
            logit_bias={t: b for t, b in (params.logit_bias or {}).items() if t < vocab} or None,
            allowed_token_ids=None if allowed is None else [t for t in allowed if t < vocab] or None,
        )
        stops = frozenset(t for t in spec.stop_token_ids if t < vocab)
        mask = spec.mask

        def words(_: SequenceOf[int]) -> npt.NDArray[Any] | None:
            assert mask is not None
            allowed = mask(output[len(sequence.output_token_ids) :])
            return None if allowed is None else allowed[: -(-vocab // 32)]

        return replace(
            spec,
            params=params,
            prompt_token_ids=self._own(spec.prompt_token_ids),
            output_token_ids=output,
            stop_token_ids=stops,
            mask=None if mask is None else words,
        )

    def _own(self, token_ids: Iterable[int]) -> tuple[int, ...]:
        """Ids beyond the vocabulary, of which the other may have more, as one that there is."""
        vocab = self._vocab_size
        return tuple([t if t < vocab else 0 for t in token_ids])

    def _found(self, sequence: Sequence) -> int:
        """Tokens whose blocks hold what this sequence needs, for others that began alike."""
        keys = sequence.keys(self._block_size)
        count = 0
        for block, key in zip(sequence.block_ids, keys, strict=False):
            if self._holds.get(block) != key:
                break
            count += 1
        return min(count * self._block_size, len(sequence.token_ids) - 1)

    def _step(self, rows: list[_Row]) -> tuple[list[_Row], int]:
        """One more token for each row; those that are not done, and the most tokens that one had to compute."""
        spare = CATCH_UP
        longest = 1
        limit = self._executor.kv_spec.max_model_len
        batch: list[ScheduledSequence] = []
        asked: list[tuple[_Row, _Progress]] = []
        for row in rows:
            progress = row.progress
            if progress is None:
                progress = row.progress = self._progress_of(row.sequence)
            tokens = (*row.sequence.token_ids[progress.num_computed :], *progress.draft[-1:])
            start = progress.num_computed
            count = min(len(tokens), 1 + spare, limit - start)
            if count < len(tokens):  # whole blocks: another sequence may share what this one leaves unfinished
                count = (start + count) // self._block_size * self._block_size - start
            if count <= 0:
                continue
            spare -= count - 1
            longest = max(longest, count)
            end = start + count
            blocks = row.scheduled.block_ids[: -(-end // self._block_size)]
            spec = progress.spec if count == len(tokens) else None
            batch.append(ScheduledSequence(row.sequence.request_id, self._own(tokens[:count]), start, blocks, spec))
            asked.append((row, progress))
            self._mark(row, start, end)
            progress.num_computed = end
        if not batch:
            return [], longest
        output = self._executor.collect(self._executor.submit(Batch(tuple(batch))))
        growing = []
        for (row, progress), sampled in zip(asked, output.tokens, strict=True):
            if not sampled:
                continue  # it is catching up, or finds nothing to say
            progress.draft.append(sampled[0].token_id)
            progress.output.append(sampled[0].token_id)
            if not row.is_done(progress.draft):
                growing.append(row)
        return growing, longest

    def _mark(self, row: _Row, start: int, end: int) -> None:
        """Note what the blocks of these tokens hold from now on."""
        size = self._block_size
        known = len(row.sequence.token_ids)
        keys = row.sequence.keys(size)
        for index in range(start // size, -(-end // size)):
            block = row.scheduled.block_ids[index]
            if (index + 1) * size <= min(end, known):
                self._holds[block] = keys[index]
            else:
                self._holds.pop(block, None)

    def _with_draft(self, row: _Row) -> ScheduledSequence:
        scheduled, progress = row.scheduled, row.progress
        draft = () if progress is None else progress.draft
        end = scheduled.num_computed_tokens + 1 + len(draft)
        return scheduled._replace(
            token_ids=(scheduled.token_ids[0], *draft),
            num_drafts=len(draft),
            block_ids=scheduled.block_ids[: -(-end // self._block_size)],
        )
