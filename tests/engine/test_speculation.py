"""Drafts: found where the text repeats itself, kept where they are right, given up where they cost."""

import pytest

from pelton.backends.base import StepStats
from pelton.config import SamplingParams
from pelton.engine.engine import LLMEngine
from pelton.engine.sampling import HostSampler
from pelton.engine.speculation import NgramProposer, SpeculationControl
from tests.helpers.fake_executor import FakeExecutor, greedy_continuation


def test_what_followed_the_latest_tokens_before_is_proposed():
    propose = NgramProposer().propose
    assert propose([1, 2, 3, 4, 5, 9, 1, 2], 3) == (3, 4, 5)
    assert NgramProposer().propose([1, 2, 3, 4, 5, 9, 1], 3) == ()  # one token is no context
    assert NgramProposer().propose([1, 2, 3, 1, 2, 4, 1, 2], 2) == (4, 1)  # the latest time
    assert NgramProposer().propose([7, 1, 2, 3, 8, 1, 2, 4, 7, 1, 2], 1) == (3,)  # the longest context
    assert NgramProposer().propose([1, 1, 1], 5) == (1,)
    assert NgramProposer().propose([], 5) == ()


def test_a_proposer_that_follows_a_sequence_proposes_what_a_new_one_would():
    followed, tokens = NgramProposer(), []
    for token in [3, 1, 2, 3, 1, 2, 2, 3, 1, 2, 2, 3, 3, 1, 2, 2, 1, 3, 1, 2]:
        tokens.append(token)
        assert followed.propose(tokens, 4) == NgramProposer().propose(tokens, 4)


def decide(seconds, acceptance: float, num_sequences: int, steps: int = 400) -> list[int]:
    """Lengths that a control chose for steps that take ``seconds(tokens)``, every draft token being right so often."""
    control, chosen, luck = SpeculationControl(4), [], 0.0
    for _ in range(steps):
        length = control.length(num_sequences)
        chosen.append(length)
        control.took(num_sequences * (1 + length), seconds(num_sequences * (1 + length)))
        for _ in range(num_sequences if length else 0):
            right = 0
            while right < length:
                luck += acceptance
                if luck < 1:
                    break
                luck -= 1
                right += 1
            control.judged(length, right)
    return chosen[steps // 2 :]


def test_drafts_are_long_where_tokens_are_free_and_guesses_good():
    assert min(decide(lambda n: 1.0 + 0.01 * n, 0.9, 1)) == 4


def test_drafts_are_given_up_where_every_token_costs():
    chosen = decide(lambda n: 0.1 + n, 0.5, 32)
    assert chosen.count(0) > 0.9 * len(chosen)


def test_drafts_are_given_up_where_guesses_are_bad_but_tried_again():
    chosen = decide(lambda n: 1.0 + 0.1 * n, 0.02, 1)
    assert chosen.count(0) > 0.9 * len(chosen)
    assert any(chosen)


def engine_of(executor: FakeExecutor, most: int, **options) -> LLMEngine:
    return LLMEngine(
        executor, max_num_seqs=8, max_num_batched_tokens=64, num_speculative_tokens=most, eos_token_ids=frozenset(),
        vocab_size=executor.vocab_size, **options,
    )  # fmt: skip


def answers(engine: LLMEngine, asked: list[tuple[list[int], SamplingParams]]) -> list[list[int]]:
    tokens: list[list[int]] = [[] for _ in asked]
    for i, (prompt, params) in enumerate(asked):
        engine.add_request(str(i), prompt, params)
    while engine.has_unfinished:
        for output in engine.step():
            tokens[int(output.request_id)] += output.token_ids
            assert len(output.token_ids) == len(output.logprobs)
        engine.check()
    return tokens


def test_greedy_tokens_are_those_without_speculation_in_fewer_steps():
    prompts = [[0, 1, 1, 0] * 3, [1, 0] * 4]
    asked = [(prompt, SamplingParams(temperature=0, max_tokens=60)) for prompt in prompts]
    executor = FakeExecutor(vocab_size=2, num_blocks=64, stats=StepStats(seconds=1.0))
    engine = engine_of(executor, 4)
    assert answers(engine, asked) == [greedy_continuation(prompt, 2, 60) for prompt in prompts]
    stats = engine.stats()
    assert stats.steps < 55 and 0 < stats.accepted_tokens < stats.draft_tokens
    assert stats.output_tokens == 120


@pytest.mark.parametrize("seed", range(5))
def test_random_tokens_are_those_without_speculation(seed):
    params = SamplingParams(
        temperature=1.3, top_p=0.9, frequency_penalty=0.3, min_tokens=5, max_tokens=40, seed=seed, logprobs=1
    )
    asked = [([0, 1, 1, 0, 1], params), ([1] * 6, params)]
    results = [
        answers(engine_of(FakeExecutor(vocab_size=3, sampler=HostSampler(), stats=StepStats(seconds=1.0)), most), asked)
        for most in (0, 1, 4)
    ]
    assert results[0] == results[1] == results[2]


def test_an_answer_ends_where_it_would_without_speculation():
    prompt = [0, 1] * 5
    expected = greedy_continuation(prompt, 2, 30)
    for length in range(1, 31):
        executor = FakeExecutor(vocab_size=2, num_blocks=64, max_model_len=40, stats=StepStats(seconds=1.0))
        engine = engine_of(executor, 4)
        assert answers(engine, [(prompt, SamplingParams(temperature=0, max_tokens=length))]) == [expected[:length]]
    executor = FakeExecutor(vocab_size=2, num_blocks=64, stats=StepStats(seconds=1.0))
    stop = SamplingParams(temperature=0, max_tokens=30, stop_token_ids=[0], min_tokens=4)
    (tokens,) = answers(engine_of(executor, 4), [(prompt, stop)])
    first = next(i for i in range(3, 30) if expected[i] == 0)
    assert tokens == expected[: first + 1]
