"""LoRA from end to end on a quantized model: the same request gives the same tokens, whoever else is answered."""

from __future__ import annotations

import asyncio
import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pelton import LLM, AsyncLLM, PeltonError, SamplingParams
from pelton.backends.base import Batch, ScheduledSequence
from pelton.build import build
from pelton.config import EngineConfig
from pelton.errors import CheckpointError, RequestError
from tests.helpers.adapters import linear_layers, merged, random_weights, write_peft
from tests.helpers.families import BLOCK, spec
from tests.helpers.tiny_models import temporary_folder, tiny_checkpoint

from .test_same_tokens import PROMPTS
from .test_smollm2 import oracle

GREEDY = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
#: Who answers which prompt: with two adapters, and without.
CHOICES = ("sql", None, "poet", "sql", "poet")
ASKED = [{"prompt": prompt, "lora": lora} for prompt, lora in zip(PROMPTS, CHOICES, strict=True)]
OPTIONS: dict[str, Any] = {"max_model_len": 512, "enable_lora": True, "max_loras": 2, "max_lora_rank": 8}


@functools.cache
def adapters() -> dict[str, tuple[Path, Any]]:
    """Folders and weights of random adapters for SmolLM2: one of all linear layers, one of some."""
    with LLM(max_model_len=64, enable_lora=True, max_loras=1, max_lora_rank=1) as llm:
        tables = llm._parts.plan.program.adapters  # type: ignore[attr-defined]
        modules = {
            m: (t.type.in_features, w) for t in tables for m, w in zip(t.modules, t.type.widths, strict=True)
        }  # fmt: skip
    assert len(modules) == 30 * 7
    weights = {
        "sql": random_weights(modules, 1, rank=8, size=0.5),
        "poet": random_weights(modules, 2, rank=3, only=("q_proj", "v_proj", "down_proj"), size=0.5),
    }
    return {name: (write_peft(temporary_folder(f"lora-{name}-"), w), w) for name, w in weights.items()}


def llm_with_adapters(**options: Any) -> LLM:
    llm = LLM(**OPTIONS | options)
    for name, (folder, _) in adapters().items():
        llm.add_lora(name, folder)
    return llm


def tokens(outputs: Any) -> list[list[int]]:
    return [list(output.outputs[0].token_ids) for output in outputs]


@functools.cache
def alone() -> list[list[int]]:
    with llm_with_adapters(enable_prefix_caching=False) as llm:
        return [tokens(llm.generate(prompt, GREEDY))[0] for prompt in ASKED]


@functools.cache
def without_adapters() -> list[list[int]]:
    with LLM(max_model_len=512) as llm:
        return tokens(llm.generate(PROMPTS, GREEDY))


def test_every_adapter_answers_in_its_own_way():
    plain = without_adapters()
    assert [got == want for got, want in zip(alone(), plain, strict=True)] == [c is None for c in CHOICES]
    with llm_with_adapters() as llm:
        other = tokens(llm.generate(PROMPTS[0], GREEDY, lora="poet"))[0]
    assert other not in (plain[0], alone()[0])


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"enable_prefix_caching": False},
        {"max_num_batched_tokens": 7, "max_num_seqs": 5},
        {"max_num_seqs": 2},
        {"batching": "static"},
        {"threads": 1},
        {"num_speculative_tokens": 4},
    ],
    ids=str,
)
def test_in_company(options):
    with llm_with_adapters(**options) as llm:
        assert tokens(llm.generate(ASKED, GREEDY)) == alone()


def test_after_preemptions():
    # 23 blocks of 16 tokens; all five would need more at their ends.
    with llm_with_adapters(max_model_len=128, kv_cache_memory=23 * 16 * 23_040, enable_prefix_caching=False) as llm:
        longer = SamplingParams(temperature=0, max_tokens=48, ignore_eos=True)
        got = tokens(llm.generate(ASKED, longer))
        assert llm.get_stats().preemptions > 0
    assert [t[:24] for t in got] == alone()


