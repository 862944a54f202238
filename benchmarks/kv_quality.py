"""What each type of KV cache costs: perplexity and KL to an f32 cache on real conversations, bytes, time of decode.

    python -m benchmarks.kv_quality                  # some five minutes; needs the extras demo and bench
    python -m benchmarks.kv_quality --scales         # scales that an fp8 cache could have, on the oracle

Quality: SmolLM2-135M-Instruct with float activations on the best tier, the beginnings of ShareGPT conversations in
its chat template. The type of the cache is all that differs, and what attention multiplies with it. Products that round
activations to bf16 make much of a small difference, so the KL is given with products in f32 as well.
Time: decode attention over 4,096 tokens at the shapes of models, enough copies of the cache in turns that each comes
from memory; rounds of all types one after the other, the best of each beside the best of bf16.
Writes benchmarks/results/kv-NAME.json and the same as Markdown. Use an otherwise idle machine for the times.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np

from .peers.__main__ import commit
from .peers.measure import machine
from .quality import BLOCK, RESULTS, Divergence, Floats, divergence, pelton_kind, pelton_logits, perplexity

TYPES = ("f32", "f16", "bf16", "int8", "fp8")
MODELS = ("smollm2-135m", "llama-3.1-8b")
CONTEXT = 4096
Row = dict[str, Any]


def conversations(count: int, tokens: int) -> list[list[int]]:
    """The first tokens of conversations that have as many."""
    from pelton.bench.workloads import _complete_items, _package
    from pelton.build import build
    from pelton.config import EngineConfig

    built = build(EngineConfig(max_num_seqs=1, max_model_len=64))
    assert built.tokenizer is not None
    found: list[list[int]] = []
    with _package().open_dataset("rb") as file:
        items = _complete_items(file.read(16 << 20).decode("utf-8", "ignore"))
    roles = {"human": "user", "gpt": "assistant"}
    for item in items:
        turns = item["conversations"]
        if len(found) < count and turns and all(turn["from"] in roles for turn in turns):
            messages = [{"role": roles[turn["from"]], "content": turn["value"]} for turn in turns]
            ids = built.tokenizer.encode_chat(messages)
            if len(ids) >= tokens:
                found.append(ids[:tokens])
    built.close()
    return found


class Quality:
    """Sums over texts of one kind of cache."""

    def __init__(self) -> None:
        self.loss: list[float] = []
        self.from_f32: list[Divergence] = []

    def add(self, want: Floats, got: Floats, tokens: list[int]) -> None:
        self.loss.append(float(np.log(perplexity(got, tokens))))
        self.from_f32.append(divergence(want, got))

    def row(self) -> Row:
        """kl: the mean over texts and its standard error."""
        means = [d.mean for d in self.from_f32]
        error = statistics.stdev(means) / len(means) ** 0.5 if len(means) > 1 else None
        return {
            "perplexity": float(np.exp(statistics.mean(self.loss))), "kl": statistics.mean(means), "kl_error": error,
            "same_top": statistics.mean(d.same_top for d in self.from_f32),
        }  # fmt: skip


def quality(texts: list[list[int]], threads: int) -> dict[str, Row]:
    from pelton.build import plan
    from pelton.checkpoint import resolve_model
    from pelton.config import EngineConfig

    found = {kind: (Quality(), Quality()) for kind in TYPES}
    for tokens in texts:
        for way, options in enumerate(({"activations": "float"}, pelton_kind("f32"))):
            want: Any = None
            for kind, totals in found.items():
                got = pelton_logits(resolve_model(""), tokens, threads, kv_cache_dtype=kind, **options)
                want = got if want is None else want
                totals[way].add(want, got, tokens)
        print(".", end="", flush=True)
    print()
    rows = {}
    for kind, (total, in_f32) in found.items():
        size, other = plan(EngineConfig(kv_cache_dtype=kind)).ledger.kv_bytes_per_token, in_f32.row()
        rows[kind] = {"bytes_per_token": size, **total.row()}
        rows[kind] |= {f"f32_products_{name}": other[name] for name in ("kl", "kl_error")}
    return rows


# ------------------------------------------------------------------ time


def decode_seconds(kind: str, model: str, threads: int) -> float:
    """Of attention for one sequence over a cache that lies in memory."""
    from pelton.backends.cpu.executor import choose_isa
    from pelton.bench import kernels
    from pelton.bench.shapes import MODELS as SHAPES
    from pelton.graph import BF16, E4M3, F16, F32, I8, CacheType

    shape = SHAPES[model]
    types = {"f32": F32, "f16": F16, "bf16": BF16, "int8": I8, "fp8": E4M3}
    cache = CacheType(shape.kv_heads, shape.head_dim, types[kind])
    size = round(cache.token_bytes) * CONTEXT
    graph = kernels._attention(shape, cache)
    q = shape.heads * shape.head_dim
    case = kernels.Case(shape, "attention_decode", "attention_decode", kind, CONTEXT, q, (1,), graph, size, CONTEXT)
    (point,) = kernels._measure(case, "dram", choose_isa(None), kernels.Settings(threads=threads, seconds=0.3))
    return point.seconds


def decode_times(rounds: int, threads: int) -> list[Row]:
    rows = []
    for model in MODELS:
        seconds: dict[str, list[float]] = {kind: [] for kind in TYPES}
        for _ in range(rounds):
            for kind in TYPES:
                seconds[kind].append(decode_seconds(kind, model, threads))
        for kind, of in seconds.items():
            to_bf16 = min(of) / min(seconds["bf16"])
            rows.append({"type": kind, "model": model, "context": CONTEXT, "to_bf16": to_bf16, "seconds": of})
    return rows


# ------------------------------------------------------------------ scales of fp8


def rounded(x: Floats, scale: Any) -> Floats:
    import ml_dtypes

    scale = np.where(scale > 0, scale, np.float32(1)).astype(np.float32)
    return np.clip(x / scale, -448, 448).astype(ml_dtypes.float8_e4m3fn).astype(np.float32) * scale


def largest(x: Floats) -> Floats:
    return np.abs(x).max(axis=-1, keepdims=True)


def best_of_eight(x: Floats) -> Floats:
    """Of scales that make the largest number 448 to 240, which are E4M3 themselves, that with the least squares."""
    tried = [rounded(x, largest(x) / np.float32(top)) for top in (448, 416, 384, 352, 320, 288, 256, 240)]
    errors = np.stack([((y - x) ** 2).sum(axis=-1) for y in tried])
    best: Floats = np.take_along_axis(np.stack(tried), errors.argmin(axis=0)[None, ..., None], axis=0)[0]
    return best


def int8(x: Floats) -> Floats:
    scale = largest(x) / np.float32(127)
    return (np.rint(x / np.where(scale > 0, scale, np.float32(1))) * scale).astype(np.float32)


#: What becomes of heads [tokens, kv_heads, head_dim] in a cache.
SCALES: dict[str, Callable[[Floats], Floats]] = {
    "f32": lambda x: x,
    "int8, largest / 127": int8,
    "fp8 without scales": lambda x: rounded(x, np.float32(1)),
    "fp8, powers of two": lambda x: rounded(x, np.exp2(np.ceil(np.log2(largest(x) / 448)))),
    "fp8, largest / 448": lambda x: rounded(x, largest(x) / np.float32(448)),
    "fp8, best of eight": best_of_eight,
}


def scales(texts: list[list[int]]) -> dict[str, Row]:
    """Every kind of scale in the oracle, all else in f32."""
    from pelton.backends.base import Batch, SampleSpec, ScheduledSequence
    from pelton.build import build
    from pelton.config import EngineConfig, SamplingParams
    from pelton.graph import ops

    length = len(texts[0])
    config = EngineConfig(
        device="reference", dtype="f32", kv_cache_dtype="f32", max_num_seqs=length, max_num_batched_tokens=length,
        max_model_len=length, kv_cache_memory=1 << 28,
    )  # fmt: skip
    built = build(config)
    spec = SampleSpec(SamplingParams(temperature=0.0), (), (), 0)
    found = {name: Quality() for name in SCALES}
    write = ops._kv_write
    for tokens in texts:
        want: Any = None
        for name, total in found.items():

            def changed(attrs: Any, cache: Any, k: Any, v: Any, slots: Any, change: Any = SCALES[name]) -> Any:
                k, v = (change(x.reshape(len(x), cache.shape[3], -1)).reshape(x.shape) for x in (k, v))
                return write(attrs, cache, k, v, slots)

            batch = Batch((ScheduledSequence("a", tuple(tokens), 0, tuple(range(-(-length // BLOCK))), spec),))
            with patch.object(ops, "_kv_write", changed):
                got = np.array(built.executor.logits(batch, every=True))  # type: ignore[attr-defined]
            want = got if want is None else want
            total.add(want, got, tokens)
        print(".", end="", flush=True)
    print()
    built.close()
    return {name: total.row() for name, total in found.items()}


# ------------------------------------------------------------------ the run


def markdown(found: dict[str, Row], times: list[Row], about: str) -> str:
    head = ["KV type", "perplexity", "mean KL to f32", "same top token"]
    head[1:1] = ["bytes per token"] if times else []
    head[4:4] = ["mean KL, products in f32"] if times else []
    head += [f"decode attention to bf16, {model}" for model in MODELS] if times else []
    lines = [
        f"### {'Types of KV cache' if times else 'Scales of an fp8 KV cache'}, SmolLM2-135M-Instruct",
        "",
        "| " + " | ".join(head) + " |",
        "|---" * len(head) + "|",
    ]
    for kind, row in found.items():
        error = "" if row["kl_error"] is None else f" ± {row['kl_error']:.5f}"
        cells = [kind, f"{row['perplexity']:.3f}", f"{row['kl']:.5f}{error}", f"{row['same_top']:.2%}"]
        cells[1:1] = [f"{row['bytes_per_token']:,}"] if times else []
        if times:
            cells.insert(4, f"{row['f32_products_kl']:.7f}")
        cells += [f"{t['to_bf16']:.2f}" for t in times if t["type"] == kind]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", about, ""])


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.kv_quality",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--scales", action="store_true", help="kinds of scales instead of types")
    parser.add_argument("--texts", type=int, default=8, help="conversations (default 8)")
    parser.add_argument("--tokens", type=int, default=1024, help="of each (default 1,024)")
    parser.add_argument("--rounds", type=int, default=5, help="of timing (default 5)")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--output", type=Path, default=RESULTS)
    asked = parser.parse_args()
    from pelton.backends.cpu import _native

    cpu = str(_native.cpu_features()["model_name"])
    command = "python -m benchmarks.kv_quality" + " --scales" * asked.scales
    command += f" --texts {asked.texts} --tokens {asked.tokens}"
    command += f" --rounds {asked.rounds} --threads {asked.threads}" * (not asked.scales)
    where = {"cpu": cpu, "command": command, "threads": asked.threads, **machine(), **commit()}
    with tempfile.TemporaryDirectory() as folder:
        os.environ["PELTON_CACHE"] = folder
        texts = conversations(asked.texts, asked.tokens)
        found = scales(texts) if asked.scales else quality(texts, asked.threads)
    times = [] if asked.scales else decode_times(asked.rounds, asked.threads)
    about = f"{len(texts)} conversations of {asked.tokens:,} tokens, ± the standard error over them"
    if times:
        about += f"; decode over {CONTEXT:,} tokens, the best of {asked.rounds} rounds with --threads {asked.threads}"
    about += f". {cpu}, commit {where['commit']}, {date.today()}: `{command}`"
    text = markdown(found, times, about)
    print(text)
    name = ("kv-scales-" if asked.scales else "kv-") + "-".join(cpu.lower().split())
    results = {"machine": where, "date": str(date.today()), "quality": found, "decode": times}
    asked.output.mkdir(parents=True, exist_ok=True)
    (asked.output / f"{name}.json").write_text(json.dumps(results, indent=1) + "\n")
    (asked.output / f"{name}.md").write_text(text)


if __name__ == "__main__":
    main()
