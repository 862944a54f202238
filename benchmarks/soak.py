"""The engine under everything at once for minutes, in as little memory as it can run in: does it stay as it was?

Requests of all kinds come faster than they are served, in bursts: greedy and sampled, with several answers, beams,
grammars, log-probabilities, stop strings, tenants of the prefix cache, cancellations, deadlines. The KV cache holds a
few of them. Every few seconds the process's memory is written down. It fails if memory grows, a request does not end,
an answer is not the one that the same request gets alone, or the KV books are wrong.

Writes benchmarks/results/soak-NAME.json and a plot. Needs the extras demo and bench.

Examples:
  python -m benchmarks.soak                  # ten minutes
  python -m benchmarks.soak --minutes 1
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import time
from collections import Counter
from pathlib import Path
from typing import Any

from pelton import AsyncLLM, SamplingParams
from pelton.outputs import RequestOutput

from .peers.__main__ import commit
from .peers.measure import ROOT, machine

RESULTS = ROOT / "benchmarks" / "results"
TEXT = (ROOT / "tests" / "data" / "alice.txt").read_text(encoding="utf-8")
SCHEMA = {"type": "object", "properties": {"who": {"type": "string", "maxLength": 20}}, "required": ["who"]}
#: Requests that are there at once, and the tokens that the KV cache holds: two of the longest.
CLIENTS, KV_TOKENS = 24, 1024
Row = dict[str, Any]


def rss() -> int:
    """Bytes of this process that are in memory and in no file."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    return 1024 * int(fields["RssAnon"].split()[0])


def params_of(draw: random.Random, kind: str) -> SamplingParams:
    length, seed = draw.randrange(1, 64), draw.randrange(1000)
    given: dict[str, Row] = {
        "greedy": {"temperature": 0},
        "sampled": {"seed": seed, "top_p": 0.9, "repetition_penalty": 1.1},
        "several": {"seed": seed, "n": draw.randrange(2, 5)},
        "beams": {"use_beam_search": True, "n": 2, "best_of": 3},
        "json": {"temperature": 0, "structured_outputs": {"json": SCHEMA}},
        "scored": {"temperature": 0, "logprobs": 3, "prompt_logprobs": 1},
        "stop": {"temperature": 0, "stop": [" the", "\n\n"]},
    }
    return SamplingParams(**({"max_tokens": length} | given[kind]))


KINDS = ("greedy", "sampled", "several", "beams", "json", "scored", "stop")


def plain(output: RequestOutput) -> list[list[int]]:
    return [list(answer.token_ids) for answer in output.outputs]


async def soak(llm: AsyncLLM, minutes: float, seed: int) -> Row:
    draw = random.Random(seed)
    # A few requests come again and again: what they got the first time, alone, is what they must always get.
    known = []
    for number in range(40):
        kind = KINDS[number % len(KINDS)]
        start, length = draw.randrange(len(TEXT) - 2000), draw.randrange(20, 1200)
        prompt = {"prompt": TEXT[start : start + length], "cache_salt": draw.choice(["", "tenant"])}
        params = params_of(draw, kind)
        known.append((kind, prompt, params, plain(await llm.generate(prompt, params))))
    counts: Counter[str] = Counter()
    samples: list[Row] = []
    end = time.monotonic() + 60 * minutes
    start_time = time.monotonic()

    async def client(index: int) -> None:
        own = random.Random(f"{seed} {index}")
        while time.monotonic() < end:
            kind, prompt, params, expected = own.choice(known)
            fate = own.random()
            priority = own.randrange(-1, 2)
            if fate < 0.15:  # leaves in the middle
                task = asyncio.create_task(llm.generate(prompt, params, priority=priority))
                await asyncio.sleep(own.random() * 2)
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
                counts["cancelled"] += 1
            elif fate < 0.25:
                output = await llm.generate(prompt, params, timeout=own.random() * 2)
                late = any(answer.finish_reason == "timeout" for answer in output.outputs)
                counts["timeout" if late else kind] += 1
                if not late and plain(output) != expected:
                    counts["wrong"] += 1
            else:
                output = await llm.generate(prompt, params, priority=priority)
                counts[kind] += 1
                if plain(output) != expected:
                    counts["wrong"] += 1
            if own.random() < 0.05:
                await asyncio.sleep(own.random() * 3)  # a lull, and then many come at once

    async def watch() -> None:
        while time.monotonic() < end:
            stats = llm.get_stats()
            samples.append({
                "seconds": round(time.monotonic() - start_time, 1), "rss_mib": round(rss() / 2**20, 2),
                "running": stats.num_running, "waiting": stats.num_waiting,
                "kv_use": round(1 - stats.num_free_blocks / stats.num_blocks, 3), "steps": stats.steps,
            })  # fmt: skip
            print(samples[-1], flush=True)
            await asyncio.sleep(5)

    before = llm.get_stats()
    watcher = asyncio.create_task(watch())
    await asyncio.wait_for(asyncio.gather(*(client(i) for i in range(CLIENTS))), 60 * minutes + 120)
    await watcher
    await asyncio.sleep(1.0)  # idle: the engine checks its books
    after = llm.get_stats()
    return {
        "requests": dict(sorted(counts.items())), "samples": samples, "steps": after.steps - before.steps,
        "preemptions": after.preemptions - before.preemptions, "output_tokens": after.output_tokens,
        "cached_tokens": after.cached_tokens, "accepted_drafts": after.accepted_tokens,
        "blocks_lost": after.num_blocks - after.num_free_blocks, "unfinished": after.num_running + after.num_waiting,
    }  # fmt: skip


