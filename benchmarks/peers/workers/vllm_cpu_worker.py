"""vLLM's CPU backend, driven step by step in this process."""

from __future__ import annotations

import ctypes.util
import json
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any

from serve import serve

# Set before vLLM is imported, which reads them then.
os.environ.update(
    VLLM_ENABLE_V1_MULTIPROCESSING="0",  # the engine in this process: no message passing in what is timed
    VLLM_CPU_KVCACHE_SPACE="1",  # GiB; the workloads need 12,288 tokens at most
    VLLM_USE_AOT_COMPILE="0",  # its files do not load on CPUs (0.32): every start would compile again
    VLLM_NO_USAGE_STATS="1",
    VLLM_LOGGING_LEVEL="WARNING",
    HF_HUB_OFFLINE="1",
)


def _preload() -> None:
    """Start again with the libraries that vLLM asks to have preloaded, as far as they are there."""
    wanted = [str(p) for p in (Path(sys.prefix) / "lib" / "libiomp5.so",) if p.exists()]  # a package it brings
    allocator = ctypes.util.find_library("tcmalloc_minimal")  # the system's, if it has one
    wanted += [allocator] if allocator else []
    if wanted and "LD_PRELOAD" not in os.environ:
        os.environ["LD_PRELOAD"] = ":".join(wanted)
        os.execv(sys.executable, [sys.executable, *sys.argv])


class Engine:
    def __init__(self, model: str, precision: str, threads: int, max_len: int, max_seqs: int) -> None:
        cores = sorted(os.sched_getaffinity(0))[:threads]
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = ",".join(map(str, cores))
        import vllm

        self.version = vllm.__version__
        options: dict[str, Any] = {
            "dtype": "bfloat16",
            "max_model_len": max_len,
            "max_num_seqs": max_seqs,
            "max_num_batched_tokens": 2048,
            "enable_prefix_caching": False,
        }
        self.engine = vllm.LLM(model, skip_tokenizer_init=True, disable_log_stats=True, **options).llm_engine
        self.settings: dict[str, Any] = {
            **options,
            "VLLM_CPU_OMP_THREADS_BIND": "one per core",
            "compile": "default (inductor)",
            "preloaded": [Path(p).name for p in os.environ.get("LD_PRELOAD", "").split(":") if p],
            "weights": precision,
        }
        self.params = vllm.SamplingParams
        self.requests = 0

    def _add(self, tokens: list[int], count: int) -> None:
        self.requests += 1
        params = self.params(temperature=0, max_tokens=count, min_tokens=count, ignore_eos=True, detokenize=False)
        self.engine.add_request(str(self.requests), {"prompt_token_ids": tokens}, params)

    def generate(self, tokens: list[int], count: int) -> tuple[float, float, list[int]]:
        start = first = time.perf_counter()
        self._add(tokens, count + 1)
        made: list[int] = []
        while self.engine.has_unfinished_requests():
            for output in self.engine.step():
                made = list(output.outputs[0].token_ids)
            if made and first == start:
                first = time.perf_counter()
        return first - start, time.perf_counter() - first, made

    def batch(self, prompts: list[list[int]], count: int) -> tuple[float, int]:
        made = 0
        start = time.perf_counter()
        for prompt in prompts:
            self._add(prompt, count)
        while self.engine.has_unfinished_requests():
            for output in self.engine.step():
                if output.finished:
                    made += len(output.outputs[0].token_ids)
        return time.perf_counter() - start, made

    @staticmethod
    def convert(source: str, destination: str, precision: str) -> str:
        """Round to the nearest code: a compressed-tensors checkpoint. Embedding and head stay bf16."""
        import torch
        from safetensors import safe_open
        from safetensors.torch import save_file

        folder, target = Path(source), Path(destination)
        target.mkdir(parents=True, exist_ok=True)
        config = json.loads((folder / "config.json").read_text())
        bits = 4 if precision == "W4A16" else 8
        group = 128 if config["hidden_size"] % 128 == 0 else 64
        weights: dict[str, Any] = {"num_bits": bits, "type": "int", "symmetric": True, "dynamic": False}
        scheme: dict[str, Any] = {"targets": ["Linear"]}
        if bits == 4:
            scheme |= {"weights": weights | {"strategy": "group", "group_size": group}, "input_activations": None}
        else:
            dynamic = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
            scheme |= {"weights": weights | {"strategy": "channel"}, "input_activations": dynamic}
        config["quantization_config"] = {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized" if bits == 4 else "int-quantized",
            "quantization_status": "compressed",
            "ignore": ["lm_head"],
            "config_groups": {"group_0": scheme},
        }
        index: dict[str, str] = {}
        for shard in sorted(folder.glob("*.safetensors")):
            out: dict[str, Any] = {}
            with safe_open(shard, "pt") as file:
                for name in file.keys():  # noqa: SIM118 - a safe_open file is no dict
                    tensor = file.get_tensor(name)
                    if not name.endswith("_proj.weight"):
                        out[name] = tensor
                        continue
                    rows, columns = tensor.shape
                    grouped = tensor.float().reshape(rows, -1, group if bits == 4 else columns)
                    most = 2 ** (bits - 1) - 1
                    scale = (grouped.abs().amax(-1, keepdim=True) / most).clamp(min=1e-8).bfloat16()
                    codes = (grouped / scale.float()).round().clamp(-most - 1, most).reshape(rows, columns)
                    stem = name.removesuffix("weight")
                    out[stem + "weight_scale"] = scale[..., 0].contiguous()
                    if bits == 8:
                        out[name] = codes.to(torch.int8)
                    else:  # eight codes to an int32, the first one lowest
                        shifts = torch.arange(0, 32, 4, dtype=torch.int64)
                        nibbles = (codes.to(torch.int64) + 8).reshape(rows, -1, 8)
                        packed = (nibbles << shifts).sum(-1)
                        out[stem + "weight_packed"] = packed.to(torch.int32)  # wraps, which keeps the bits
                        out[stem + "weight_shape"] = torch.tensor([rows, columns])
            save_file(out, target / shard.name)
            index |= dict.fromkeys(out, shard.name)
        (target / "config.json").write_text(json.dumps(config, indent=1))
        (target / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
        for name in ("generation_config.json", "tokenizer.json", "tokenizer_config.json"):
            shutil.copy(folder / name, target / name)
        return (f"symmetric groups of {group}; " if bits == 4 else "") + "embedding and head bf16"


if __name__ == "__main__":
    _preload()
    serve(Engine)
