"""ONNX Runtime GenAI: its model builder and its Generator, CPU provider."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from serve import serve


class Engine:
    def __init__(self, model: str, precision: str, threads: int, max_len: int, max_seqs: int) -> None:
        import numpy as np
        import onnxruntime_genai as og

        self.og, self.np = og, np
        self.version = og.__version__
        config = og.Config(model)
        config.overlay(json.dumps({"model": {"decoder": {"session_options": {"intra_op_num_threads": threads}}}}))
        self.model = og.Model(config)
        self.max_len = max_len
        self.settings: dict[str, Any] = {
            "provider": "CPU",
            "intra_op_num_threads": threads,
            "accuracy_level": "int8 activations" if precision.startswith("int") else "f32",
            "block_size": 32 if precision.startswith("int") else None,
            "past_present_share_buffer": True,
        }

    def _generator(self, rows: list[list[int]], count: int) -> Any:
        params = self.og.GeneratorParams(self.model)
        length = len(rows[0]) + count
        params.set_search_options(
            batch_size=len(rows), max_length=length, min_length=length, do_sample=False, past_present_share_buffer=True
        )
        generator = self.og.Generator(self.model, params)
        generator.append_tokens(self.np.array(rows, self.np.int32))
        return generator

    def generate(self, tokens: list[int], count: int) -> tuple[float, float, list[int]]:
        start = time.perf_counter()
        generator = self._generator([tokens], count + 1)
        generator.generate_next_token()
        first = time.perf_counter()
        for _ in range(count):
            generator.generate_next_token()
        end = time.perf_counter()
        return first - start, end - first, list(generator.get_sequence(0)[len(tokens) :])

    def batch(self, prompts: list[list[int]], count: int) -> tuple[float, int]:
        start = time.perf_counter()
        generator = self._generator(prompts, count)
        for _ in range(count):
            generator.generate_next_token()
        seconds = time.perf_counter() - start
        return seconds, sum(len(generator.get_sequence(i)) - len(p) for i, p in enumerate(prompts))

    @staticmethod
    def convert(source: str, destination: str, precision: str) -> str:
        tied = json.loads((Path(source) / "config.json").read_text()).get("tie_word_embeddings", False)
        options = ["prune_lm_head=true"]
        if precision == "int4":  # the head in 8 bits, as in the other 4-bit models
            options += ["algo_config=rtn", "matmul_mixed_precision=last_matmul:int8"]
        elif tied:
            options += ["shared_embeddings=true"]
        command = [
            *(sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", source, "-o", destination),
            *("-p", {"f32": "fp32"}.get(precision, precision), "-e", "cpu"),
            *("-c", str(Path(destination) / "builder"), "--extra_options", *options),
        ]
        done = subprocess.run(command, stdout=sys.stderr, stderr=subprocess.PIPE, text=True)
        sys.stderr.write(done.stderr)
        if done.returncode:
            lines = done.stderr.strip().splitlines()
            raise RuntimeError(f"the model builder failed: {lines[-1] if lines else 'no message'}")
        return "blocks of 32; head int8" if precision == "int4" else ""


if __name__ == "__main__":
    serve(Engine)
