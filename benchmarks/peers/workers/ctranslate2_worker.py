"""CTranslate2's Generator."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from serve import serve

#: What it computes in with weights of each kind, best first; which of them exist depends on the CPU.
COMPUTE = {"f32": ("float32",), "int8": ("int8_bfloat16", "int8_float32")}
STORED = {"f32": "float32", "int8": "int8"}


class Engine:
    def __init__(self, model: str, precision: str, threads: int, max_len: int, max_seqs: int) -> None:
        import ctranslate2

        self.version = ctranslate2.__version__
        supported = ctranslate2.get_supported_compute_types("cpu")
        compute = next((c for c in COMPUTE[precision] if c in supported), None)
        if compute is None:
            raise RuntimeError(f"no {precision} on this CPU; CTranslate2 has {', '.join(sorted(supported))}")
        self.generator = ctranslate2.Generator(
            model, device="cpu", compute_type=compute, intra_threads=threads, inter_threads=1, flash_attention=False
        )
        self.words = json.loads((Path(model) / "vocabulary.json").read_text())
        self.settings: dict[str, Any] = {"compute_type": compute, "intra_threads": threads, "inter_threads": 1}

    def _options(self, count: int) -> dict[str, Any]:
        return {
            "beam_size": 1,
            "max_length": count,
            "min_length": count,
            "end_token": [],
            "include_prompt_in_result": False,
            "cache_static_prompt": False,
        }

    def generate(self, tokens: list[int], count: int) -> tuple[float, float, list[int]]:
        times: list[float] = []
        made: list[int] = []

        def on_token(step: Any) -> bool:
            times.append(time.perf_counter())
            made.append(step.token_id)
            return False

        prompt = [self.words[t] for t in tokens]
        start = time.perf_counter()
        self.generator.generate_batch([prompt], callback=on_token, **self._options(count + 1))
        return times[0] - start, times[-1] - times[0], made

    def batch(self, prompts: list[list[int]], count: int) -> tuple[float, int]:
        rows = [[self.words[t] for t in p] for p in prompts]
        start = time.perf_counter()
        results = self.generator.generate_batch(rows, max_batch_size=len(rows), **self._options(count))
        return time.perf_counter() - start, sum(len(r.sequences_ids[0]) for r in results)

    @staticmethod
    def convert(source: str, destination: str, precision: str) -> str:
        from ctranslate2.converters import TransformersConverter

        converter = TransformersConverter(source, load_as_float16=False, low_cpu_mem_usage=True)
        converter.convert(destination, quantization=STORED[precision], force=True)
        return ""


if __name__ == "__main__":
    serve(Engine)
