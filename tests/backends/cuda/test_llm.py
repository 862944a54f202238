"""``LLM(device="cuda")`` from end to end, and what it refuses."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from pelton import LLM, SamplingParams
from pelton.backends.cuda.backend import CudaBackend
from pelton.backends.cuda.device import Device
from pelton.build import build, plan
from pelton.config import EngineConfig
from pelton.errors import OutOfMemoryError, PeltonError
from tests.backends.cuda.device import DEVICE
from tests.helpers.tiny_models import tiny_checkpoint

PROMPTS = [{"prompt_token_ids": list(range(3, 3 + n))} for n in (21, 5, 1)]
PARAMS = [
    SamplingParams(temperature=0.0, max_tokens=6),
    SamplingParams(temperature=0.8, seed=7, top_p=0.9, max_tokens=4),
    SamplingParams(temperature=0.0, max_tokens=5, repetition_penalty=1.3, logprobs=1),
]


def answers(folder: Any, **options: Any) -> list[list[int]]:
    options = {"max_num_seqs": 3, "max_num_batched_tokens": 16, "kv_cache_memory": 1 << 21} | options
    with LLM(str(folder), **options) as llm:
        return [list(o.outputs[0].token_ids) for o in llm.generate(PROMPTS, PARAMS)]


@pytest.mark.filterwarnings("ignore:rows of 48|rows of 80")
@pytest.mark.parametrize(
    ("cache", "quantization"), [("f32", None), ("int8", None), ("fp8", None), ("f32", "int4"), ("int8", "fp8")]
)
def test_tokens_are_those_of_the_cpu(cache: str, quantization: str | None) -> None:
    folder, _ = tiny_checkpoint("llama", layers=1)
    options = {"kv_cache_dtype": cache, "quantization": quantization, "activations": "float", "dtype": "f32"}
    got = answers(folder, device="cuda", **options)
    # In float32, as here: faster tiers round to bf16 beside codes, and other tokens may be drawn.
    assert got == answers(folder, device="cpu", isa="generic", packed_cache=False, **options)


def test_a_llm_knows_its_peaks_and_what_it_used() -> None:
    folder, _ = tiny_checkpoint("gpt2", "bfloat16", layers=1)
    with LLM(
        str(folder),
        device="cuda",
        enforce_eager=True,
        max_num_seqs=2,
        max_num_batched_tokens=16,
        kv_cache_memory=1 << 20,
    ) as llm:
        llm.generate([PROMPTS[1]], SamplingParams(temperature=0.0, max_tokens=2))
        stats = llm.get_stats()
        assert stats.seconds > 0 and stats.bytes > 0
        assert stats.mbu(llm.peak_bandwidth() or 0.0) > 0 and stats.mfu(llm.peak_flops() or 0.0) > 0


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"gpu_memory_utilization": 1.5}, "gpu_memory_utilization is 1.5; give a number above 0, up to 1"),
        ({"enforce_eager": 1}, "enforce_eager is 1; give True or False"),
        ({"device": "cpu", "dtype": "f16"}, "dtype is 'f16', which CPUs do not multiply"),
    ],
)
def test_what_is_refused(options: dict[str, Any], line: str) -> None:
    folder, _ = tiny_checkpoint("llama", layers=1)
    with pytest.raises(PeltonError) as error:
        plan(EngineConfig(**({"model": str(folder), "device": "cuda"} | options)))
    assert line in str(error.value)


def test_a_machine_without_a_gpu_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    if DEVICE.type == "cuda":
        pytest.skip("there is one")
    monkeypatch.delenv("PELTON_CUDA_DEVICE")
    folder, _ = tiny_checkpoint("llama", layers=1)
    with pytest.raises(PeltonError, match=r"built without CUDA|no NVIDIA GPU"):
        plan(EngineConfig(model=str(folder), device="cuda"))


def test_without_torch_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    folder, _ = tiny_checkpoint("llama", layers=1)
    with pytest.raises(PeltonError, match=r"needs torch and triton; pip install 'pelton\[cuda\]'"):
        plan(EngineConfig(model=str(folder), device="cuda"))


def test_the_ledger_refuses_before_anything_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Device, "available", lambda self, share: int(share * (1 << 20)))
    folder, _ = tiny_checkpoint("llama", layers=1)
    with pytest.raises(OutOfMemoryError, match=r"KiB are free on .*dtype='bf16' takes half .* such GPUs"):
        build(EngineConfig(model=str(folder), device="cuda"))


def test_the_kv_cache_gets_what_the_largest_step_left(monkeypatch: pytest.MonkeyPatch) -> None:
    folder, _ = tiny_checkpoint("llama", layers=1)
    monkeypatch.setattr("pelton.backends.cuda.backend._RESERVE", 0)
    readings = iter([8 << 30, 1 << 18, 1 << 18])  # the plan's, then what there was when a step had run
    monkeypatch.setattr(Device, "available", lambda self, share: next(readings))
    built = build(EngineConfig(model=str(folder), device="cuda", max_num_seqs=8, max_num_batched_tokens=16))
    spec = built.executor.kv_spec
    assert built.plan.kv_spec.num_blocks == 8 * 16  # every sequence at full length
    assert spec.num_blocks == (1 << 18) // spec.bytes_per_block and spec.max_model_len == 256
    built.close()


def test_a_context_that_no_longer_fits_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pelton.backends.cuda.backend._RESERVE", 0)
    backend: Any = SimpleNamespace(available=lambda: 1 << 14, __class__=CudaBackend)
    folder, _ = tiny_checkpoint("llama", layers=1)
    config = EngineConfig(
        model=str(folder), device="cuda", max_model_len=256, max_num_seqs=2, max_num_batched_tokens=16
    )
    built = build(config)
    with pytest.raises(OutOfMemoryError, match="max_model_len=128 would fit"):
        CudaBackend.settle(backend, [built.executor], config)
    with pytest.raises(OutOfMemoryError, match=r"a KV cache of 1.0 MiB; kv_cache_memory of 16.0 KiB would fit"):
        CudaBackend.settle(backend, [built.executor], replace(config, kv_cache_memory=1 << 20))
    built.close()


def test_a_context_that_memory_cuts_down_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pelton.backends.cuda.backend._RESERVE", 0)
    backend: Any = SimpleNamespace(available=lambda: 1 << 14, __class__=CudaBackend)
    folder, _ = tiny_checkpoint("llama", layers=1)
    config = EngineConfig(model=str(folder), device="cuda", max_num_seqs=2, max_num_batched_tokens=16)
    built = build(config)
    with pytest.warns(UserWarning, match="a context of 128 tokens, not of 256"):
        CudaBackend.settle(backend, [built.executor], config)
    assert built.executor.kv_spec.max_model_len == 128
    built.close()
