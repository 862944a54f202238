"""Pelton through its public API."""

from __future__ import annotations

import time
from typing import Any

from serve import serve


class Engine:
    def __init__(self, model: str, precision: str, threads: int, max_len: int, max_seqs: int) -> None:
        import pelton

        self.version = pelton.__version__
        self.settings: dict[str, Any] = {"threads": threads, "max_model_len": max_len, "max_num_seqs": max_seqs}
        self.llm = pelton.LLM(model, **self.settings)

    def generate(self, tokens: list[int], count: int) -> tuple[float, float, list[int]]:
        from pelton import SamplingParams

        params = SamplingParams(temperature=0, max_tokens=count + 1, ignore_eos=True)
        made: list[int] = []
        start = first = time.perf_counter()
        for output in self.llm.stream({"prompt_token_ids": tokens}, params):
            if not made:
                first = time.perf_counter()
            made.extend(output.outputs[0].token_ids)
        return first - start, time.perf_counter() - first, made

    def batch(self, prompts: list[list[int]], count: int) -> tuple[float, int]:
        from pelton import SamplingParams

        params = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True)
        start = time.perf_counter()
        outputs = self.llm.generate([{"prompt_token_ids": p} for p in prompts], params)
        return time.perf_counter() - start, sum(len(o.outputs[0].token_ids) for o in outputs)

    @staticmethod
    def peaks(threads: int) -> dict[str, Any]:
        """What this machine reaches now: bytes/s read, FLOP/s per precision."""
        from pelton.backends.cpu import _native
        from pelton.backends.cpu.executor import choose_isa
        from pelton.backends.cpu.peaks import measured_peaks

        isa = choose_isa(None)
        return {
            "cpu": _native.cpu_features().get("model_name"),
            "isa": isa,
            "peaks": measured_peaks(isa, threads, fresh=True),
        }


if __name__ == "__main__":
    serve(Engine)
