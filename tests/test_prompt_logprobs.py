"""Log-probabilities of the prompt: the right ones, however the engine gets there."""

from __future__ import annotations

import numpy as np
import pytest

from pelton import LLM, SamplingParams
from pelton.errors import RequestError
from tests.helpers.tiny_models import tiny_checkpoint
from tests.test_same_tokens import GREEDY, PROMPTS, alone

SCORED = SamplingParams(temperature=0, max_tokens=48, ignore_eos=True, prompt_logprobs=2)


def plain(entries) -> list:
    assert entries[0] is None
    return [[(token, float(p), p.rank) for token, p in entry.items()] for entry in entries[1:]]


def test_they_are_those_of_transformers():
    import torch

    path, model = tiny_checkpoint("llama")
    prompt = [3, 17, 5, 5, 40, 2, 9, 31, 8]
    logits = model(torch.tensor([prompt])).logits[0]
    expected = torch.log_softmax(logits.double(), -1).detach().numpy()
    with LLM(str(path), dtype="f32", kv_cache_dtype="f32") as llm:
        (output,) = llm.generate({"prompt_token_ids": prompt}, SamplingParams(max_tokens=1, prompt_logprobs=3))
    assert output.prompt_logprobs is not None and output.prompt_logprobs[0] is None
    assert len(output.prompt_logprobs) == len(prompt)
    for position, entry in enumerate(output.prompt_logprobs[1:]):
        row = expected[position]
        assert next(iter(entry)) == prompt[position + 1]
        np.testing.assert_allclose([float(p) for p in entry.values()], row[list(entry)], rtol=0, atol=1e-5)
        likeliest = [token for token, p in sorted(entry.items(), key=lambda item: item[1].rank)][:3]
        assert likeliest == list(np.argsort(-row)[:3])


def test_they_do_not_depend_on_chunks_company_preemption_or_caches():
    with LLM(max_model_len=512, max_num_seqs=100) as llm:
        expected = [plain(llm.generate(prompt, SCORED)[0].prompt_logprobs) for prompt in PROMPTS]
    for options in (
        {"max_num_seqs": 3, "max_num_batched_tokens": 16},  # three rows of logits: many chunks
        {"kv_cache_memory": 23 * 16 * 23_040, "max_model_len": 128},
        {"num_speculative_tokens": 3},
    ):
        with LLM(**{"max_model_len": 512, **options}) as llm:
            outputs = llm.generate(PROMPTS, [SCORED, GREEDY, SCORED, GREEDY, SCORED])
            again = llm.generate(PROMPTS[0], SCORED)[0]  # the cache has all of it
            stats = llm.get_stats()
        assert [list(o.outputs[0].token_ids) for o in outputs] == alone()
        assert [plain(o.prompt_logprobs) for o in outputs[::2]] == expected[::2]
        assert [o.prompt_logprobs for o in outputs[1::2]] == [None, None]
        assert plain(again.prompt_logprobs) == expected[0]
        assert stats.preemptions > 0 or "kv_cache_memory" not in options


def test_every_answer_of_several_has_them_once():
    with LLM(max_model_len=512) as llm:
        (output,) = llm.generate(PROMPTS[0], SamplingParams(n=3, max_tokens=4, prompt_logprobs=0, seed=1))
        streamed = list(llm.stream(PROMPTS[0], SamplingParams(max_tokens=4, prompt_logprobs=0, seed=1)))
    assert len(output.outputs) == 3
    assert output.prompt_logprobs is not None
    assert len(output.prompt_logprobs) == len(output.prompt_token_ids)
    assert all(len(entry) == 1 for entry in output.prompt_logprobs[1:])
    text = "".join(next(iter(entry.values())).decoded_token for entry in output.prompt_logprobs[1:])
    assert PROMPTS[0].endswith(text)
    assert all(piece.prompt_logprobs == output.prompt_logprobs for piece in streamed)


@pytest.mark.parametrize("count", [-1, 21, "3", True])
def test_their_number_is_checked(count):
    with pytest.raises(RequestError, match="prompt_logprobs"):
        SamplingParams(prompt_logprobs=count)
