"""What the engine's features bring, on the demo model (SmolLM2-135M-Instruct): ratios of interleaved runs.

- batching: in-flight beside dynamic and static, ShareGPT's lengths, all requests at once; in Q4_1 and in bf16
- prefix caching: time to the first token behind a system prompt of 1,000 tokens, found in the cache, restored from a
  file, and computed
- speculation: time per token where an answer repeats its prompt, and where it does not
- a draft model: the same for the model in f32, with drafts of its own Q4_1 file
- chunked prefill: the worst gap between two tokens while prompts of 1,500 tokens arrive
- sampling: microseconds per row
- LoRA: a step with room for adapters, and with adapters in use, beside one without
- steps that are decided on while the one before them runs
- the engine's own Python time per step

Writes benchmarks/results/engine-NAME.json and the same as Markdown; with --parts, under a name that says which. Use an
otherwise idle machine. Needs the extras demo and bench.

Examples:
  python -m benchmarks.engine                       # all of it, some twenty minutes
  python -m benchmarks.engine --parts speculation --rounds 5
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from typing import Any

from pelton import LLM, EngineConfig, SamplingParams
from pelton.metrics import percentile, pooled_itl
from tests.engine.test_engine import measure_step_seconds

from .peers.__main__ import commit
from .peers.catalogue import MODELS
from .peers.measure import ROOT, machine
from .peers.weights import write_folder

RESULTS = ROOT / "benchmarks" / "results"
TEXT = (ROOT / "tests" / "data" / "alice.txt").read_text(encoding="utf-8")
Row = dict[str, Any]


def spread(values: list[float]) -> Row:
    """Median and half the range."""
    return {"median": statistics.median(values), "half_range": (max(values) - min(values)) / 2}


def ratios(of: list[float], to: list[float]) -> Row:
    return spread([a / b for a, b in zip(of, to, strict=True)])


@contextmanager
def bf16_folder() -> Iterator[str]:
    """The demo model with its values as bf16: decoding a few sequences is bound by memory, as large models are."""
    with tempfile.TemporaryDirectory() as folder:
        write_folder(MODELS["smollm2"], Path(folder))
        yield folder


def batching(rounds: int) -> list[Row]:
    """ShareGPT's lengths, 32 sequences at once, all requests there from the start."""
    with bf16_folder() as folder:
        return [row for name, model in (("bf16", folder), ("Q4_1", "")) for row in _batching(rounds, name, model, 32)]


def _batching(rounds: int, name: str, model: str, seats: int) -> list[Row]:
    from pelton.bench.replay import replay
    from pelton.bench.workloads import WorkloadSpec, make

    kinds: tuple[Any, ...] = ("inflight", "dynamic", "static")
    runs: dict[str, list[Any]] = {kind: [] for kind in kinds}
    with LLM(model, max_num_seqs=seats, max_model_len=2048) as llm:
        parts = llm._parts
        spec = WorkloadSpec("sharegpt", num_prompts=5 * seats)
        requests = make(
            spec, vocab_size=parts.vocab_size, tokenizer=parts.tokenizer, max_model_len=llm.max_model_len
        ).requests  # fmt: skip
        for _ in range(rounds):
            for kind in kinds:
                config = EngineConfig(max_num_seqs=seats, batching=kind, max_model_len=2048)
                runs[kind].append(replay(LLM.from_parts(parts, config).engine, requests, [0.0] * len(requests)))
    rows = []
    for kind in kinds:
        rate = [r.output_tokens / r.seconds for r in runs[kind]]
        static = [r.output_tokens / r.seconds for r in runs["static"]]
        ttft = [m.ttft for r in runs[kind] for m in r.requests]
        itl = [gap for r in runs[kind] for gap in pooled_itl(r.requests)]
        rows.append({
            "what": f"{name}, {seats} sequences, {kind}", "output_tokens_per_s": spread(rate),
            "to_static": ratios(rate, static),
            "running_mean": statistics.fmean([s.num_running for r in runs[kind] for s in r.steps]),
            "ttft_p50_ms": 1e3 * percentile(ttft, 50), "ttft_p99_ms": 1e3 * percentile(ttft, 99),
            "itl_p50_ms": 1e3 * percentile(itl, 50), "itl_p99_ms": 1e3 * percentile(itl, 99),
        })  # fmt: skip
    return rows


