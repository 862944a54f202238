"""Pelton beside Hugging Face transformers, interleaved in one run on the same prompts and threads.

    python -m benchmarks.transformers_side_by_side [--model smollm2] [--model llama-1b] [--rounds 7]

Both engines take turns in every round, so that drift of a shared machine hits both; figures are medians
over rounds, ratios are medians of the rounds' ratios. Writes benchmarks/results/*.json.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import Any, Protocol

import numpy as np

RESULTS = Path(__file__).parent / "results"
PROMPT, DECODED = 512, 32  # tokens of a prefill, and of a decode that follows it
LLAMA_1B = {  # the shapes of Llama-3.2-1B; the weights are random
    "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
    "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 128256, "max_position_embeddings": 131072,
    "rope_theta": 500000.0, "rms_norm_eps": 1e-5, "tie_word_embeddings": True,
}  # fmt: skip


class Engine(Protocol):
    name: str

    def prefill(self, tokens: list[int]) -> None: ...
    def decode(self, count: int) -> None: ...


class Pelton:
    """The CPU executor, fed by hand: what is timed is exactly one step per call."""

    def __init__(self, name: str, model: str, threads: int) -> None:
        from pelton.build import build
        from pelton.config import EngineConfig

        self.name = name
        config = EngineConfig(model=model, threads=threads, max_num_seqs=1, max_model_len=2048, packed_cache=True)
        start = time.perf_counter()
        self.built = build(config)
        print(f"  {name}: ready in {time.perf_counter() - start:.1f} s", flush=True)
        self.bytes_per_step = 0.0
        self.position = 0
        self.token = 1

    def _step(self, tokens: list[int]) -> None:
        from pelton.backends.base import Batch, SampleSpec, ScheduledSequence
        from pelton.config import SamplingParams

        executor = self.built.executor
        blocks = tuple(range(-(-(self.position + len(tokens)) // executor.kv_spec.block_size)))
        spec = SampleSpec(SamplingParams(temperature=0.0), (), (), 0)
        batch = Batch((ScheduledSequence("a", tuple(tokens), self.position, blocks, spec),))
        output = executor.collect(executor.submit(batch))
        self.bytes_per_step = output.stats.bytes
        self.position += len(tokens)
        assert output.tokens[0] is not None
        self.token = output.tokens[0].token_id

    def prefill(self, tokens: list[int]) -> None:
        self.position = 0
        self._step(tokens)

    def decode(self, count: int) -> None:
        for _ in range(count):
            self._step([self.token])


class Transformers:
    """bf16, eager mode (no torch.compile), the default attention, a dynamic KV cache, greedy."""

    def __init__(self, name: str, model: Any) -> None:
        self.name = name
        self.model = model.eval()
        self.cache: Any = None
        self.token: Any = None

    def prefill(self, tokens: list[int]) -> None:
        import torch

        with torch.inference_mode():
            out = self.model(torch.tensor([tokens]), use_cache=True, logits_to_keep=1)
        self.cache, self.token = out.past_key_values, out.logits[:, -1:].argmax(-1)

    def decode(self, count: int) -> None:
        import torch

        with torch.inference_mode():
            for _ in range(count):
                out = self.model(self.token, past_key_values=self.cache, use_cache=True)
                self.cache, self.token = out.past_key_values, out.logits[:, -1:].argmax(-1)


def smollm2(threads: int, folder: Path) -> list[Any]:
    """The real GGUF (Q4_1) natively, and its weights dequantized to bf16 in both engines."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from pelton.checkpoint import open_checkpoint, resolve_model
    from pelton.graph.ops import f32

    path = resolve_model("")
    checkpoint = open_checkpoint(path)
    known = LlamaConfig().to_dict()
    fields = {k: v for k, v in checkpoint.config.items() if k in known or k == "rope_theta"}
    model = LlamaForCausalLM(LlamaConfig(**fields)).to(torch.bfloat16)
    state = {n: torch.from_numpy(np.array(f32(t.read()))).to(torch.bfloat16) for n, t in checkpoint.tensors.items()}
    if "lm_head.weight" not in state:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model.load_state_dict(state, strict=True)
    model.save_pretrained(folder)
    return [
        Pelton("pelton Q4_1", str(path), threads),
        Pelton("pelton bf16", str(folder), threads),
        Transformers("transformers bf16", model),
    ]


