"""The same request gives the same greedy tokens, however the engine gets there: real weights, the CPU backend."""

from __future__ import annotations

import asyncio
import functools
import shutil
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from pelton import LLM, AsyncLLM, PeltonError, SamplingParams
from tests.helpers.tiny_models import tiny_checkpoint

SYSTEM = (
    "You are a careful assistant. Answer in short sentences, say what you do not know, and never invent a source. "
    "If somebody asks for a list, give at most three items. Dates are written as year, month, day. "
)
PROMPTS = [
    SYSTEM + question
    for question in (
        "Why is the sky blue?",
        "Why is the sea salty?",
        "Name three rivers of France.",
        "What is a transistor, and who made the first one?",
        "Write a haiku about rain.",
    )
]
GREEDY = SamplingParams(temperature=0, max_tokens=48, ignore_eos=True)


def answers(prompts: list[str] = PROMPTS, params: SamplingParams = GREEDY, **options: Any) -> list[list[int]]:
    with LLM(max_model_len=512, **options) as llm:
        return [list(o.token_ids) for output in llm.generate(prompts, params) for o in output.outputs]


@functools.cache
def alone() -> list[list[int]]:
    return [answers([prompt], enable_prefix_caching=False)[0] for prompt in PROMPTS]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"enable_prefix_caching": False},
        {"async_scheduling": True},
        {"max_num_batched_tokens": 7, "max_num_seqs": 5},
        {"max_num_seqs": 2},
        {"batching": "static"},
        {"batching": "dynamic", "max_num_seqs": 3},
        {"threads": 1},
        {"num_speculative_tokens": 4},
        {"num_speculative_tokens": 3, "max_num_seqs": 2},
    ],
    ids=str,
)
def test_in_company(options):
    assert answers(**options) == alone()


def test_after_preemptions():
    # 23 blocks of 16 tokens; all five would need 35 at their ends.
    with LLM(max_model_len=128, kv_cache_memory=23 * 16 * 23_040, enable_prefix_caching=False) as llm:
        got = [list(output.outputs[0].token_ids) for output in llm.generate(PROMPTS, GREEDY)]
        assert llm.get_stats().preemptions > 0
    assert got == alone()


def test_with_what_earlier_requests_left_in_the_cache():
    with LLM(max_model_len=512) as llm:
        for _ in range(2):
            before = llm.get_stats()
            got = [list(llm.generate(prompt, GREEDY)[0].outputs[0].token_ids) for prompt in PROMPTS]
            assert got == alone()
        stats = llm.get_stats()
        prompt_tokens = stats.prompt_tokens - before.prompt_tokens
        assert stats.cached_tokens - before.cached_tokens > 0.7 * prompt_tokens
        llm.generate({"prompt": PROMPTS[0], "cache_salt": "another"}, GREEDY)
        assert llm.get_stats().cached_tokens == stats.cached_tokens


def test_with_a_prefix_from_a_file(tmp_path):
    file = tmp_path / "system.prefix"
    with LLM(max_model_len=512) as llm:
        saved = llm.save_prefix(SYSTEM, file)
    assert saved > 40
    for _ in range(2):  # a file is only read
        with LLM(max_model_len=512) as llm:
            assert llm.load_prefix(file) == saved
            got = [list(output.outputs[0].token_ids) for output in llm.generate(PROMPTS, GREEDY)]
            assert llm.get_stats().cached_tokens >= saved * len(PROMPTS)
        assert got == alone()
    with LLM(max_model_len=512, kv_cache_dtype="int8") as llm, pytest.raises(PeltonError, match="another model"):
        llm.load_prefix(file)


@pytest.mark.parametrize("caching", [True, False])
def test_as_n_answers_to_one_prompt(caching):
    three = SamplingParams(temperature=0, max_tokens=48, ignore_eos=True, n=3)
    with LLM(max_model_len=512, enable_prefix_caching=caching) as llm:
        (output,) = llm.generate(PROMPTS[1], three)
        stats = llm.get_stats()
    assert [list(o.token_ids) for o in output.outputs] == [alone()[1]] * 3
    assert stats.prompt_tokens - stats.cached_tokens == len(output.prompt_token_ids) + 2  # the last token of each


