"""OpenVINO GenAI: its continuous batching pipeline, for one sequence as for many."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from serve import serve

CHUNK = 2048  # tokens of one step; the default of 256 re-reads the weights eight times as often in prefill


class Engine:
    def __init__(self, model: str, precision: str, threads: int, max_len: int, max_seqs: int) -> None:
        import numpy as np
        import openvino as ov
        import openvino_genai as genai

        self.version = genai.__version__
        self.tensor = lambda tokens: ov.Tensor(np.array([tokens], np.int64))
        self.config = genai.GenerationConfig
        scheduler = genai.SchedulerConfig()
        scheduler.max_num_batched_tokens = CHUNK
        scheduler.max_num_seqs = max_seqs
        scheduler.dynamic_split_fuse = True
        scheduler.enable_prefix_caching = False
        scheduler.cache_size = 1  # GiB; the workloads need 12,288 tokens at most
        properties = {
            "PERFORMANCE_HINT": "LATENCY",  # one stream over all threads
            "INFERENCE_NUM_THREADS": threads,
            "CACHE_DIR": str(Path(model) / "compiled"),  # later starts read the compiled model
        }
        self.pipeline = genai.ContinuousBatchingPipeline(model, scheduler, "CPU", properties)
        self.settings: dict[str, Any] = {
            **{k: v for k, v in properties.items() if k != "CACHE_DIR"},
            "CACHE_DIR": "set",
            "max_num_batched_tokens": CHUNK,
            "KV_CACHE_PRECISION": "default (u8)",
            "INFERENCE_PRECISION_HINT": "default (bf16 where the CPU has it)",
            "weights": precision,
        }
        self.requests = 0

    def _add(self, tokens: list[int], count: int) -> Any:
        config = self.config()
        config.max_new_tokens = config.min_new_tokens = count
        config.ignore_eos = True
        config.do_sample = False
        self.requests += 1
        return self.pipeline.add_request(self.requests, self.tensor(tokens), config)

    def generate(self, tokens: list[int], count: int) -> tuple[float, float, list[int]]:
        start = first = time.perf_counter()
        handle = self._add(tokens, count + 1)
        made: list[int] = []
        while self.pipeline.has_non_finished_requests():
            self.pipeline.step()
            while handle.can_read():
                for output in handle.read().values():
                    made.extend(output.generated_ids)
            if made and first == start:
                first = time.perf_counter()
        return first - start, time.perf_counter() - first, made

    def batch(self, prompts: list[list[int]], count: int) -> tuple[float, int]:
        start = time.perf_counter()
        handles = [self._add(p, count) for p in prompts]
        while self.pipeline.has_non_finished_requests():
            self.pipeline.step()
        seconds = time.perf_counter() - start
        return seconds, sum(len(o.generated_ids) for h in handles for o in h.read_all())

    @staticmethod
    def convert(source: str, destination: str, precision: str) -> str:
        width = json.loads((Path(source) / "config.json").read_text())["hidden_size"]
        group = 128 if width % 128 == 0 else 64
        command = [
            *(str(Path(sys.executable).parent / "optimum-cli"), "export", "openvino", "--model", source),
            *("--task", "text-generation-with-past", "--weight-format", precision.replace("bf16", "fp16")),
            *(("--group-size", str(group), "--ratio", "1.0", "--sym") if precision == "int4" else ()),
            destination,
        ]
        done = subprocess.run(command, stdout=sys.stderr, stderr=subprocess.PIPE, text=True)
        sys.stderr.write(done.stderr)
        if done.returncode:
            lines = done.stderr.strip().splitlines()
            raise RuntimeError(f"optimum-cli failed: {lines[-1] if lines else 'no message'}")
        return f"symmetric groups of {group}; embedding and head int8" if precision == "int4" else ""


if __name__ == "__main__":
    serve(Engine)