def test_the_prefix_cache_does_not_mix_adapters():
    with llm_with_adapters() as llm:
        for lora in ("sql", "poet", None, "sql"):
            before = llm.get_stats().cached_tokens
            (got,) = tokens(llm.generate(PROMPTS[0], GREEDY, lora=lora))
            found = llm.get_stats().cached_tokens - before
        assert got == alone()[0]
        assert found > 0.7 * 60
        assert before == 0


def test_come_and_go_at_run_time():
    (sql, _), (poet, _) = adapters()["sql"], adapters()["poet"]
    with LLM(**OPTIONS | {"max_loras": 1}) as llm:
        assert llm.list_loras() == []
        llm.add_lora("sql", sql)
        assert llm.list_loras() == ["sql"]
        stream = llm.stream(ASKED[0], GREEDY)
        got = list(next(stream).outputs[0].token_ids)
        with pytest.raises(RequestError, match="max_loras"):
            llm.add_lora("poet", poet)
        with pytest.raises(RequestError, match="'sql' is used by a request"):
            llm.remove_lora("sql")
        for piece in stream:
            got += piece.outputs[0].token_ids
        assert got == alone()[0]
        llm.remove_lora("sql")
        with pytest.raises(RequestError, match="no adapter 'sql'"):
            llm.generate(ASKED[0], GREEDY)
        # The same name and slot, other weights: nothing of the old ones answers.
        llm.add_lora("sql", poet)
        assert tokens(llm.generate(PROMPTS[2], GREEDY, lora="sql"))[0] == alone()[2]
        assert tokens(llm.generate(PROMPTS[1], GREEDY))[0] == without_adapters()[1]


def test_a_prompts_own_choice_goes_before_that_of_the_call():
    with llm_with_adapters() as llm:
        got = tokens(llm.generate([ASKED[2], PROMPTS[0]], GREEDY, lora="sql"))
        assert got == [alone()[2], alone()[0]]
        question = [{"role": "user", "content": "Why?"}]
        chats = [tokens(llm.chat(question, GREEDY, lora=lora))[0] for lora in ("sql", None)]
        assert chats[0] != chats[1]
        for lora in (3, ["sql"]):
            with pytest.raises(RequestError, match="lora is"):
                llm.generate(PROMPTS[0], GREEDY, lora=lora)
            with pytest.raises(RequestError, match="lora is"):
                llm.generate({"prompt": "x", "lora": lora}, GREEDY)


def test_in_an_event_loop_while_others_are_answered():
    async def main() -> list[list[int]]:
        async with AsyncLLM(**OPTIONS) as llm:

            async def ask(index: int) -> list[int]:
                return list((await llm.generate(PROMPTS[index], GREEDY, lora=CHOICES[index])).outputs[0].token_ids)

            plain = asyncio.create_task(ask(1))
            await llm.add_lora("sql", adapters()["sql"][0])
            first = asyncio.create_task(ask(0))
            await llm.add_lora("poet", adapters()["poet"][0])
            assert llm.list_loras() == ["sql", "poet"]
            got = [await first, await plain, *await asyncio.gather(*(ask(i) for i in (2, 3, 4)))]
            # A prompt object that was answered with an adapter goes without one when asked again.
            prompt = llm.conversation([{"role": "user", "content": "Why?"}])
            with_sql, without = [await llm.generate(prompt, GREEDY, lora=lora) for lora in ("sql", None)]
            assert with_sql.outputs[0].token_ids != without.outputs[0].token_ids
            await llm.remove_lora("sql")
            with pytest.raises(RequestError, match="no adapter 'sql'"):
                await ask(0)
            # Removed after the request was checked and before the engine's thread had it: that request fails alone.
            running = asyncio.create_task(ask(2))
            removed = llm._engine.call(lambda engine: engine.remove_adapter("poet"))
            lost = asyncio.create_task(ask(4))
            await asyncio.gather(running, lost, asyncio.wrap_future(removed), return_exceptions=True)
            assert (await llm.generate(PROMPTS[1], GREEDY)).outputs[0].token_ids
            return got

    assert asyncio.run(main()) == alone()