def prefix(rounds: int) -> list[Row]:
    """Seconds to the first token of a question behind 1,000 tokens."""
    first = SamplingParams(temperature=0, max_tokens=1)
    times: dict[str, list[float]] = {"computed": [], "found": [], "from a file": []}
    with tempfile.TemporaryDirectory() as folder, LLM(max_model_len=2048) as llm:
        assert llm.tokenizer is not None
        system = llm.tokenizer.encode(TEXT)[:1000]
        file = Path(folder) / "system"
        llm.save_prefix(system, file)

        def ask(name: str, llm: LLM, number: int) -> None:
            question = llm.tokenizer.encode(f" Question {number}: who is Alice?")  # type: ignore[union-attr]
            (output,) = llm.generate([[*system, *question]], first)
            assert output.metrics is not None and output.metrics.ttft is not None
            times[name].append(output.metrics.ttft)

        with LLM(max_model_len=2048, enable_prefix_caching=False) as without:
            for number in range(rounds):
                ask("computed", without, number)
                ask("found", llm, number)
                restarted = LLM.from_parts(without._parts)
                start = time.perf_counter()
                restarted.load_prefix(file)
                loading = time.perf_counter() - start
                ask("from a file", restarted, number)
                times["from a file"][-1] += loading
    return [
        {"what": f"prompt of 1,000 tokens {name}", "ttft_ms": spread([1e3 * t for t in values]),
         "computed_to_this": ratios(times["computed"], values)}
        for name, values in times.items()
    ]  # fmt: skip


def speculation(rounds: int) -> list[Row]:
    """Seconds per token, with drafts of up to 4 tokens and without, alone and eight at once."""
    passage = TEXT[2000:3500]
    tasks = {
        "copying a passage": f"Repeat this text word by word:\n\n{passage}\n\nThe text again:\n\n{passage[:200]}",
        "summarising": f"{passage}\n\nSummary, in the words of the text:",
        "writing freely": "Write a story about a lighthouse.",
    }
    params = SamplingParams(temperature=0, max_tokens=160, ignore_eos=True)
    rows = []
    with LLM(max_model_len=2048) as off, LLM(max_model_len=2048, num_speculative_tokens=4) as on:
        for name, prompt in tasks.items():
            for count in (1, 8):
                rows.append(with_and_without(f"{name}, {count} at once", off, on, [[prompt] * count], params, rounds))
    return rows


def with_and_without(
    what: str, off: LLM, on: LLM, batches: list[list[str]], params: SamplingParams, rounds: int
) -> Row:
    """TPOT of a model with drafts beside that of one without, which must say the same."""
    tpot: dict[bool, list[float]] = {False: [], True: []}
    before = on.get_stats()
    for _ in range(rounds):
        for prompts in batches:
            tokens = []
            for speculates, llm in ((False, off), (True, on)):
                outputs = llm.generate(prompts, params)
                tpot[speculates].append(
                    statistics.mean(o.metrics.tpot for o in outputs if o.metrics and o.metrics.tpot)
                )
                tokens.append([list(o.outputs[0].token_ids) for o in outputs])
            assert tokens[0] == tokens[1]
    after = on.get_stats()
    drafts = after.draft_tokens - before.draft_tokens
    return {
        "what": what,
        "tpot_ms_without": spread([1e3 * t for t in tpot[False]]),
        "tpot_ms_with": spread([1e3 * t for t in tpot[True]]),
        "speedup": ratios(tpot[False], tpot[True]),
        "accepted": (after.accepted_tokens - before.accepted_tokens) / max(drafts, 1),
    }