def llama_1b(threads: int, folder: Path) -> list[Any]:
    """Random bf16 weights at Llama-3.2-1B's shapes in both engines."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    model = LlamaForCausalLM(LlamaConfig(**LLAMA_1B))
    torch.set_default_dtype(torch.float32)
    model.save_pretrained(folder)
    return [Pelton("pelton bf16", str(folder), threads), Transformers("transformers bf16", model)]


MODELS = {"smollm2": smollm2, "llama-1b": llama_1b}


def measure(engines: list[Any], vocab: int, rounds: int) -> dict[str, dict[str, list[float]]]:
    """Seconds per round: engine -> work -> list."""
    tokens = [int(t) for t in np.random.default_rng(0).integers(10, vocab, PROMPT)]
    times: dict[str, dict[str, list[float]]] = {e.name: {"prefill": [], "decode": []} for e in engines}
    for round_ in range(rounds + 1):
        for engine in engines:
            time.sleep(0.05)  # let the other engine's threads go to sleep
            for work, run in (
                ("prefill", lambda e=engine: e.prefill(tokens)),
                ("decode", lambda e=engine: e.decode(DECODED)),
            ):
                start = time.perf_counter()
                run()
                seconds = time.perf_counter() - start
                if round_:  # the first round warms up
                    times[engine.name][work].append(seconds)
        print(f"  round {round_}/{rounds}", end="\r", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return times


def report(times: dict[str, dict[str, list[float]]], engines: list[Any], peak: float) -> list[dict[str, Any]]:
    base = engines[-1].name
    rows = []
    for engine in engines:
        for work, count in (("prefill", PROMPT), ("decode", DECODED)):
            seconds = times[engine.name][work]
            ratios = [b / s for b, s in zip(times[base][work], seconds, strict=True)]
            row: dict[str, Any] = {
                "engine": engine.name,
                "work": f"prefill {PROMPT}" if work == "prefill" else f"decode at {PROMPT}",
                "tokens_per_s": count / statistics.median(seconds),
                "tokens_per_s_min": count / max(seconds),
                "tokens_per_s_max": count / min(seconds),
                f"ratio_to_{base.replace(' ', '_')}": statistics.median(ratios),
            }
            if work == "decode" and isinstance(engine, Pelton):
                row["mbu"] = engine.bytes_per_step * count / statistics.median(seconds) / peak
            rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", choices=list(MODELS), help="default: all")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/transformers-<machine>.json")
    args = parser.parse_args()

    import torch
    import transformers

    from pelton.backends.cpu import _native
    from pelton.backends.cpu.executor import choose_isa
    from pelton.backends.cpu.peaks import measured_peaks

    torch.set_num_threads(args.threads)
    isa = choose_isa(None)
    peaks = measured_peaks(isa, args.threads, fresh=True)
    results: dict[str, Any] = {
        "command": "python -m " + " ".join(["benchmarks.transformers_side_by_side", *sys.argv[1:]]),
        "date": date.today().isoformat(),
        "commit": subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True
        ).stdout.strip(),
        "cpu": _native.cpu_features().get("model_name"),
        "isa": isa,
        "threads": args.threads,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "peaks": peaks,
        "models": {},
    }
    for name in args.model or MODELS:
        print(name, flush=True)
        with tempfile.TemporaryDirectory() as folder:
            engines = MODELS[name](args.threads, Path(folder))
            times = measure(engines, engines[-1].model.config.vocab_size, args.rounds)
        rows = report(times, engines, peaks["read_bandwidth"])
        results["models"][name] = rows
        for row in rows:
            print(
                "  " + "  ".join(f"{v:9.3f}" if isinstance(v, float) else f"{v:18}" for v in row.values()), flush=True
            )
        for engine in engines[:-1]:
            engine.built.close()
        del engines
    machine = str(results["cpu"]).lower().replace(" ", "-")
    output = args.output or RESULTS / f"transformers-{machine}.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(results, indent=1) + "\n")
    print(output)


if __name__ == "__main__":
    main()