def growth(samples: list[Row]) -> float:
    """MiB per minute by the medians of the second and the last quarter: the first one warms up."""
    quarter = max(len(samples) // 4, 1)
    early, late = samples[quarter : 2 * quarter] or samples[:1], samples[-quarter:]

    def median(rows: list[Row], key: str) -> float:
        return float(sorted(row[key] for row in rows)[len(rows) // 2])

    minutes = (median(late, "seconds") - median(early, "seconds")) / 60
    return (median(late, "rss_mib") - median(early, "rss_mib")) / minutes if minutes else 0.0


def plot(result: Row, file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    samples = result["samples"]
    seconds = [row["seconds"] for row in samples]
    figure, (memory, load) = pyplot.subplots(2, 1, sharex=True, figsize=(8, 5), layout="constrained")
    memory.plot(seconds, [row["rss_mib"] for row in samples], color="#0b5394")
    top = 1.2 * max(row["rss_mib"] for row in samples)
    memory.set(ylabel="memory, MiB", ylim=(0, top), title="Soak at the memory limit")
    load.plot(seconds, [row["running"] for row in samples], label="running", color="#0b5394")
    load.plot(seconds, [row["waiting"] for row in samples], label="waiting", color="#b45f06")
    load.set(ylabel="requests", xlabel="seconds")
    load.legend()
    figure.savefig(file, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.soak", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--num-speculative-tokens", type=int, default=0)
    parser.add_argument("--growth", type=float, default=0.5, help="MiB per minute that are still called flat")
    parser.add_argument("--output", type=Path, default=RESULTS)
    asked = parser.parse_args()
    from pelton.backends.cpu import _native

    async def run() -> Row:
        options = {
            "max_num_seqs": 12, "kv_cache_dtype": "int8", "async_scheduling": True,
            "num_speculative_tokens": asked.num_speculative_tokens,
        }  # fmt: skip
        async with AsyncLLM(max_model_len=512, kv_cache_memory=KV_TOKENS * 12_240, **options) as llm:
            return await soak(llm, asked.minutes, asked.seed)

    cpu = str(_native.cpu_features()["model_name"])
    where = {"cpu": cpu, "processes": os.cpu_count(), **machine(), **commit()}  # before: somebody may commit meanwhile
    result = asyncio.run(run())
    result |= {"growth_mib_per_minute": round(growth(result["samples"]), 3), "minutes": asked.minutes}
    result["machine"] = where
    name = "soak-" + "-".join(cpu.lower().split())
    (asked.output / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    plot(result, asked.output / f"{name}.png")
    print(json.dumps({key: value for key, value in result.items() if key not in ("samples", "machine")}, indent=1))
    problems = [
        what for what, wrong in (
            ("answers differ from those of the same requests alone", result["requests"].get("wrong")),
            ("blocks were lost", result["blocks_lost"]),
            ("requests did not end", result["unfinished"]),
            ("memory grows", result["growth_mib_per_minute"] > asked.growth),
            ("nobody was preempted: this was no memory limit", not result["preemptions"]),
        ) if wrong
    ]  # fmt: skip
    if problems:
        raise SystemExit("; ".join(problems))


if __name__ == "__main__":
    main()
