"""The engine under everything at once: arrivals, cancellations, forks, adapters, priorities, deadlines, failures, no
memory.

A vocabulary of 2 and pools of a few blocks, so that every boundary is crossed and prompts have common beginnings. The
executor verifies every position that is read; the answers are compared with those of each request alone.
"""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pelton.config import SamplingParams
from pelton.engine.engine import LLMEngine
from pelton.engine.prefix_cache import CachePolicy
from pelton.errors import RequestError
from tests.helpers.fake_executor import ROOT, FakeExecutor, adapted_root, greedy_continuation

LONGEST = 16  # tokens of a request


class BrokenError(Exception):
    pass


class Trial:
    """An engine, and what has been asked of it. ``draw(n)`` is a number below n."""

    def __init__(self, draw) -> None:
        self.draw = draw
        block_size = (4, 5)[draw(2)]
        num_blocks = -(-LONGEST // block_size) + draw(8)
        self.executor = FakeExecutor(num_blocks=num_blocks, block_size=block_size, vocab_size=2)
        self.executor.max_num_seqs = 1 + draw(4)
        self.executor.max_num_batched_tokens = 1 + draw(12)
        self.now = 0.0
        self.engine = LLMEngine(
            self.executor,
            max_num_seqs=self.executor.max_num_seqs,
            max_num_batched_tokens=self.executor.max_num_batched_tokens,
            capacity_policy=("max_utilization", "guaranteed_no_evict")[draw(2)],
            batching=("inflight", "inflight", "dynamic", "static")[draw(4)],
            batching_delay=(None, 3.0)[draw(2)],
            enable_prefix_caching=draw(4) > 0,
            num_speculative_tokens=draw(4),
            max_loras=2,
            eos_token_ids=frozenset(),
            vocab_size=2,
            clock=lambda: self.now,
        )
        self.executor.max_num_logits = self.engine._policy.max_num_logits
        self.asked: dict[str, tuple[list[int], int, object, str | None]] = {}
        self.adapters: dict[str, object] = {}  # name -> weights
        self.removals = 0
        self.got: dict[str, list[int]] = {}
        self.ended: dict[str, str] = {}

    def act(self) -> None:
        action = self.draw(12)
        if action < 4:
            self.add()
        elif action == 4 and self.asked:
            name = str(self.draw(len(self.asked)))
            if self.engine.abort(name) is not None:
                assert name not in self.ended
                self.ended[name] = "abort"
        elif action == 5 and self.draw(2):
            self.executor.fail_with = BrokenError()
        elif action == 5:
            self.exchange("xy"[self.draw(2)])
        else:
            self.step()
        self.engine.check()

    def exchange(self, name: str) -> None:
        """Remove an adapter, or add one of two under that name."""
        if name not in self.adapters:
            weights = {"version": self.draw(2)}
            self.engine.add_adapter(name, str(weights), weights)
            self.adapters[name] = weights
            return
        used = any(self.asked[n][3] == name for n in self.asked.keys() - self.ended.keys())
        try:
            self.engine.remove_adapter(name)
        except RequestError:
            assert used
        else:
            assert not used
            del self.adapters[name]
            self.removals += 1

    def add(self) -> None:
        draw, name = self.draw, str(len(self.asked))
        prompt = [0, 1, 1, 0, 1, 0, 0, 1, 1][: 1 + draw(9)] + [draw(2) for _ in range(draw(3))]
        parent = None
        if draw(3) == 0 and self.asked:
            parent = str(draw(len(self.asked)))
            prompt = self.asked[parent][0]
        adapter = (None, None, "x", "y")[draw(4)]
        adapter = adapter if adapter in self.adapters else None
        if parent is not None and self.asked[parent][3] != adapter:
            parent = None
        max_tokens = 1 + draw(LONGEST - len(prompt))
        self.engine.add_request(
            name,
            prompt,
            SamplingParams(temperature=0, max_tokens=max_tokens),
            priority=draw(4) - 1,
            deadline=self.now + draw(40) if draw(6) == 0 else None,
            cache=CachePolicy(
                salt="ab"[draw(2)],
                retention=10 * draw(3),
                ttl=(None, None, 5.0)[draw(3)],
                read=draw(8) > 0,
                store=draw(8) > 0,
            ),
            parent_id=parent,
            adapter=adapter,
        )
        self.asked[name] = (prompt, max_tokens, self.adapters.get(adapter), adapter)
        self.got[name] = []

    def step(self, flush: bool = False) -> None:
        try:
            outputs = self.engine.step(flush=flush)
        except BrokenError:
            return
        finally:
            self.now += (0.0, 0.5, 1.0, 30.0)[self.draw(4)]
        for output in outputs:
            assert output.request_id not in self.ended
            self.got[output.request_id] += output.token_ids
            if output.finish_reason is not None:
                self.ended[output.request_id] = output.finish_reason

    def finish(self) -> None:
        for _ in range(5000):
            if not self.engine.has_unfinished:
                break
            self.step(flush=True)
        assert self.ended.keys() == self.asked.keys(), "a request does not end"
        self.engine.check()
        stats = self.engine.stats()
        assert stats.num_free_blocks == stats.num_blocks
        for name, (prompt, max_tokens, weights, _) in self.asked.items():
            root = ROOT if weights is None else adapted_root(weights)
            expected = greedy_continuation(prompt, 2, max_tokens, root)
            if self.ended[name] == "length":
                assert self.got[name] == expected
            else:
                assert self.got[name] == expected[: len(self.got[name])]
                assert self.ended[name] in ("abort", "timeout")


@settings(deadline=None, max_examples=150)
@given(st.data())
def test_any_course_of_events(data):
    trial = Trial(lambda n: data.draw(st.integers(0, n - 1)))
    for _ in range(data.draw(st.integers(0, 30))):
        trial.act()
    trial.draw = random.Random(0).randrange
    trial.finish()


@pytest.mark.parametrize("part", range(4))
def test_two_hundred_thousand_operations(part):
    operations, preemptions, hits, copies, guesses, removals = 0, 0, 0, 0, 0, 0
    seed = part
    while operations < 50_000:
        trial = Trial(random.Random(seed).randrange)
        for _ in range(250):
            trial.act()
        operations += 250
        trial.finish()
        seed += 4
        stats = trial.engine.stats()
        preemptions += stats.preemptions
        hits += stats.cached_tokens
        guesses += min(stats.accepted_tokens, stats.draft_tokens - stats.accepted_tokens)
        removals += trial.removals
        copies += sum(len(batch.copies) for batch in trial.executor.batches)
    assert min(preemptions, hits, copies, guesses, removals) > 100  # or this would be no test of them


def test_low_priorities_are_not_starved():
    now = 0.0
    executor = FakeExecutor(vocab_size=2)
    engine = LLMEngine(
        executor, max_num_seqs=1, max_num_batched_tokens=16, eos_token_ids=frozenset(), vocab_size=2, clock=lambda: now
    )
    params = SamplingParams(temperature=0, max_tokens=2)
    engine.add_request("low", [1], params, priority=1)
    for number in range(200):
        engine.add_request(str(number), [1], params)  # more than can be served
        if any(output.request_id == "low" and output.finish_reason for output in engine.step()):
            break
        now += 1.0
    assert 30 < now < 130
