"""Beam search finds what transformers' finds, in any company, with little memory, and cleans up after itself."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from pelton import LLM, AsyncLLM, SamplingParams
from pelton.engine.engine import LLMEngine
from pelton.engine.sampling import HostSampler
from pelton.errors import RequestError
from tests.helpers.fake_executor import FakeExecutor
from tests.helpers.fake_parts import FakeBuilt
from tests.helpers.tiny_models import tiny_checkpoint
from tests.test_same_tokens import GREEDY, PROMPTS, alone

PROMPT = [5, 9, 33, 40, 7, 61]


def found(output) -> list[tuple[list[int], str]]:
    return [(list(o.token_ids), o.finish_reason) for o in output.outputs]


@pytest.mark.parametrize("early_stopping", [False, True])
@pytest.mark.parametrize("length_penalty", [0.0, 1.0, 2.5])
@pytest.mark.parametrize(("width", "max_tokens"), [(2, 12), (4, 30), (5, 9)])
def test_it_finds_what_transformers_find(width, max_tokens, length_penalty, early_stopping):
    import torch

    path, model = tiny_checkpoint("llama")
    eos = [2, 11, 17, 60]  # several, or a random model would never end
    with torch.no_grad():
        expected = model.generate(
            torch.tensor([PROMPT]), num_beams=width, num_return_sequences=width, max_new_tokens=max_tokens,
            length_penalty=length_penalty, early_stopping=early_stopping, do_sample=False, eos_token_id=eos,
            pad_token_id=0, return_dict_in_generate=True, output_scores=True,
        )  # fmt: skip
    params = SamplingParams(
        n=width, use_beam_search=True, length_penalty=length_penalty, early_stopping=early_stopping,
        max_tokens=max_tokens, stop_token_ids=eos, logprobs=1, ignore_eos=True,
    )  # fmt: skip
    with LLM(str(path), dtype="f32", kv_cache_dtype="f32") as llm:
        (output,) = llm.generate({"prompt_token_ids": PROMPT}, params)
        assert llm.get_stats().num_free_blocks == llm.get_stats().num_blocks
    for answer, ids, score in zip(output.outputs, expected.sequences, expected.sequences_scores, strict=True):
        theirs = ids[len(PROMPT) :].tolist()
        ends = [i for i, token in enumerate(theirs) if token in eos]
        theirs = theirs[: ends[0] + 1] if ends else theirs  # padding
        assert list(answer.token_ids) == theirs
        assert answer.finish_reason == ("stop" if theirs[-1] in eos else "length")
        own = answer.cumulative_logprob / len(answer.token_ids) ** length_penalty
        assert own == pytest.approx(float(score), abs=1e-4)


BEAMS = SamplingParams(n=3, best_of=4, use_beam_search=True, max_tokens=40)


def test_in_company_and_with_little_memory():
    with LLM(max_model_len=512) as llm:
        expected = [found(output) for prompt in PROMPTS for output in llm.generate(prompt, BEAMS)]
        assert len({tuple(ids) for ids, _ in expected[0]}) == 3
        together = llm.generate([*PROMPTS, *PROMPTS], [BEAMS] * 5 + [GREEDY] * 5)
        assert [found(output) for output in together[:5]] == expected
        assert [list(output.outputs[0].token_ids) for output in together[5:]] == alone()
        # The blocks of a prompt are shared by all beams: those of 40 tokens are apart.
        assert max(step.num_used_blocks for step in llm.engine.steps()) < 5 * (7 + 4 * 5) + 5 * 9
    for options in ({"capacity_policy": "max_utilization"}, {"capacity_policy": "guaranteed_no_evict"},
                    {"max_num_seqs": 4, "num_speculative_tokens": 2}, {"batching": "static"}):  # fmt: skip
        # One search needs some 20 blocks: they get into each other's way.
        with LLM(max_model_len=160, kv_cache_memory=24 * 16 * 23_040, **options) as llm:
            together = llm.generate([*PROMPTS, *PROMPTS], [BEAMS] * 5 + [GREEDY] * 5)
            assert [found(output) for output in together[:5]] == expected
            assert [list(output.outputs[0].token_ids) for output in together[5:]] == alone()
            llm.engine.check()


def test_with_log_probabilities():
    params = replace(BEAMS, n=2, max_tokens=6, logprobs=1, prompt_logprobs=1)
    with LLM(max_model_len=512) as llm:
        output, again = llm.generate([PROMPTS[0], PROMPTS[0]], params)
        (expected,) = llm.generate(PROMPTS[0], replace(BEAMS, n=2, max_tokens=6))
        (scored,) = llm.generate(PROMPTS[0], SamplingParams(max_tokens=1, prompt_logprobs=1))
    assert found(output) == found(again) == found(expected)
    assert output.prompt_logprobs == scored.prompt_logprobs
    for answer in output.outputs:
        assert [next(iter(entry)) for entry in answer.logprobs] == list(answer.token_ids)
        assert all(len(entry) in (1, 2) for entry in answer.logprobs)
        total = sum(entry[token] for token, entry in zip(answer.token_ids, answer.logprobs, strict=True))
        assert answer.cumulative_logprob == pytest.approx(total)
    assert output.outputs[0].cumulative_logprob > output.outputs[1].cumulative_logprob


def test_from_an_event_loop():
    async def run():
        async with AsyncLLM(max_model_len=512) as llm:
            both = await asyncio.gather(llm.generate(PROMPTS[0], BEAMS), llm.generate(PROMPTS[1], BEAMS))
            with pytest.raises(RequestError, match="cannot be streamed"):
                async for _ in llm.stream(PROMPTS[0], BEAMS):
                    pass
            task = asyncio.create_task(llm.generate(PROMPTS[2], BEAMS))
            await asyncio.sleep(0.1)
            task.cancel()
            timed_out = await llm.generate(PROMPTS[3], BEAMS, timeout=0.05)
            again = await llm.generate(PROMPTS[0], BEAMS)
            return both, timed_out, again, llm.get_stats()

    both, timed_out, again, stats = asyncio.run(run())
    with LLM(max_model_len=512) as llm:
        expected = [found(llm.generate(prompt, BEAMS)[0]) for prompt in PROMPTS[:2]]
    assert [found(output) for output in both] == expected
    assert found(again) == expected[0]
    assert [o.finish_reason for o in timed_out.outputs] == ["timeout"] * 3
    assert stats.num_running == stats.num_waiting == 0


def engine_of(num_blocks: int = 16, **options) -> LLMEngine:
    executor = FakeExecutor(num_blocks=num_blocks, vocab_size=50, sampler=HostSampler())
    return LLMEngine(
        executor, **({"max_num_seqs": 8, "max_num_batched_tokens": 32} | options), eos_token_ids=frozenset({3}),
        vocab_size=50,
    )  # fmt: skip


def finish(engine: LLMEngine) -> dict[str, list[int]]:
    got = {}
    for _ in range(3000):
        if not engine.has_unfinished:
            break
        for output in engine.step():
            assert output.request_id not in got
            got[output.request_id] = list(output.token_ids)
        engine.check()
    engine.drain()
    assert not engine.has_unfinished
    stats = engine.stats()
    assert stats.num_free_blocks == stats.num_blocks
    return got


@pytest.mark.parametrize("capacity_policy", ["max_utilization", "guaranteed_no_evict"])
def test_searches_that_find_no_room_for_their_beams_take_turns(capacity_policy):
    params = SamplingParams(use_beam_search=True, n=4, max_tokens=10)
    prompts = {str(i): [i + 4, 8, 9, 10, 11, i + 20] for i in range(6)}
    alone = {}
    for name, prompt in prompts.items():
        engine = engine_of()
        assert engine.add_request(name, prompt, params) == tuple(f"{name}.{i}" for i in range(4))
        alone |= finish(engine)
    engine = engine_of(num_blocks=16, capacity_policy=capacity_policy)
    for name, prompt in prompts.items():
        engine.add_request(name, prompt, params)
    assert finish(engine) == alone
    assert len(alone) == 24
    assert engine.stats().preemptions > 0


def test_a_search_ends_with_the_first_answer_that_is_aborted_or_fails():
    engine = engine_of()
    params = SamplingParams(use_beam_search=True, n=2, max_tokens=10)
    engine.add_request("a", [5, 6, 7], params)
    engine.step()
    engine.step()
    assert engine.abort("a.1") is not None
    assert not engine.has_unfinished and not engine.is_unfinished("a.0")
    engine.check()
    engine.add_request("a", [5, 6, 7], params)  # the id is free again
    assert set(finish(engine)) == {"a.0", "a.1"}


def test_every_answer_ends_even_if_there_are_not_as_many():
    executor = FakeExecutor(vocab_size=2, sampler=HostSampler())
    engine = LLMEngine(executor, max_num_seqs=4, max_num_batched_tokens=8, eos_token_ids=frozenset(), vocab_size=2)
    ids = engine.add_request("a", [1, 0], SamplingParams(use_beam_search=True, n=4, max_tokens=1))
    outputs = engine.step()
    assert tuple(output.request_id for output in outputs) == ids
    assert [output.finish_reason for output in outputs] == ["length", "length", "error", "error"]
    assert not engine.has_unfinished


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n": 11}, "best_of of a beam search is 11; choose at most 10"),
        ({"stop": "x"}, "stop has no meaning in a beam search"),
        ({"presence_penalty": 1.0}, "presence_penalty has no meaning"),
        ({"structured_outputs": {"regex": "a"}}, "structured_outputs has no meaning"),
    ],
)
def test_what_cannot_be_is_refused(options, message):
    with pytest.raises(RequestError, match=message):
        SamplingParams(use_beam_search=True, **options)


def test_searches_that_can_never_run_are_refused():
    llm = LLM.from_parts(FakeBuilt(num_blocks=20, max_model_len=512))
    with pytest.raises(RequestError, match="a search with 9 beams, at most 8 sequences run"):
        engine_of().add_request("a", [1, 2], SamplingParams(use_beam_search=True, n=9, max_tokens=2))
    with pytest.raises(RequestError, match=r"4 beams of .* tokens need .* tokens of KV cache"):
        llm.generate("abcdefgh", SamplingParams(use_beam_search=True, n=4, max_tokens=60))
