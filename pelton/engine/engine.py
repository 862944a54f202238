"""The loop: schedule, submit, collect, append.

Synchronous and single-threaded; text, networking and threads are the layers above.
"""

from __future__ import annotations

import heapq
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, replace
from itertools import islice, zip_longest
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

from ..backends.base import PENDING, Executor, SampledToken, ScheduledSequence, StepProfile, StepStats
from ..config import PoolerConfig, PoolingParams, SamplingParams
from ..errors import RequestError
from ..metrics import RequestMetrics
from ..outputs import Logprob
from .adapters import Adapters
from .beam_search import BeamSearch, BeamSearches
from .draft_model import DraftModel
from .limits import Limits
from .prefix_cache import CachePolicy, keys_of
from .prefix_file import PrefixFileError, read_prefix, write_prefix
from .request import FinishReason, Request, Sequence, Status, answer_ids, derive_seed, num_answers
from .scheduler import Batching, CapacityPolicy, Policy, Schedule, SchedulerState, schedule, schedule_ahead
from .speculation import NgramProposer, SpeculationControl, max_num_logits, max_num_rows
from .stats import EngineStats, StepRecord
from .structured import Grammar


class Progress(Protocol):
    """What whoever reads the outputs needs of a sequence."""

    prompt_logprobs: list[dict[int, Logprob]]

    def metrics(self) -> RequestMetrics: ...


@dataclass(slots=True)
class EngineOutput:
    """What a step brought to one request, and the sequence that it belongs to.

    ``finish_reason`` is set, with ``metrics``, by the step that ends the request. ``stop_reason`` is the
    token of ``stop_token_ids`` that ended it, None for an end-of-sequence token; for the finish_reason "error" what
    went wrong. ``embedding`` is set if one was asked for, float32 [hidden size] or [dimensions]: it comes with the
    finish_reason "stop", without tokens.
    """

    request_id: str
    sequence: Progress
    token_ids: tuple[int, ...]
    logprobs: tuple[dict[int, Logprob] | None, ...]
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    metrics: RequestMetrics | None = None
    embedding: npt.NDArray[np.float32] | None = None


@dataclass(frozen=True, slots=True)
class _Flight:
    """A step that was submitted."""

    planned: Schedule
    ticket: int


#: Records of steps: some ten seconds to a minute of them.
_STEPS_KEPT = 1024
#: Of a request that is embedded, which samples nothing.
_NO_SAMPLING = SamplingParams(temperature=0.0, max_tokens=1)