def draft_model(rounds: int) -> list[Row]:
    """Seconds per token of the model in f32, with drafts of 3 tokens from its own Q4_1 file and without."""
    prompts = ["Write a story about a lighthouse.", "Explain how a transistor works.", TEXT[2000:3500]]
    rows = []
    with bf16_folder() as folder:
        options: Row = {"dtype": "f32", "max_model_len": 1024}
        with (
            LLM(folder, **options) as off,
            LLM(folder, **options, speculative_model="", num_speculative_tokens=3) as on,
        ):
            for temperature, count in ((0.0, 1), (1.0, 1), (0.0, 3)):
                params = SamplingParams(temperature=temperature, seed=1, max_tokens=128, ignore_eos=True)
                batches = [prompts[i : i + count] for i in range(0, 3, count)]
                what = f"f32 with drafts of its Q4_1, temperature {temperature:g}, {count} at once"
                rows.append(with_and_without(what, off, on, batches, params, rounds))
    return rows


def steps_ahead(rounds: int) -> list[Row]:
    """Milliseconds per token with and without deciding on the next step while one runs."""
    rows = []
    options: Row = {"max_model_len": 1024, "enable_prefix_caching": False}
    with LLM(**options, async_scheduling=False) as off, LLM(**options, async_scheduling=True) as on:
        for count, tokens in ((1, 200), (16, 80), (64, 40)):
            prompts = [[5 + i % 1000] * 16 for i in range(count)]
            params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
            times: dict[bool, list[float]] = {False: [], True: []}
            for _ in range(3 * rounds):
                for ahead, llm in ((False, off), (True, on)):
                    start = time.perf_counter()
                    llm.generate(prompts, params)
                    times[ahead].append(1e3 * (time.perf_counter() - start) / tokens)
            rows.append({
                "what": f"{count} sequences", "ms_per_step_without": spread(times[False]),
                "ms_per_step_ahead": spread(times[True]), "speedup": ratios(times[False], times[True]),
            })  # fmt: skip
    return rows


def chunks(rounds: int) -> list[Row]:
    """Gaps between the tokens of four answers while a prompt of 1,500 tokens comes every half second."""
    rows = []
    sizes = (2048, 1024, 256, 64)
    llms = {size: LLM(max_model_len=2048, max_num_batched_tokens=size, enable_prefix_caching=False) for size in sizes}
    gaps: dict[int, list[list[float]]] = {size: [] for size in sizes}
    ttfts: dict[int, list[float]] = {size: [] for size in sizes}
    for _ in range(rounds):
        for size, llm in llms.items():
            config = EngineConfig(max_model_len=2048, max_num_batched_tokens=size, enable_prefix_caching=False)
            engine = LLM.from_parts(llm._parts, config).engine
            long = (llm.tokenizer.encode(TEXT) if llm.tokenizer else [])[:1500]
            answer = SamplingParams(temperature=0, max_tokens=300, ignore_eos=True)
            for i in range(4):
                engine.add_request(f"answer {i}", long[i * 10 : i * 10 + 50], answer)
            done, due, number = [], time.monotonic() + 0.3, 0
            while engine.has_unfinished:
                if number < 4 and time.monotonic() >= due:
                    once = SamplingParams(temperature=0, max_tokens=1)
                    engine.add_request(f"long {number}", long, once)
                    number, due = number + 1, due + 0.5
                done += [o for o in engine.step() if o.metrics is not None]
            gaps[size].append(pooled_itl(o.metrics for o in done if o.request_id.startswith("answer") and o.metrics))
            ttfts[size] += [o.metrics.ttft or 0.0 for o in done if o.request_id.startswith("long") and o.metrics]
    for size in sizes:
        rows.append({
            "what": f"max_num_batched_tokens {size}",
            "worst_itl_ms": spread([1e3 * max(g) for g in gaps[size]]),
            "itl_p50_ms": spread([1e3 * percentile(g, 50) for g in gaps[size]]),
            "ttft_of_long_prompts_ms": spread([1e3 * t for t in ttfts[size]]),
        })  # fmt: skip
    for llm in llms.values():
        llm.close()
    return rows