def test_best_of_keeps_the_likeliest():
    sampled = {"temperature": 1.0, "seed": 3, "max_tokens": 12, "ignore_eos": True}
    with LLM(max_model_len=512) as llm:
        (four,) = llm.generate(PROMPTS[0], SamplingParams(n=4, logprobs=0, **sampled))
        (best,) = llm.generate(PROMPTS[0], SamplingParams(n=2, best_of=4, **sampled))
        with pytest.raises(PeltonError, match="best_of cannot be streamed"):
            next(llm.stream(PROMPTS[0], SamplingParams(n=2, best_of=4)))
    ranked = sorted(four.outputs, key=lambda o: -o.cumulative_logprob)
    assert [o.token_ids for o in best.outputs] == [o.token_ids for o in ranked[:2]]
    assert [(o.index, o.logprobs, o.cumulative_logprob) for o in best.outputs] == [(0, None, None), (1, None, None)]
    assert ranked[0].cumulative_logprob > ranked[-1].cumulative_logprob


def test_in_an_event_loop_with_clients_that_come_and_go():
    async def main() -> list[list[int]]:
        async with AsyncLLM(max_model_len=512) as llm:

            async def ask(prompt: str, delay: float) -> list[int]:
                await asyncio.sleep(delay)
                return list((await llm.generate(prompt, GREEDY)).outputs[0].token_ids)

            async def leave(prompt: str) -> None:
                async for _ in llm.stream(prompt, GREEDY):
                    break

            tasks = [asyncio.create_task(ask(prompt, 0.02 * i)) for i, prompt in enumerate(PROMPTS)]
            await asyncio.gather(*(leave(prompt) for prompt in PROMPTS))
            return await asyncio.gather(*tasks)

    assert asyncio.run(main()) == alone()


def test_forks_copy_what_they_share_on_every_backend():
    folder, _ = tiny_checkpoint("llama")
    prompt = list(range(3, 24))
    params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
    for device in ("reference", "cpu"):
        with LLM(str(folder), device=device, enable_prefix_caching=False, max_num_seqs=4) as llm:
            copies: list[Any] = []
            submit = llm._parts.executor.submit
            llm._parts.executor.submit = lambda batch, submit=submit, copies=copies: (
                copies.extend(batch.copies) or submit(batch)
            )
            (one,) = llm.generate([prompt], params)
            (output,) = llm.generate([prompt], SamplingParams(temperature=0, max_tokens=6, ignore_eos=True, n=3))
        assert [list(o.token_ids) for o in output.outputs] == [list(one.outputs[0].token_ids)] * 3
        assert len(copies) == 2


def test_a_number_that_f16_cannot_hold_fails_the_request_and_gives_no_other_answer(tmp_path):
    folder, _ = tiny_checkpoint("llama")
    weights = load_file(folder / "model.safetensors")
    for name in weights:  # values in the cache of 10^5 and more, the same output
        weights[name] *= np.float32(1e7 if "v_proj" in name else 1e-7 if "o_proj" in name else 1)
    shutil.copy(folder / "config.json", tmp_path)
    save_file(weights, tmp_path / "model.safetensors")
    params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
    for device in ("reference", "cpu"):
        options: dict[str, Any] = {"device": device, "max_num_seqs": 1, "max_model_len": 64}
        with LLM(str(tmp_path), kv_cache_dtype="bf16", **options) as llm:
            assert len(llm.generate([list(range(3, 40))], params)[0].outputs[0].token_ids) == 6
        with LLM(str(tmp_path), kv_cache_dtype="f16", **options) as llm:
            answer = llm.generate([list(range(3, 40))], params)[0].outputs[0]
        assert answer.finish_reason == "error" and "nan" in answer.stop_reason


@pytest.mark.parametrize("kv_cache_dtype", ["auto", "f16", "int8", "fp8"])
def test_a_prefix_from_a_file_on_every_backend(tmp_path, kv_cache_dtype):
    folder, _ = tiny_checkpoint("llama")
    prompt = list(range(3, 80))
    params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
    for device in ("reference", "cpu"):
        file = tmp_path / device
        options: dict[str, Any] = {"device": device, "max_num_seqs": 4, "kv_cache_dtype": kv_cache_dtype}
        with LLM(str(folder), **options) as llm:
            (one,) = llm.generate([prompt], params)
            assert llm.save_prefix(prompt, file) == 64
        with LLM(str(folder), **options) as llm:
            assert llm.load_prefix(file) == 64
            (again,) = llm.generate([prompt], params)
            assert llm.get_stats().cached_tokens == 64
        assert list(again.outputs[0].token_ids) == list(one.outputs[0].token_ids)


