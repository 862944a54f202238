"""Beam search: keep the few likeliest beginnings of an answer instead of one.

Every beam is a sequence of its own. A step brings the likeliest next tokens of each; of all these continuations the
best go on, as forks of the beams that they continue, which share all blocks but the last with them. The rules are
those of transformers' ``generate``: a hypothesis ends with a stop token, its score is the sum of its log-probabilities
divided by its length to the power of ``length_penalty``, and the search is over when no beam can beat the worst of
``width`` ended hypotheses any more.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from ..outputs import Logprob
from .request import FinishReason, Request, Sequence
from .scheduler import SchedulerState


@dataclass(frozen=True, slots=True)
class Hypothesis:
    """An answer that ended, and of each of its tokens when it came and the log-probabilities."""

    score: float
    token_ids: tuple[int, ...]
    token_times: tuple[float, ...]
    entries: tuple[dict[int, Logprob], ...]
    finish_reason: FinishReason


@dataclass(frozen=True, slots=True)
class Continuation:
    """A beam that goes on: ``sequence`` with one more token."""

    sequence: Sequence
    token_id: int
    total: float  # log-probability
    entries: tuple[dict[int, Logprob], ...]


@dataclass(slots=True)
class _Beam:
    total: float
    entries: tuple[dict[int, Logprob], ...]
    next: dict[int, Logprob] | None = None  # what may follow; None: not known yet


class BeamSearch:
    """The search for one request.

    root: computes the prompt; the first beam. width: beams that are kept. answer_ids: under which the best are handed
    out. num_top: log-probabilities that were asked for, besides that of the token; None: none.
    """

    def __init__(self, root: Sequence, width: int, answer_ids: tuple[str, ...], num_top: int | None) -> None:
        self.root = root
        self.num_top = num_top
        self.width = width
        self.answer_ids = answer_ids
        self.ended: list[Hypothesis] = []  # the best, at most ``width``
        self._beams: dict[Sequence, _Beam] = {root: _Beam(0.0, ())}

    @property
    def request(self) -> Request:
        return self.root.request

    @property
    def sequences(self) -> tuple[Sequence, ...]:
        """The beams."""
        return tuple(self._beams)

    def report(self, sequence: Sequence, following: Mapping[int, Logprob]) -> bool:
        """Take the likeliest next tokens of a beam; whether those of all beams are there."""
        self._beams[sequence].next = dict(following)
        return all(beam.next is not None for beam in self._beams.values())

    def advance(self, now: float) -> list[Continuation]:
        """What goes on, the likeliest first; nothing at the end of the search. ``adopt`` says what became of it."""
        params, stops = self.request.params, self.request.stop_token_ids
        candidates = sorted(
            (-(beam.total + logprob), index, logprob.rank, token_id, sequence)
            for index, (sequence, beam) in enumerate(self._beams.items())
            for token_id, logprob in (beam.next or {}).items()
        )
        length = len(next(iter(self._beams)).token_ids) + 1
        num_output = length - len(self.request.prompt_token_ids)
        going: list[Continuation] = []
        for place, (cost, _, _, token_id, sequence) in enumerate(candidates[: 2 * self.width]):
            beam = self._beams[sequence]
            entries = (*beam.entries, _with_first(beam.next or {}, token_id))
            if token_id not in stops:
                going.append(Continuation(sequence, token_id, -cost, entries))
            elif num_output > params.min_tokens and place < self.width:
                self._end(Continuation(sequence, token_id, -cost, entries), now, "stop")
            if len(going) == self.width:
                break
        if length >= self.request.max_total_tokens:
            for one in going:
                self._end(one, now, "length")
            return []
        return [] if not going or self._is_decided(going[0].total, num_output) else going

    def logprobs(self, hypothesis: Hypothesis) -> tuple[dict[int, Logprob] | None, ...]:
        """Of each token of an answer, what was asked for."""
        num_top = self.num_top
        if num_top is None:
            return (None,) * len(hypothesis.token_ids)
        return tuple(
            {t: p for t, p in entry.items() if t == token_id or p.rank <= num_top}
            for token_id, entry in zip(hypothesis.token_ids, hypothesis.entries, strict=True)
        )

    def adopt(self, beams: Mapping[Sequence, Continuation]) -> None:
        """The sequences that now are the beams, each with its last token."""
        self._beams = {sequence: _Beam(one.total, one.entries) for sequence, one in beams.items()}

    def _is_decided(self, best_total: float, num_output: int) -> bool:
        if len(self.ended) < self.width:
            return False
        params = self.request.params
        return params.early_stopping or self.ended[-1].score >= best_total / num_output**params.length_penalty

    def _end(self, last: Continuation, now: float, reason: FinishReason) -> None:
        sequence = last.sequence
        token_ids = (*sequence.output_token_ids, last.token_id)
        score = last.total / len(token_ids) ** self.request.params.length_penalty
        times = (*sequence.token_times, now)
        self.ended.append(Hypothesis(score, token_ids, times, last.entries, reason))
        self.ended.sort(key=lambda hypothesis: -hypothesis.score)
        del self.ended[self.width :]


class BeamSearches:
    """All searches that are going on, and their beams among the sequences of the scheduler."""

    def __init__(self, state: SchedulerState) -> None:
        self._state = state
        self._searches: dict[str, BeamSearch] = {}  # by the ids of their answers
        self._num_forks = 0

    def __contains__(self, answer_id: str) -> bool:
        return answer_id in self._searches

    def get(self, answer_id: str) -> BeamSearch | None:
        return self._searches.get(answer_id)

    def begin(self, search: BeamSearch) -> None:
        search.root.search = search
        self._searches.update(dict.fromkeys(search.answer_ids, search))

    def take(self, search: BeamSearch, sequence: Sequence, following: Mapping[int, Logprob], now: float) -> bool:
        """Take what may follow a beam, which goes on when all of its search have got as far. True at the end."""
        sequence.num_pending = 0
        sequence.held = True
        if not search.report(sequence, following):
            return False
        going = search.advance(now)
        if going:
            self._fork(search, going, now)
        return not going

    def _fork(self, search: BeamSearch, going: Iterable[Continuation], now: float) -> None:
        """Let beams go on: the likeliest continuation of each in its own blocks, others as forks."""
        beams: dict[Sequence, Continuation] = {}
        forks: list[Sequence] = []
        for one in going:
            sequence = one.sequence
            if sequence in beams:
                self._num_forks += 1
                request = replace(sequence.request, request_id=f"{search.root.request_id}/{self._num_forks}")
                _, index, _ = search.root.order
                sequence = Sequence(request, index, one.sequence, fork=self._num_forks)
                sequence.copy_output(one.sequence)
                sequence.search = search
                forks.append(sequence)
            beams[sequence] = one
        for sequence in search.sequences:
            if sequence not in beams:
                self._state.remove(sequence, "abort")
        for fork in forks:
            self._state.add(fork, at_once=True)
        for sequence, one in beams.items():
            sequence.append(one.token_id, now)
            self._state.let_go(sequence)
        search.adopt(beams)

    def end(self, search: BeamSearch, reason: FinishReason, stop_reason: str | None = None) -> tuple[str, ...]:
        """Forget a search and its beams; the ids of its answers."""
        for sequence in search.sequences:
            self._state.remove(sequence, reason, stop_reason)
        for request_id in search.answer_ids:
            del self._searches[request_id]
        return search.answer_ids


def _with_first(entries: Mapping[int, Logprob], token_id: int) -> dict[int, Logprob]:
    """With the token that was taken in front, as a sampler gives them."""
    return {token_id: entries[token_id], **entries}
