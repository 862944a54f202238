"""Drafts: found where the text repeats itself, kept where they are right, given up where they cost."""

import pytest

from pelton.backends.base import SampledToken, StepStats
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


class Opinions:
    """A draft model's sampler that is right but for every ``wrong``-th token."""

    def __init__(self, wrong: int = 10**9) -> None:
        self.wrong = wrong
        self.count = 0

    def __call__(self, logits, specs, drafts=None):
        tokens = []
        for spec in specs:
            self.count += 1
            token = greedy_continuation([*spec.prompt_token_ids, *spec.output_token_ids], VOCAB, 1)[0]
            tokens.append(SampledToken((token + (self.count % self.wrong == 0)) % VOCAB))
        return tokens


VOCAB = 50


def with_draft_model(wrong: int = 10**9, vocab: int = VOCAB, **draft):
    pool = {"num_blocks": 200, "max_model_len": 500}
    executor = FakeExecutor(vocab_size=VOCAB, stats=StepStats(seconds=1.0), **pool)
    helper = FakeExecutor(**(pool | {"vocab_size": vocab, "sampler": Opinions(wrong), "revises": True} | draft))
    engine = LLMEngine(
        executor, max_num_seqs=8, max_num_batched_tokens=64, num_speculative_tokens=3, draft_executor=helper,
        draft_vocab_size=vocab, eos_token_ids=frozenset(), vocab_size=VOCAB,
    )  # fmt: skip
    return engine, executor, helper


def run(engine, prompts, max_tokens=24, **params):
    for index, prompt in enumerate(prompts):
        engine.add_request(str(index), prompt, SamplingParams(temperature=0, max_tokens=max_tokens, **params))
    got = [[] for _ in prompts]
    while engine.has_unfinished:
        for output in engine.step():
            got[int(output.request_id)] += output.token_ids
        engine.check()
    return got


@pytest.mark.parametrize("wrong", [10**9, 5, 2, 1])
def test_a_draft_model_changes_nothing_but_the_number_of_steps(wrong):
    prompts = [[1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 9], [7]]
    engine, _, helper = with_draft_model(wrong)
    assert run(engine, prompts) == [greedy_continuation(p, VOCAB, 24) for p in prompts]
    stats = engine.stats()
    assert stats.draft_tokens > 0
    if wrong == 1:
        assert stats.accepted_tokens == 0
    if wrong > 100:
        assert stats.accepted_tokens == stats.draft_tokens
        assert stats.steps < 16  # 24 tokens at up to 4 a step, when lengths have been tried
    # What both prompts begin with is read once.
    first = helper.batches[0].sequences
    assert [s.num_computed_tokens for s in first] == [0, 4, 0]


def test_a_draft_model_reads_a_long_prompt_in_pieces_and_guesses_afterwards():
    from pelton.engine.draft_model import CATCH_UP

    prompt = [i % 40 for i in range(CATCH_UP + 100)]
    engine, _, helper = with_draft_model()
    assert run(engine, [prompt], 12) == [greedy_continuation(prompt, VOCAB, 12)]
    sizes = [batch.num_tokens for batch in helper.batches]
    assert sizes[0] == CATCH_UP and 100 < sizes[1] < 110
    assert engine.stats().accepted_tokens > 0


def test_a_draft_model_with_a_shorter_context_stops_guessing_there():
    engine, _, helper = with_draft_model(max_model_len=12)
    assert run(engine, [[1, 2, 3, 4]]) == [greedy_continuation([1, 2, 3, 4], VOCAB, 24)]
    assert max(s.num_computed_tokens + len(s.token_ids) for b in helper.batches for s in b.sequences) == 12


def test_a_draft_model_with_fewer_tokens_is_asked_about_those_it_knows():
    engine, _, helper = with_draft_model(vocab=20)
    helper.sampler = lambda logits, specs, drafts=None: [SampledToken(5) for _ in specs]
    prompt = [45, 3, 49]
    assert run(engine, [prompt], allowed_token_ids=[4, 30], logit_bias={40: 1.0}, bad_words=[[30, 4]]) == [
        greedy_continuation(prompt, VOCAB, 24)
    ]
    for batch in helper.batches:
        for sequence in batch.sequences:
            assert max(sequence.token_ids) < 20
            spec = sequence.sample
            assert max([*spec.prompt_token_ids, *spec.output_token_ids]) < 20
            assert (spec.params.allowed_token_ids, spec.params.logit_bias, spec.params.bad_words) == ((4,), None, ())


def test_a_draft_model_that_takes_longer_than_it_saves_is_given_up():
    control, chosen = SpeculationControl(4), []
    for _ in range(300):
        length = control.length(2)
        chosen.append(length)
        control.took(2 * (1 + length), 1.0)
        if length:
            control.draft_took(2, 2.0)
            control.judged(length, length)
            control.judged(length, length)
    assert chosen[100:].count(0) > 180