def python_time(rounds: int) -> list[Row]:
    """Microseconds of a decode step that are the engine's, on an executor that does nothing."""
    times = {count: [1e6 * measure_step_seconds(count, 100) for _ in range(rounds)] for count in (1, 64, 512)}
    return [{"what": f"{count} sequences", "us_per_step": spread(values)} for count, values in times.items()]


def sampling(rounds: int) -> list[Row]:
    """Microseconds per row of the model's own logits, one row, one thread: native, and the NumPy definition."""
    from pelton.backends.base import Batch, SampleSpec, ScheduledSequence
    from pelton.engine.sampling import HostSampler

    history = {"repetition_penalty": 1.1, "frequency_penalty": 0.1}
    cases: dict[str, Row] = {
        "greedy": {}, "temperature": {"temperature": 1.0}, "top-k 50": {"temperature": 1.0, "top_k": 50},
        "top-p 0.9": {"temperature": 1.0, "top_p": 0.9}, "typical-p 0.9": {"temperature": 1.0, "typical_p": 0.9},
        "penalties over 700 tokens, greedy": history, "greedy, logprobs 5": {"logprobs": 5},
    }  # fmt: skip
    rows = []
    with LLM(max_model_len=1024, threads=1) as llm:
        assert llm.tokenizer is not None
        executor, text = llm._parts.executor, llm.tokenizer.encode(TEXT)[:700]
        blocks = tuple(range(-(-len(text) // 16)))
        asked = ScheduledSequence("a", tuple(text), 0, blocks, SampleSpec(SamplingParams(), text, [], 0))
        logits = executor.logits(Batch((asked,))).copy()
        for name, given in cases.items():
            params = SamplingParams(**({"temperature": 0.0} | given))
            spec = SampleSpec(params, text[:350], text[350:], 7)
            times: dict[str, list[float]] = {"native": [], "numpy": []}
            for _ in range(rounds):
                for kind, sampler, repeats in (("native", executor._sampler, 300), ("numpy", HostSampler(), 10)):
                    best = min(_seconds(sampler, logits, spec) for _ in range(repeats))
                    times[kind].append(1e6 * best)
            rows.append({"what": name, "native_us": spread(times["native"]), "numpy_us": spread(times["numpy"])})
    return rows


def lora(rounds: int) -> list[Row]:
    """Milliseconds of a step: without room for adapters, with room and nobody who uses one, with adapters of rank 16 of
    all linear layers."""
    import numpy as np

    from pelton.backends.base import Batch, SampleSpec, ScheduledSequence

    text = SampleSpec(SamplingParams(temperature=0), (), (), 0)
    rng = np.random.default_rng(0)
    rows = []
    with LLM(max_model_len=1024) as off, LLM(max_model_len=1024, enable_lora=True) as on:
        plain, roomy = off._parts.executor, on._parts.executor
        modules = [
            (module, table.type.in_features, width)
            for table in roomy.program.adapters
            for module, width in zip(table.modules, table.type.widths, strict=True)
        ]
        for slot in range(1, 5):
            weights = {
                module: (rng.standard_normal((16, cols)) / cols, rng.standard_normal((width, 16)) / 16)
                for module, cols, width in modules
            }
            roomy.set_adapter(slot, {m: (a.astype(np.float32), b.astype(np.float32)) for m, (a, b) in weights.items()})

        def step(count: int, tokens: int, computed: int, adapters: list[int]) -> Any:
            per = -(-(tokens + computed) // 16)
            ids = tuple(int(t) for t in rng.integers(100, 40_000, tokens))
            return Batch(tuple(
                ScheduledSequence(
                    str(i), ids, computed, tuple(range(i * per, (i + 1) * per)), text,
                    adapter=adapters[i % len(adapters)],
                )
                for i in range(count)
            ))  # fmt: skip

        for name, count, tokens, computed, repeats in (
            ("decode, 1 sequence", 1, 1, 128, 60), ("decode, 16 sequences", 16, 1, 128, 30),
            ("prefill, 4 prompts of 128 tokens", 4, 128, 0, 4), ("prefill, 1 prompt of 512 tokens", 1, 512, 0, 4),
        ):  # fmt: skip
            cases = {"without room": (plain, [0]), "no adapter": (roomy, [0]), "1 adapter": (roomy, [1])}
            if count > 1:
                cases["4 adapters"] = (roomy, [1, 2, 3, 4])
            times: dict[str, list[float]] = {case: [] for case in cases}
            for _ in range(rounds):
                seconds: dict[str, list[float]] = {case: [] for case in cases}
                for _ in range(repeats):
                    for case, (executor, adapters) in cases.items():
                        batch = step(count, tokens, computed, adapters)
                        seconds[case].append(executor.collect(executor.submit(batch)).stats.seconds)
                for case in cases:
                    times[case].append(1e3 * statistics.median(seconds[case]))
            rows += [
                {"what": f"{name}, {case}", "ms": spread(times[case]),
                 "to_without": ratios(times[case], times["without room"])}
                for case in cases
            ]  # fmt: skip
    return rows


def _seconds(sampler: Any, logits: Any, spec: Any) -> float:
    start = time.perf_counter()
    sampler(logits, [spec])
    return time.perf_counter() - start


PARTS: dict[str, Callable[[int], list[Row]]] = {
    "batching": batching, "prefix": prefix, "speculation": speculation, "draft_model": draft_model, "chunks": chunks,
    "sampling": sampling, "lora": lora, "steps_ahead": steps_ahead, "python_time": python_time,
}  # fmt: skip


def cell(value: Any) -> str:
    if isinstance(value, dict):
        return f"{cell(value['median'])} ± {cell(value['half_range'])}"
    return f"{value:,.3g}" if isinstance(value, float) and abs(value) < 1000 else f"{value:,.0f}"


def markdown(results: dict[str, list[Row]], about: str) -> str:
    lines = ["### The engine's features, SmolLM2-135M-Instruct", ""]
    for part, rows in results.items():
        columns = [key for key in rows[0] if key != "what"]
        lines += [f"| {part.replace('_', ' ')} | " + " | ".join(c.replace("_", " ") for c in columns) + " |"]
        lines += ["|---|" + "---|" * len(columns)]
        lines += [f"| {row['what']} | " + " | ".join(cell(row[c]) for c in columns) + " |" for row in rows]
        lines += [""]
    return "\n".join([*lines, about, ""])


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.engine", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=RESULTS)
    asked = parser.parse_args()
    from pelton.backends.cpu import _native

    cpu = str(_native.cpu_features()["model_name"])
    where = {"cpu": cpu, **machine(), **commit()}
    results = {}
    for part in asked.parts:
        print(part, flush=True)
        results[part] = PARTS[part](asked.rounds)
    about = f"{cpu}, commit {where['commit']}, {date.today()}; medians ± half the range of {asked.rounds} rounds."
    text = markdown(results, about)
    print(text)
    name = "engine-" + "-".join(cpu.lower().split())
    if set(asked.parts) != set(PARTS):
        name += "-" + "-".join(asked.parts)
    (asked.output / f"{name}.json").write_text(json.dumps({"machine": where, "results": results}, indent=1) + "\n")
    (asked.output / f"{name}.md").write_text(text)


if __name__ == "__main__":
    main()