class LLMEngine:
    """Runs requests on an executor with in-flight batching.

    Not thread-safe. The executor belongs to the caller, who closes it.

    Args:
        executor: runs the steps.
        max_num_seqs: sequences that run at once.
        max_num_batched_tokens: tokens of one step, prefill and decode together.
        capacity_policy: "max_utilization" admits what fits now and preempts when blocks run out;
            "guaranteed_no_evict" admits what fits to its end.
        batching: "inflight", or "dynamic" and "static", for comparison: see scheduler.py.
        batching_delay: seconds that the first of such a batch waits for others; None: the mode's own.
        num_speculative_tokens: longest draft; 0: no speculation.
        draft_executor: of a smaller model with the same tokens, which makes the drafts; None: they come from the text
            so far. As many KV blocks as the other; belongs to the caller as well. draft_vocab_size: tokens that its
            logits are for, if they are fewer.
        async_scheduling: decide on a step of decodes while the one before it runs.
        enable_prefix_caching: find what earlier requests have computed.
        max_loras: adapters that the executor has slots for.
        eos_token_ids: tokens that end a sequence unless the request ignores them.
        vocab_size: prompt tokens must be below it.
        pooler: what the model says about embeddings.
        seed: from it come the seeds of requests that have none.
        clock: monotonic seconds.

    Raises:
        RequestError: a limit below 1.
    """

    def __init__(
        self,
        executor: Executor,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        capacity_policy: CapacityPolicy = "max_utilization",
        batching: Batching = "inflight",
        batching_delay: float | None = None,
        num_speculative_tokens: int = 0,
        draft_executor: Executor | None = None,
        draft_vocab_size: int | None = None,
        async_scheduling: bool = True,
        enable_prefix_caching: bool = True,
        max_loras: int = 0,
        eos_token_ids: frozenset[int],
        vocab_size: int,
        pooler: PoolerConfig | None = None,
        seed: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        for name, value in (("max_num_seqs", max_num_seqs), ("max_num_batched_tokens", max_num_batched_tokens)):
            if value < 1:
                raise RequestError(f"{name} is {value}", "choose at least 1")
        self._executor = executor
        kv_spec = executor.kv_spec
        self._pooler = pooler or PoolerConfig()
        self._limits = Limits(kv_spec, max_num_seqs, vocab_size, self._pooler)
        self._policy = Policy(
            max_num_seqs, max_num_batched_tokens, capacity_policy, batching, batching_delay,
            max_num_logits=max_num_logits(max_num_seqs, num_speculative_tokens),
            max_num_rows=max_num_rows(max_num_seqs, num_speculative_tokens, max_num_batched_tokens),
        )  # fmt: skip
        self._speculation = SpeculationControl(num_speculative_tokens) if num_speculative_tokens else None
        self._draft_model: DraftModel | None = None
        if draft_executor is not None and num_speculative_tokens:
            self._draft_model = DraftModel(draft_executor, min(vocab_size, draft_vocab_size or vocab_size))
        self._state = SchedulerState(kv_spec.num_blocks, kv_spec.block_size, caching=enable_prefix_caching)
        self._adapters = Adapters(max_loras)
        self._deadlines: list[tuple[float, int, Sequence]] = []  # a heap
        self._num_grammars = 0  # that were ever asked for: without any, steps need not look for them
        self._ready: list[EngineOutput] = []  # that nobody knows yet: a step that fails has no outputs
        self._flight: _Flight | None = None  # the step that runs
        # With drafts, how many tokens a step brings is known at its end.
        self._async_scheduling = async_scheduling and not num_speculative_tokens
        # A tokenizer may know ids beyond the logits; they are never sampled, and must not index them.
        self._eos_token_ids = frozenset(t for t in eos_token_ids if 0 <= t < vocab_size)
        self._vocab_size = vocab_size
        self._seed = seed
        self._clock = clock
        self._num_added = 0
        self._searches = BeamSearches(self._state)
        self._stats = EngineStats()
        #: Measure each kernel call of the next step that is launched alone, into ``profile``.
        self.profile_next = False
        self.profile: StepProfile | None = None
        self._steps: deque[StepRecord] = deque(maxlen=_STEPS_KEPT)

    @property
    def max_model_len(self) -> int:
        """Tokens, prompt + output, that one sequence may have: the least of context and KV pool."""
        return self._limits.max_model_len

    @property
    def has_unfinished(self) -> bool:
        return bool(self._state.running or self._state.waiting or self._ready)

    def add_request(
        self,
        request_id: str,
        prompt_token_ids: Iterable[int],
        params: SamplingParams | PoolingParams,
        *,
        arrival_time: float | None = None,
        priority: int = 0,
        deadline: float | None = None,
        cache: CachePolicy | None = None,
        parent_id: str | None = None,
        grammar: Grammar | None = None,
        adapter: str | None = None,
    ) -> tuple[str, ...]:
        """Queue a request; the ids that its outputs will have.

        That is the request's own, as ``params.n`` is not looked at: the layer above adds n requests. A beam search
        is one request, with the ids ``f"{request_id}.{i}"`` if n > 1; its answers come at its end. With PoolingParams
        the request brings the embedding of its prompt.

        Args:
            arrival_time: when the request was sent, in seconds of the engine's clock; None: now.
            priority: lower ones go first, by a minute of waiting for each step; they also take the place of running
                ones that came later.
            deadline: seconds of the engine's clock; unfinished then, the request ends with "timeout".
            cache: how it uses the prefix cache.
            parent_id: an unfinished request with the same prompt, which is computed once for both.
            grammar: what the answer must follow; its own, not used by others. It ends with an end-of-sequence token,
                whatever ``ignore_eos`` says.
            adapter: the name of one that was added.

        Raises:
            RequestError: the id is in use, the parent has another prompt or adapter, there is no such adapter, or
                ``validate`` refuses the request.
        """
        prompt = tuple(prompt_token_ids)
        if self.is_unfinished(request_id):
            raise RequestError(f"request id {request_id!r} is in use", "choose another one")
        max_total_tokens = self.validate(prompt, params)
        ids = answer_ids(request_id, num_answers(params))
        cache, pooling = cache or CachePolicy(), None
        if isinstance(params, PoolingParams):
            pooling, params = self._pooler.resolve(params), _NO_SAMPLING
            if grammar is not None or parent_id is not None:
                raise RequestError("an embedding has neither grammar nor parent", "leave them out")
            if pooling.pooling == "mean":  # every token of the prompt is computed
                cache = replace(cache, read=False)
        width, num_top = params.best_of or params.n, params.logprobs
        if params.use_beam_search:
            top = min(2 * width, self._vocab_size)
            params = replace(params, n=1, best_of=None, temperature=0.0, logprobs=top)
            if grammar is not None or parent_id is not None:
                raise RequestError("a beam search has neither grammar nor parent", "leave them out")
        if params.prompt_logprobs is not None:  # every token of the prompt is computed
            cache, parent_id = replace(cache, read=False), None
        stop_token_ids = frozenset(params.stop_token_ids)
        ignore_eos = params.ignore_eos and grammar is None
        request = Request(
            request_id=request_id,
            prompt_token_ids=prompt,
            params=params,
            arrival_time=self._clock() if arrival_time is None else arrival_time,
            seed=derive_seed(self._seed, self._num_added) if params.seed is None else params.seed,
            max_total_tokens=max_total_tokens,
            stop_token_ids=stop_token_ids if ignore_eos else stop_token_ids | self._eos_token_ids,
            priority=priority,
            deadline=deadline,
            cache=cache,
            adapter=self._adapters.get(adapter),
            pooling=pooling,
        )
        parent = self._state.find(parent_id) if parent_id is not None else None  # if finished: alone, then
        if parent is not None and parent.request.prompt_token_ids != prompt:
            raise RequestError(f"request {request_id!r} has another prompt than its parent", "add it without")
        if parent is not None and parent.request.adapter != request.adapter:
            raise RequestError(f"request {request_id!r} has another adapter than its parent", "add it without")
        self._num_added += 1
        sequence = Sequence(request, self._num_added, parent, grammar)
        if params.use_beam_search:
            self._searches.begin(BeamSearch(sequence, width, ids, num_top))
        self._num_grammars += grammar is not None
        self._state.add(sequence)
        if deadline is not None:
            heapq.heappush(self._deadlines, (deadline, self._num_added, sequence))
        return ids

    def validate(self, prompt: tuple[int, ...], params: SamplingParams | PoolingParams) -> int:
        """As :meth:`Limits.validate`. May be called from any thread."""
        return self._limits.validate(prompt, params)

    @property
    def adapters(self) -> Adapters:
        """Those that requests may name."""
        return self._adapters

    def add_adapter(self, name: str, identity: str, weights: Mapping[str, Any]) -> None:
        """Let requests use an adapter. Between steps, beside requests that use others or none.

        identity: of its weights. weights: as for :meth:`~pelton.backends.base.Executor.set_adapter`.

        Raises:
            RequestError: the name is in use, or there is no slot.
        """
        adapter = self._adapters.place(name, identity)
        self.drain()
        self._executor.set_adapter(adapter.slot, weights)
        self._adapters.add(adapter)

    def remove_adapter(self, name: str) -> None:
        """Forget an adapter. Between steps.

        Raises:
            RequestError: there is none of this name, or unfinished requests use it.
        """
        adapter = self._adapters.get(name)
        assert adapter is not None
        unfinished = (*self._state.running.values(), *self._state.waiting.values())
        users = sum(sequence.request.adapter == adapter for sequence in unfinished)
        if users:
            requests = "a request that is" if users == 1 else f"{users} requests that are"
            raise RequestError(f"adapter {name!r} is used by {requests} unfinished", "wait for them, or abort them")
        self.drain()
        self._adapters.remove(adapter)
        self._executor.set_adapter(adapter.slot, None)

    def now(self) -> float:
        """Seconds of the engine's clock."""
        return self._clock()

    def abort(self, request_id: str) -> RequestMetrics | None:
        """End a request with finish_reason "abort". None if it is unknown or finished, which is no error."""
        return self.finish(request_id, "abort") if self.is_unfinished(request_id) else None

    def is_unfinished(self, request_id: str) -> bool:
        """Whether outputs under this id may still come."""
        return self.sequence(request_id) is not None or request_id in self._searches

    def sequence(self, request_id: str) -> Sequence | None:
        """One that runs or waits, to look at."""
        return self._state.find(request_id)

    def finish(self, request_id: str, reason: Literal["stop", "length", "abort"]) -> RequestMetrics:
        """End a running request from outside: the layer that sees text found a stop string.

        Raises:
            KeyError: no such unfinished request.
        """
        search = self._searches.get(request_id)
        if search is not None:  # of all its answers
            self._searches.end(search, reason)
            return search.root.metrics()
        sequence = self._state.find(request_id)
        if sequence is None:
            raise KeyError(request_id)
        self._state.remove(sequence, reason)
        self._ready = [output for output in self._ready if output.sequence is not sequence]
        return sequence.metrics()

    def step(self, *, flush: bool = False) -> list[EngineOutput]:
        """Run one step; the outputs are those of requests that got a token or ran out of time.

        flush: nobody else will come before this step, so that a static or dynamic batch need not wait to be filled.
        While it does, nothing runs and there is no output. An exception of the executor passes through; the
        requests stay, and what the step was to compute is computed again.
        """
        now = self._clock()
        while self._deadlines and self._deadlines[0][0] <= now:
            self._time_out(heapq.heappop(self._deadlines)[2])
        if self._flight is not None and all(s.status is Status.FINISHED for s in self._flight.planned.sequences):
            self._land(None)  # it was on its way when the last of its sequences ended
        if not self._state.running and not self._state.waiting:
            return self._take_ready()
        if self._flight is None:
            self._flight = self._launch(now, flush)
            if self._flight is None:
                return self._take_ready()
        ahead = schedule_ahead(self._state, self._policy, now) if self._async_scheduling else None
        self._land(None if ahead is None else self._submit(ahead))
        return self._take_ready()

    def _take_ready(self) -> list[EngineOutput]:
        ready, self._ready = self._ready, []
        return ready

    def _launch(self, now: float, flush: bool) -> _Flight | None:
        """Decide on a step and start it; None if there is none."""
        drafted = self._draft() if self._speculation is not None else ()
        planned = schedule(self._state, self._policy, now, flush=flush)
        for sequence in drafted:
            sequence.draft = ()
        if planned.sequences:
            if drafted and self._draft_model is not None:
                planned = self._filled(planned, self._draft_model)
            if self.profile_next:
                self._measure(planned)
            flight = self._submit(planned)
            self._prepare_masks(planned)
            return flight
        if self._policy.batching == "inflight":
            raise RuntimeError("no sequence can be scheduled: the scheduler lost KV blocks")
        return None

    def _filled(self, planned: Schedule, draft_model: DraftModel) -> Schedule:
        """The schedule with the words of the draft model."""
        try:
            filled = draft_model.fill(planned)
        except BaseException:
            self._state.roll_back(planned)
            raise
        if draft_model.seconds is not None and self._speculation is not None:
            num_drafted = sum(1 for s in planned.batch.sequences if s.num_drafts)
            self._speculation.draft_took(num_drafted, draft_model.seconds)
        return filled

    def _measure(self, planned: Schedule) -> None:
        """Run a step once more than is needed, which changes nothing: it writes the same keys and values again."""
        self.profile_next = False
        profile = getattr(self._executor, "profile", None)  # not every backend has it
        if profile is not None:
            try:
                self.profile = profile(planned.batch)
            except BaseException:
                self._state.roll_back(planned)
                raise

    def _submit(self, planned: Schedule) -> _Flight:
        try:
            return _Flight(planned, self._executor.submit(planned.batch))
        except BaseException:
            self._state.roll_back(planned)
            raise

    def _land(self, following: _Flight | None) -> None:
        """Collect the step that runs, and keep what it brought for the caller. ``following`` runs from then on."""
        flight, self._flight = self._flight, None
        assert flight is not None
        try:
            output = self._executor.collect(flight.ticket)
        except BaseException:
            if following is not None:
                self._state.roll_back(following.planned)
            self._state.roll_back(flight.planned)
            raise
        self._flight = following
        now = self._clock()
        planned, batch = flight.planned, flight.planned.batch
        num_tokens = num_first = 0
        block_size = self._state.block_size
        for index, (sequence, scheduled, sampled) in enumerate(
            zip(planned.sequences, batch.sequences, output.tokens, strict=True)
        ):
            if sequence.status is Status.FINISHED:
                continue  # when this step was on its way
            failure = output.failures.get(index) if output.failures else None
            if scheduled.targets and failure is None:
                sequence.prompt_logprobs += output.targets[index]
            if not sampled and failure is None:
                continue
            if sequence.search is not None:
                self._take_beam(sequence.search, sequence, None if failure else sampled[0].logprobs, now, failure)
                continue
            if sampled and scheduled.num_drafts:
                sampled = self._verified(sequence, scheduled, sampled)
            result = EngineOutput(sequence.request.request_id, sequence, (), ())
            self._ready.append(result)
            is_first = not sequence.output_token_ids
            for token_id, logprobs in sampled:
                if sequence.grammar is not None and not self._follows(sequence, token_id):
                    break
                sequence.append(token_id, now)
                result.token_ids += (token_id,)
                result.logprobs += (logprobs,)
                if self._ends(sequence, token_id):
                    break
            if failure is not None:
                self._state.remove(sequence, "error", failure)
            num_tokens += len(result.token_ids)
            if is_first and result.token_ids:
                num_first += 1
                self._stats.prompt_tokens += len(sequence.request.prompt_token_ids)
                self._stats.cached_tokens += sequence.num_cached_tokens
                self._state.release_forks(sequence)
            if sequence.finish_reason is not None:
                result.finish_reason = sequence.finish_reason
                result.stop_reason = sequence.stop_reason
                result.metrics = sequence.metrics()
            elif scheduled.num_drafts or self._draft_model is not None:  # which may have said less than was scheduled
                self._settle(sequence, scheduled, now)
            elif following is not None and not len(sequence.token_ids) % block_size:
                following.planned.promised.extend(self._state.remember_last(sequence, now))
        for index, states in output.hidden.items():
            self._take_hidden(planned.sequences[index], batch.sequences[index], states)
        if following is not None:
            self._stats.steps_ahead += 1
            self._prepare_masks(following.planned)
        self._account(planned, output.stats, now, num_tokens, num_first)

    def _take_hidden(self, sequence: Sequence, scheduled: ScheduledSequence, states: npt.NDArray[np.float32]) -> None:
        """Hidden states of a prompt that is embedded; with those of its last token it is done."""
        if sequence.status is Status.FINISHED or sequence.pool is None:
            return
        sequence.pool.add(scheduled.num_computed_tokens, states)
        if scheduled.num_computed_tokens + len(scheduled.token_ids) < len(sequence.token_ids):
            return
        self._stats.prompt_tokens += len(sequence.token_ids)
        self._stats.cached_tokens += sequence.num_cached_tokens
        embedding = sequence.pool.result()
        if not np.isfinite(embedding).all():
            why = "the hidden states of the prompt are not finite"
            self._state.remove(sequence, "error", why)
            self._end_without_tokens(sequence.request_id, sequence, "error", why)
            return
        self._state.remove(sequence, "stop")
        metrics = sequence.metrics()
        self._ready.append(
            EngineOutput(sequence.request_id, sequence, (), (), "stop", metrics=metrics, embedding=embedding)
        )

    def _take_beam(
        self,
        search: BeamSearch,
        sequence: Sequence,
        following: Mapping[int, Logprob] | None,
        now: float,
        failure: str | None,
    ) -> None:
        """What a step brought to a beam. It goes on when all of its search have got as far."""
        if following is None:
            for request_id in self._searches.end(search, "error", failure):
                self._end_without_tokens(request_id, sequence, "error", failure)
        elif self._searches.take(search, sequence, following, now):
            self._hand_out(search)

    def _hand_out(self, search: BeamSearch) -> None:
        """The search is over: its best hypotheses are the answers."""
        root = search.root
        prompt_len = len(root.request.prompt_token_ids)
        self._stats.prompt_tokens += prompt_len
        self._stats.cached_tokens += root.num_cached_tokens
        ids = self._searches.end(search, "stop")
        for request_id, best in zip_longest(ids, search.ended[: len(ids)]):
            if best is None:
                why = "the search found fewer answers than were asked for"
                self._end_without_tokens(request_id, root, "error", why)
                continue
            metrics = replace(root.metrics(), token_times=best.token_times)
            tokens, ended_by = best.token_ids, best.finish_reason
            reason = self._stop_reason(root.request, tokens[-1]) if ended_by == "stop" else None
            self._stats.output_tokens += len(tokens)
            self._ready.append(EngineOutput(request_id, root, tokens, search.logprobs(best), ended_by, reason, metrics))

    def drain(self) -> None:
        """Wait for the step that runs: what follows may touch the executor. Its outputs come with the next ``step``."""
        if self._flight is not None:
            self._land(None)

    def _draft(self) -> list[Sequence]:
        """Give each sequence a draft, if all of them decode and none waits; those that have one."""
        control, state = self._speculation, self._state
        assert control is not None
        sequences = list(state.running.values())
        if state.waiting or any(len(s.token_ids) - s.num_computed_tokens > 1 or s.pool is not None for s in sequences):
            return []
        length = control.length(len(sequences))
        if not length:
            return []
        for sequence in sequences:
            if sequence.search is not None:
                continue
            if self._draft_model is not None:
                sequence.draft = (PENDING,) * length  # the draft model is asked when it is known who gets how many
                continue
            if sequence.proposer is None:
                sequence.proposer = NgramProposer()
            draft = sequence.proposer.propose(sequence.token_ids, length)
            if sequence.grammar is not None and draft:
                draft = draft[: sequence.grammar.allowed(draft)]
            sequence.draft = draft
        return sequences

    def _verified(
        self, sequence: Sequence, scheduled: ScheduledSequence, sampled: SequenceOf[SampledToken]
    ) -> SequenceOf[SampledToken]:
        """The sampled tokens up to the first that is not the draft's: what comes after it had a false history."""
        draft = scheduled.token_ids[1:]
        right = 0
        while right < len(draft) and sampled[right].token_id == draft[right]:
            right += 1
        assert self._speculation is not None
        self._speculation.judged(len(draft), right)
        return sampled[: right + 1]

    def _settle(self, sequence: Sequence, scheduled: ScheduledSequence, now: float) -> None:
        """Keep what was computed of true tokens, and let others find it."""
        computed = len(sequence.token_ids) - 1
        self._state.take_back(sequence, sequence.num_computed_tokens - computed)
        self._state.remember(sequence, scheduled.num_computed_tokens, computed, now)

    def _prepare_masks(self, planned: Schedule) -> None:
        """Let the masks of structured output be computed while the step runs."""
        if not self._num_grammars:
            return
        for sequence, scheduled in zip(planned.sequences, planned.batch.sequences, strict=True):
            if sequence.grammar is not None and scheduled.sample is not None and sequence.status is Status.RUNNING:
                sequence.grammar.prepare()

    def _follows(self, sequence: Sequence, token_id: int) -> bool:
        """Tell the grammar which token was chosen; False if the sequence had to be ended, as no token can be."""
        grammar = sequence.grammar
        assert grammar is not None
        if grammar.error is None and token_id not in sequence.request.stop_token_ids:
            grammar.accept(token_id)
        if grammar.error is None:
            return True
        self._state.remove(sequence, "error", f"structured output: {grammar.error}")
        return False

    def _time_out(self, sequence: Sequence) -> None:
        search = sequence.search
        if search is not None:
            if self._searches.get(search.answer_ids[0]) is search:
                for request_id in self._searches.end(search, "timeout"):
                    self._end_without_tokens(request_id, sequence, "timeout")
        elif sequence.status is not Status.FINISHED:
            self._state.remove(sequence, "timeout")
            self._end_without_tokens(sequence.request_id, sequence, "timeout")

    def _end_without_tokens(
        self, request_id: str, sequence: Sequence, reason: FinishReason, why: str | None = None
    ) -> None:
        self._ready.append(EngineOutput(request_id, sequence, (), (), reason, why, sequence.metrics()))

    def _ends(self, sequence: Sequence, token_id: int) -> bool:
        """Finish the sequence if its new token is the last one."""
        request = sequence.request
        if token_id in request.stop_token_ids and len(sequence.output_token_ids) >= request.params.min_tokens:
            self._state.remove(sequence, "stop", self._stop_reason(request, token_id))
        elif len(sequence.token_ids) >= request.max_total_tokens:
            self._state.remove(sequence, "length")
        else:
            return False
        return True

    def _stop_reason(self, request: Request, token_id: int) -> int | None:
        ended_by_eos = token_id in self._eos_token_ids and token_id not in request.params.stop_token_ids
        return None if ended_by_eos else token_id

    def _account(self, planned: Schedule, step: StepStats, now: float, num_output_tokens: int, num_first: int) -> None:
        """``num_first``: how many of the tokens were the first of their request."""
        state = self._state
        # A recomputed sequence counts as a prefill, and so does a prompt of one token.
        decodes = not num_first and planned.num_decodes == len(planned.sequences)
        record = StepRecord(
            time=now,
            seconds=step.seconds,
            num_prefills=len(planned.sequences) - planned.num_decodes,
            num_decodes=planned.num_decodes,
            prefill_tokens=planned.num_tokens - planned.decode_tokens,
            decode_tokens=planned.decode_tokens,
            output_tokens=num_output_tokens,
            cached_tokens=planned.num_cached_tokens,
            num_preempted=len(planned.preempted),
            num_running=len(state.running),
            num_waiting=len(state.waiting),
            num_used_blocks=state.blocks.num_blocks - state.blocks.num_free,
            num_blocks=state.blocks.num_blocks,
            flops=step.flops,
            bytes=step.bytes,
        )
        self._steps.append(record)
        self._stats.count(record, decodes=decodes)
        if decodes and self._speculation is not None:
            self._speculation.took(planned.batch.num_tokens, step.seconds)

    def save_prefix(
        self, path: Path, identity: str, token_ids: Iterable[int], salt: str = "", adapter: str | None = None
    ) -> int:
        """Write to a file what the prefix cache has of ``token_ids``; how many tokens that is.

        identity: of the model and of how it computes; ``load_prefix`` refuses other files. adapter: the name of the one
        that computed them.

        Raises:
            PrefixFileError: the cache has none of it, or the file cannot be written.
        """
        self.drain()
        tokens = list(token_ids)
        block_size = self._state.block_size
        computed_by = self._adapter_identity(adapter)
        keys = keys_of(tokens, salt, block_size, computed_by)
        found, _ = self._state.blocks.find(keys)
        if not found:
            raise PrefixFileError(
                f"nothing of the {len(tokens)} tokens is in the prefix cache",
                f"run a request that begins with them, at least {block_size}",
            )
        count = len(found) * block_size
        write_prefix(path, identity + computed_by, tokens[:count], self._executor.read_blocks(found))
        return count

    def _adapter_identity(self, name: str | None) -> str:
        adapter = self._adapters.get(name)
        return "" if adapter is None else adapter.identity

    def load_prefix(
        self, path: Path, identity: str, salt: str = "", retention: int = 100, adapter: str | None = None
    ) -> int:
        """Put what ``save_prefix`` wrote into the prefix cache; how many tokens of it are there now.

        Raises:
            PrefixFileError: the file is missing, damaged, of another model, or larger than the free part of the cache.
        """
        computed_by = self._adapter_identity(adapter)
        tokens, data = read_prefix(path, identity + computed_by)
        self.drain()
        blocks, block_size = self._state.blocks, self._state.block_size
        keys = keys_of(tokens, salt, block_size, computed_by)
        if blocks.cache is None:
            raise PrefixFileError(f"{path} is of no use without a prefix cache", "set enable_prefix_caching")
        known, _ = blocks.find(keys)
        policy, now = CachePolicy(salt, retention), self._clock()
        if len(keys) > blocks.num_free:
            raise PrefixFileError(
                f"{path} holds {len(tokens)} tokens, the KV cache has room for {blocks.num_free * block_size}",
                "raise kv_cache_memory",
            )
        blocks.take(known, policy, now)  # or they might be evicted for the rest
        new = blocks.allocate(len(keys) - len(known))
        try:
            self._executor.write_blocks(new, [part[len(known) :] for part in data])
            for block, key in zip(new, keys[len(known) :], strict=True):
                blocks.remember(block, key, policy, now)
        except ValueError as error:
            raise PrefixFileError(f"{path} does not fit this model ({error})", "save the prefix again") from None
        finally:
            blocks.free(reversed([*known, *new]))
        return len(keys) * block_size

    def stats(self) -> EngineStats:
        """A copy of the totals."""
        control = self._speculation
        return replace(
            self._stats,
            draft_tokens=0 if control is None else control.num_draft_tokens,
            accepted_tokens=0 if control is None else control.num_accepted_tokens,
            num_running=len(self._state.running),
            num_waiting=len(self._state.waiting),
            num_free_blocks=self._state.blocks.num_free,
            num_cached_blocks=self._state.blocks.num_cached,
            num_blocks=self._state.blocks.num_blocks,
        )

    def steps(self, most: int = _STEPS_KEPT) -> list[StepRecord]:
        """The latest steps, the last one last; not more than 1,024."""
        return list(islice(reversed(self._steps), most))[::-1]

    def kv_map(self, most: int) -> tuple[bytes, int]:
        """The KV pool as ``most`` cells or fewer, each of as many blocks as the second value says.

        A cell's byte is the most sequences that hold one of its blocks, 253 at most; 254: none, but the prefix cache
        finds one.
        """
        return self._state.blocks.picture(most)

    def check(self) -> None:
        """Verify the KV block books. Raises RuntimeError, for tests and for idle moments."""
        self._state.check()
        if not self.has_unfinished and self._state.blocks.num_free != self._state.blocks.num_blocks:
            raise RuntimeError("KV blocks are in use while no request is")
