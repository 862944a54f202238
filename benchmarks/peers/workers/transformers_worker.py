"""Hugging Face transformers: eager, or compiled with a static cache."""

from __future__ import annotations

import time
from typing import Any

from serve import serve

STEP = 64  # tokens by which static caches differ


class Engine:
    def __init__(self, model: str, precision: str, threads: int, max_len: int, max_seqs: int) -> None:
        import torch
        import transformers

        torch.set_num_threads(threads)
        self.torch = torch
        self.version = f"{transformers.__version__}, torch {torch.__version__}"
        self.compiled = precision.endswith("compiled")
        self.model: Any = transformers.AutoModelForCausalLM.from_pretrained(
            model, dtype=torch.bfloat16, attn_implementation="sdpa"
        ).eval()
        self.settings: dict[str, Any] = {
            "dtype": "bfloat16",
            "attention": "sdpa",
            "cache": "static" if self.compiled else "dynamic",
            "compile": "decode step, inductor" if self.compiled else "off",
        }
        self._step = torch.compile(self._forward, dynamic=False) if self.compiled else self._forward

    def _forward(self, token: Any, cache: Any) -> Any:
        out = self.model(token, past_key_values=cache, use_cache=True)
        return out.logits[:, -1:].argmax(-1)

    def _cache(self, length: int) -> Any:
        from transformers import DynamicCache, StaticCache

        if not self.compiled:
            return DynamicCache(config=self.model.config)
        # In steps, so that the unmeasured call before the measured one compiles for the same length.
        return StaticCache(config=self.model.config, max_cache_len=max(STEP * 3, -(-length // STEP) * STEP))

    def _prefill(self, rows: list[list[int]], cache: Any) -> Any:
        out = self.model(self.torch.tensor(rows), past_key_values=cache, use_cache=True, logits_to_keep=1)
        return out.logits[:, -1:].argmax(-1)

    def generate(self, tokens: list[int], count: int) -> tuple[float, float, list[int]]:
        with self.torch.inference_mode():
            start = time.perf_counter()
            cache = self._cache(len(tokens) + count + 1)
            token = self._prefill([tokens], cache)
            made = [int(token)]
            first = time.perf_counter()
            for _ in range(count):
                token = self._step(token, cache)
                made.append(int(token))
            return first - start, time.perf_counter() - first, made

    def batch(self, prompts: list[list[int]], count: int) -> tuple[float, int]:
        with self.torch.inference_mode():
            start = time.perf_counter()
            cache = self._cache(len(prompts[0]) + count)
            token = self._prefill(prompts, cache)
            for _ in range(count - 1):
                token = self._step(token, cache)
            return time.perf_counter() - start, len(prompts) * count


if __name__ == "__main__":
    serve(Engine)