def test_a_saved_prefix_belongs_to_its_adapter(tmp_path):
    file = tmp_path / "prefix"
    with llm_with_adapters() as llm:
        saved = llm.save_prefix(ASKED[0], file)
    with llm_with_adapters() as llm:
        with pytest.raises(PeltonError, match="computed by another model"):
            llm.load_prefix(file)
        assert llm.load_prefix(file, lora="sql") == saved
        assert tokens(llm.generate(ASKED[0], GREEDY))[0] == alone()[0]
        assert llm.get_stats().cached_tokens == saved


def test_logits_over_quantized_weights_are_those_of_transformers_with_merged_ones():
    import torch

    folder, weights = adapters()["sql"]
    rng = np.random.default_rng(3)
    prompt = tuple(int(t) for t in rng.integers(100, 20_000, 48))
    built = build(EngineConfig(max_num_seqs=2, max_num_batched_tokens=64, activations="float", enable_lora=True))
    built.executor.set_adapter(1, built.read_adapter(str(folder)).weights)
    batch = Batch((ScheduledSequence("a", prompt, 0, tuple(range(48 // BLOCK)), spec(), adapter=1),))
    got = np.array(built.executor.logits(batch)[0])  # type: ignore[attr-defined]
    built.close()
    with torch.no_grad():
        plain, want = (m(torch.tensor([prompt])).logits[0, -1].numpy() for m in (oracle(), merged(oracle(), weights)))
    # bf16 activations, KV cache and adapters; what the adapter changes is far above that.
    error, change = (np.linalg.norm(x - want) / np.linalg.norm(want) for x in (got, plain))
    assert error < 0.03 < 0.2 < change


def test_what_cannot_be_loaded_is_refused(tmp_path):
    folder, model = tiny_checkpoint("llama")
    weights = random_weights(linear_layers(model), 1, rank=8)
    good = write_peft(tmp_path / "good", weights)
    with LLM(str(folder)) as llm, pytest.raises(RequestError, match="without room for adapters; load it with enable"):
        llm.add_lora("a", good)
    with LLM(str(folder), enable_lora=True, max_lora_rank=4) as llm:
        with pytest.raises(CheckpointError, match="has rank 8, max_lora_rank is 4; set max_lora_rank=8"):
            llm.add_lora("a", good)
        with pytest.raises(CheckpointError, match="does not exist"):
            llm.add_lora("a", tmp_path / "nowhere")
        assert llm.list_loras() == []
    for option, value in (("max_loras", 0), ("max_lora_rank", 513), ("max_loras", True), ("enable_lora", 1)):
        with pytest.raises(PeltonError, match=option):
            LLM(str(folder), **{"enable_lora": True, option: value})
    with pytest.raises(RequestError, match="closed"):
        llm.add_lora("a", good)


def test_the_ledger_counts_the_room_of_adapters():
    from pelton.build import plan

    without, small, large = (
        plan(EngineConfig(**options)).ledger
        for options in ({}, {"enable_lora": True}, {"enable_lora": True, "max_loras": 8, "max_lora_rank": 32})
    )
    assert without.adapters == 0 and "adapters" not in json.dumps(without.rows())
    # (in + out) * rank numbers of bf16 for each linear layer and adapter, and a little padding.
    exact = 30 * ((576 + 576) * 2 + (576 + 192) * 2 + (576 + 1536) * 3) * 2
    assert 1.0 <= small.adapters / (exact * 4 * 16) < 1.05
    assert 1.0 <= large.adapters / (exact * 8 * 32) < 1.05
    assert large.total - without.total >= large.adapters