@pytest.mark.parametrize("ahead", [False, True])
def test_beside_a_request_whose_logits_are_broken(ahead):
    def breaks(prompt: list[int], output: list[int], logits: Any) -> Any:
        return logits * np.float32("nan") if len(output) == 5 else logits

    broken = SamplingParams(temperature=0, max_tokens=48, ignore_eos=True, logits_processors=[breaks])
    with LLM(max_model_len=512, async_scheduling=ahead) as llm:
        outputs = llm.generate(PROMPTS[:3], [GREEDY, broken, GREEDY])
        stats = llm.get_stats()
        assert (stats.steps_ahead > 0.8 * stats.steps) == ahead
        assert llm.generate(PROMPTS[1], GREEDY)[0].outputs[0].token_ids == alone()[1]
    assert [o.outputs[0].finish_reason for o in outputs] == ["length", "error", "length"]
    assert "maximum nan" in outputs[1].outputs[0].stop_reason
    assert [list(o.outputs[0].token_ids) for o in outputs] == [alone()[0], alone()[1][:5], alone()[2]]


def test_drained_in_the_middle(tmp_path):
    """What touches the cache between two steps waits for the one that runs, and loses nothing of it."""
    with LLM(max_model_len=512) as llm:
        stream = llm.stream(PROMPTS[0], GREEDY)
        got = [token for _ in range(5) for token in next(stream).outputs[0].token_ids]
        assert llm.save_prefix(PROMPTS[1], tmp_path / "prefix") > 0
        assert llm.load_prefix(tmp_path / "prefix") > 0
        got += [token for piece in stream for token in piece.outputs[0].token_ids]
    assert got == alone()[0]


@pytest.mark.parametrize("params", [GREEDY, replace(GREEDY, temperature=0.8, seed=3, repetition_penalty=1.1)])
@pytest.mark.parametrize("options", [{}, {"max_num_seqs": 2}, {"max_num_batched_tokens": 64}], ids=str)
def test_with_drafts_of_the_model_itself(params, options):
    """The draft model has the same numbers, hence the same opinion, whatever the random number."""
    expected = answers(params=params)
    with LLM(max_model_len=512, speculative_model="", num_speculative_tokens=3, **options) as llm:
        got = [list(o.token_ids) for output in llm.generate(PROMPTS, params) for o in output.outputs]
        stats = llm.get_stats()
    assert got == expected
    assert stats.accepted_tokens == stats.draft_tokens > 0


@pytest.mark.parametrize("draft", ["qwen2", "llama"])
def test_with_drafts_of_another_model(draft):
    path, _ = tiny_checkpoint("llama")
    prompts = [{"prompt_token_ids": [5, 9, 3 + i, 40, 7]} for i in range(4)]
    params = SamplingParams(temperature=0.7, seed=1, max_tokens=40, ignore_eos=True)
    with LLM(str(path)) as llm:
        expected = [output.outputs[0].token_ids for output in llm.generate(prompts, params)]
    quantization = None if draft == "qwen2" else "int8"
    other, _ = tiny_checkpoint(draft)
    with LLM(str(path), speculative_model=str(other), speculative_quantization=quantization) as llm:
        got = [output.outputs[0].token_ids for output in llm.generate(prompts, params)]
        stats = llm.get_stats()
    assert got == expected
    assert 0 < stats.draft_tokens > stats.accepted_tokens
    if draft == "llama":  # rounded, it still agrees more often than not
        assert stats.accepted_tokens > 0.5 * stats.draft_tokens


def test_a_draft_model_of_another_tongue_is_refused():
    path, _ = tiny_checkpoint("llama")
    with pytest.raises(
        PeltonError, match="another tokenizer than the model; choose a smaller model of the same family"
    ):
        LLM(max_model_len=512, speculative_model=str(path))
