"""The real small model: perplexity beside transformers, a golden answer, and speed of the first token."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pelton import LLM, SamplingParams
from pelton.backends.base import Batch, ScheduledSequence
from pelton.build import build
from pelton.checkpoint import open_checkpoint, resolve_model
from pelton.config import EngineConfig
from pelton.graph.ops import f32
from tests.helpers.families import BLOCK, backends, spec

TEXT = Path(__file__).parent / "data" / "alice.txt"
CHUNK = 256

#: The greedy answer of SmolLM2-135M-Instruct (Q4_1) to "Name the capital of France.". transformers
#: on the dequantized weights gives the same tokens (test below).
QUESTION = "Name the capital of France."
GOLDEN = "The capital of France is Paris."


@functools.cache
def oracle() -> Any:
    """transformers with the checkpoint's weights dequantized to float32."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    checkpoint = open_checkpoint(resolve_model(""))
    known = LlamaConfig().to_dict()
    fields = {k: v for k, v in checkpoint.config.items() if k in known}
    fields["rope_parameters"] = {"rope_type": "default", "rope_theta": checkpoint.config["rope_theta"]}
    model = LlamaForCausalLM(LlamaConfig(**fields)).eval()
    state = {name: torch.from_numpy(np.array(f32(t.read()))) for name, t in checkpoint.tensors.items()}
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model.load_state_dict(state, strict=True)
    return model


def negative_log_likelihood(logits: np.ndarray, targets: list[int]) -> float:
    """Sum over rows of -log softmax(logits)[target], in nats."""
    wide = logits.astype(np.float64)
    peak = wide.max(axis=1)
    total = peak + np.log(np.exp(wide - peak[:, None]).sum(axis=1))
    return float((total - wide[np.arange(len(targets)), targets]).sum())


@functools.cache
def text_tokens() -> tuple[int, ...]:
    built = build(EngineConfig(max_num_seqs=1, max_model_len=64))
    tokens = tuple(built.tokenizer.encode(TEXT.read_text(encoding="utf-8")))
    built.close()
    assert len(tokens) >= 4000
    return tokens


@functools.cache
def oracle_perplexity(tokens: tuple[int, ...]) -> float:
    import torch

    with torch.no_grad():
        logits = oracle()(torch.tensor([tokens]), use_cache=False).logits[0]
    return float(np.exp(negative_log_likelihood(logits[:-1].numpy(), list(tokens[1:])) / (len(tokens) - 1)))


@functools.cache
def pelton_perplexity(isa: str, chunk: int, tokens: tuple[int, ...], kv_cache_dtype: Any = "auto") -> float:
    built = build(
        EngineConfig(
            isa=isa,
            max_num_seqs=chunk,
            max_num_batched_tokens=chunk,
            kv_cache_memory=1 << 28,
            kv_cache_dtype=kv_cache_dtype,
        )
    )
    blocks = tuple(range(-(-len(tokens) // BLOCK)))
    total = 0.0
    for start in range(0, len(tokens) - 1, chunk):
        part = tokens[start : min(start + chunk, len(tokens) - 1)]
        used = blocks[: -(-(start + len(part)) // BLOCK)]
        batch = Batch((ScheduledSequence("a", part, start, used, spec()),))
        logits = built.executor.logits(batch, every=True)  # type: ignore[attr-defined]
        total += negative_log_likelihood(logits, list(tokens[start + 1 : start + 1 + len(part)]))
    built.close()
    return float(np.exp(total / (len(tokens) - 1)))


@pytest.mark.parametrize("isa", [b for b in backends() if b != "reference"])
def test_perplexity_is_that_of_transformers_on_the_same_weights(isa: str) -> None:
    # The whole text for the tier that users get; the slow tiers, which differ in rounding only, on its start.
    tokens = text_tokens() if isa == backends()[-1] else text_tokens()[:1000]
    got, want = pelton_perplexity(isa, CHUNK, tokens), oracle_perplexity(tokens)
    print(f"perplexity of {len(tokens)} tokens, {isa}: {got:.4f}, transformers f32: {want:.4f}")
    assert got == pytest.approx(want, rel=0.005)


@pytest.mark.parametrize(("kind", "most"), [("f16", 0.005), ("int8", 0.005), ("fp8", 0.02)])
def test_perplexity_with_another_type_of_cache_is_close_to_that_with_bf16(kind: str, most: float) -> None:
    isa, tokens = backends()[-1], text_tokens()
    bf16, got = pelton_perplexity(isa, CHUNK, tokens), pelton_perplexity(isa, CHUNK, tokens, kind)
    print(f"perplexity of {len(tokens)} tokens, KV cache in bf16: {bf16:.4f}, in {kind}: {got:.4f}")
    assert got == pytest.approx(bf16, rel=most)


def test_golden_answer() -> None:
    with LLM(max_num_seqs=4, max_model_len=512) as llm:
        params = SamplingParams(temperature=0.0, max_tokens=32)
        answer = llm.chat([{"role": "user", "content": QUESTION}], params)[0]
    assert answer.outputs[0].text == GOLDEN
    assert answer.outputs[0].finish_reason == "stop"


def test_golden_answer_is_that_of_transformers() -> None:
    import torch

    built = build(EngineConfig(max_num_seqs=1, max_model_len=64))
    prompt = built.tokenizer.encode_chat([{"role": "user", "content": QUESTION}])
    with torch.no_grad():
        out = oracle().generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=32, eos_token_id=2)
    assert built.tokenizer.decode(out[0, len(prompt) :].tolist()) == GOLDEN
    built.close()


def test_batch_of_prompts_gives_the_answers_of_each_alone() -> None:
    prompts = ["Water boils at", "The three primary colours are", "def fibonacci(n):", "Once upon a time"]
    params = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)
    with LLM(max_num_seqs=3, max_num_batched_tokens=16, max_model_len=256) as llm:
        together = [o.outputs[0].token_ids for o in llm.generate(prompts, params)]
        alone = [llm.generate(p, params)[0].outputs[0].token_ids for p in prompts]
    assert together == alone
