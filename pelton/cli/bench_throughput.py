"""``pelton bench throughput``: how many tokens per second a workload gets, and how long its requests wait."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import click

from ..errors import PeltonError
from . import options
from .bench_workload import workload

if TYPE_CHECKING:
    from rich.console import Console

    from ..bench.roofline import Peaks
    from ..bench.throughput import Measured, Variant
    from ..build import Built
    from ..config import EngineConfig
    from ..engine.engine import LLMEngine
    from .bench_workload import Asked

BATCHING = ("inflight", "dynamic", "static")


@click.command(short_help="Tokens per second of a workload, and its latencies.")
@options.model
@workload
@click.option("--batching", metavar="NAMES", help="inflight, dynamic, static, or several with commas, which are "
              "compared on the same requests. Default: the engine's, inflight.")  # fmt: skip
@click.option("--max-num-seqs", "--batch-size", "max_num_seqs", default="64", metavar="N,N",
              help="Sequences that run together in one step; several are compared.")  # fmt: skip
@click.option("--max-num-batched-tokens", type=int, metavar="N", help="Tokens of one step, prefill and decode "
              "together. Default: 1024.")  # fmt: skip
@click.option("--enable-prefix-caching/--no-enable-prefix-caching", "prefix_caching", default=None,
              help="Keep and find the KV of common beginnings. Default: the engine's, on.")  # fmt: skip
@options.loading
@click.option("--rounds", type=int, default=1, metavar="N", help="Run everything so often, in turns: 3 or more for a "
              "comparison on a shared machine.")  # fmt: skip
@click.option("--warmup", type=int, default=4, metavar="N", help="Short requests before the first round, not counted.")
@click.option("--json", "json_file", type=click.Path(dir_okay=False), metavar="FILE", help="Write all numbers: an "
              "object, or a list of them for a comparison.")  # fmt: skip
@click.option("--plot", "plot_file", type=click.Path(dir_okay=False), metavar="FILE", help="Write a picture (.png, "
              ".svg, .pdf): output tokens/s over time, or latency against throughput if --max-num-seqs has several "
              "values.")  # fmt: skip
def throughput(
    model: str,
    asked: Asked,
    batching: str | None,
    max_num_seqs: str,
    max_num_batched_tokens: int | None,
    prefix_caching: bool | None,
    engine: dict[str, Any],
    rounds: int,
    warmup: int,
    json_file: str | None,
    plot_file: str | None,
) -> None:
    """Run a workload through the engine and report tokens per second, latencies and use of the machine.

    TTFT and E2E count from the moment a request is due, so waiting in the queue is in them: with all requests at
    once (the default) they say how long the queue is; give --request-rate for those of a service. TPOT is per
    request, ITL pools the gaps between tokens of all requests. MBU and MFU are fractions of what this machine's
    memory and cores do at best, measured in the same run. docs/benchmarking.md has all definitions.

    Ctrl-C stops and keeps the rounds that are complete.

    \b
    Examples:
      pelton bench throughput
      pelton bench throughput --dataset sharegpt --num-prompts 200
      pelton bench throughput --batching static,dynamic,inflight --rounds 3
      pelton bench throughput --max-num-seqs 1,4,16,64 --plot curve.png
      pelton bench throughput model.gguf --request-rate 2 --burstiness 0.5
    """
    from ..bench import plots
    from ..bench.throughput import Measured, Variant
    from ..build import build
    from ..config import EngineConfig
    from .progress import packing_progress

    kinds: Sequence[str | None] = (None,) if batching is None else options.chosen("batching", batching, BATCHING, ())
    sizes = options.numbers("max-num-seqs", max_num_seqs)
    for name, value, least in (("rounds", rounds, 1), ("warmup", warmup, 0)):
        if not least <= value <= 1000:
            raise PeltonError(f"--{name} is {value}", f"give a whole number from {least} to 1000")
    policies = {"max_num_batched_tokens": max_num_batched_tokens, "enable_prefix_caching": prefix_caching}
    engine |= {name: value for name, value in policies.items() if value is not None}
    config = EngineConfig(model=model, max_num_seqs=max(sizes), **engine)
    write_json, _ = options.writable(json_file), options.writable(plot_file)
    plots.check(plot_file)
    with packing_progress() as packing:
        built = build(config, packing)
    with closing(built):
        bench = _Bench(built, config, asked, [Measured(Variant(size, kind)) for kind in kinds for size in sizes])
        try:
            bench.run(rounds, warmup)
        except KeyboardInterrupt:
            complete = sum(len(each.replays) for each in bench.measured)
            click.echo(f"stopped: {complete} of {rounds * len(bench.measured)} runs are complete", err=True)
            raise
        finally:
            if bench.done:  # what was measured before Ctrl-C as well
                rows = bench.rows()
                write_json(json.dumps(rows if len(bench.measured) > 1 else rows[0], indent=1) + "\n")
                bench.print(rows)
                if plot_file is not None:
                    bench.plot(rows, plot_file)


class _Bench:
    """The engines that are measured, on one model."""

    def __init__(self, built: Built, config: EngineConfig, asked: Asked, measured: list[Measured]) -> None:
        from ..bench.throughput import peak_meter, precision_of
        from .roofs import console

        self.built = built
        self.config = config
        self.measured = measured
        self.arrivals = asked.arrivals
        self.out = console()
        self.meter, self.precision = peak_meter(built), precision_of(built.executor)
        self.workload = asked.make(
            vocab_size=built.vocab_size, tokenizer=built.tokenizer,
            max_model_len=self.new_engine(measured[0].variant).max_model_len,
        )  # fmt: skip

    def config_of(self, variant: Variant) -> EngineConfig:
        batching: dict[str, Any] = {} if variant.batching is None else {"batching": variant.batching}
        return replace(self.config, max_num_seqs=variant.max_num_seqs, **batching)

    def new_engine(self, variant: Variant) -> LLMEngine:
        from ..llm import LLM

        return LLM.from_parts(self.built, self.config_of(variant)).engine

    def run(self, rounds: int, warmup: int) -> None:
        from ..bench.throughput import run_rounds, warm_up
        from ..bench.workloads import describe
        from .bench_report import where
        from .roofs import Working

        self.out.print(f"[bold]throughput[/bold]  [dim]{where(self.built)}[/dim]")
        self.out.print(describe(self.workload, self.arrivals) + "\n", soft_wrap=True)
        per_replay = self.workload.max_output_tokens
        every = per_replay * rounds * len(self.measured)
        with Working(every, calm=True) as working:

            def on_tokens(each: Measured, number: int, total: int) -> None:
                complete = sum(len(m.replays) for m in self.measured)
                name = self.label(each.variant) + (f", round {number + 1}" if rounds > 1 else "")
                working.at(name, complete * per_replay + total, every)

            working.at("warming up", 0, every)
            if warmup:
                warm_up(self.new_engine(self.measured[0].variant), self.workload, warmup)
            times = self.arrivals.times(len(self.workload.requests))
            for _ in run_rounds(
                self.measured, self.new_engine, self.workload, times, rounds=rounds, meter=self.meter,
                on_tokens=on_tokens,
            ):  # fmt: skip
                pass

    def label(self, variant: Variant) -> str:
        seqs = _count(variant.max_num_seqs, "sequence")
        return f"{variant.batching}, {seqs}" if variant.batching else seqs

    @property
    def done(self) -> list[Measured]:
        return [each for each in self.measured if each.replays]

    def rows(self) -> list[dict[str, Any]]:
        from ..bench.throughput import row
        from .bench_report import record

        rate = None if self.arrivals.rate == float("inf") else self.arrivals.rate  # JSON knows no infinity
        asked = {**self.workload.settings, "request_rate": rate, "burstiness": self.arrivals.burstiness}
        return [
            {
                **record("throughput", self.built, self.config_of(each.variant)),
                "workload": asked,
                **row(each, self.done[0], self.precision),
            }
            for each in self.done
        ]

    def print(self, rows: Sequence[dict[str, Any]]) -> None:
        if len(self.measured) == 1:
            _print_one(self.out, rows[0])
        else:
            _print_comparison(self.out, [each.variant for each in self.done], rows)

    def plot(self, rows: Sequence[dict[str, Any]], path: str) -> None:
        from ..bench import plots
        from ..bench.workloads import describe
        from .bench_report import where

        title, subtitle = f"Throughput of {where(self.built)}", describe(self.workload, self.arrivals)
        if len({each.variant.max_num_seqs for each in self.measured}) > 1:
            plots.curve([(e.variant, row) for e, row in zip(self.done, rows, strict=True)], title, subtitle, path)
        else:
            runs = [(e.variant, e.replays[e.middle]) for e in self.done]
            peaks = [self._peaks(e.peaks[e.middle]) for e in self.done]
            plots.over_time(runs, title, subtitle, path, peaks)

    def _peaks(self, peaks: Peaks | None) -> tuple[float, float] | None:
        if peaks is None or self.precision is None:
            return None
        return peaks.rates["read_bandwidth"], peaks.compute(self.precision)


def _print_one(out: Console, row: dict[str, Any]) -> None:
    from rich.table import Table

    from ..bench.units import duration, number
    from .bench_report import neighbours_note, print_fractions, print_latencies

    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0), show_header=False)
    table.add_column("")
    table.add_column("", justify="right")
    table.add_column("", style="dim")
    for what, key, count in (
        ("output tokens/s", "output_tokens_per_s", f"{row['output_tokens']:,} in {duration(row['seconds'])}"),
        ("prompt tokens/s", "prompt_tokens_per_s", f"{row['prompt_tokens']:,}" + _cached(row)),
        ("all tokens/s", "total_tokens_per_s", ""),
        ("requests/s", "requests_per_s", f"{row['num_requests']:,}"),
    ):
        table.add_row(what, f"[bold]{number(row[key])}[/bold]", count)
    out.print(table)
    out.print()
    print_latencies(out, row)
    print_fractions(out, row["peaks"], row["mfu_precision"], mbu={"MBU": row["mbu"], "of decode steps":
                    row["mbu_decode"]}, mfu={"MFU": row["mfu"]})  # fmt: skip
    out.print(
        f"[dim]{row['running_mean']:.1f} sequences running on average, {row['running_max']} at most; "
        f"{_count(row['steps'], 'step')}\nat most {row['kv_use_max']:.1%} of the KV cache in use; "
        f"{_count(row['preemptions'], 'preemption')}[/dim]\n"
    )
    if len(row["rounds_output_tokens_per_s"]) > 1:
        rates = row["rounds_output_tokens_per_s"]
        out.print(f"[dim]median of {len(rates)} rounds, {number(min(rates))} to {number(max(rates))} tokens/s[/dim]\n")
    if note := neighbours_note(row["others_cores"]):
        out.print(f"[yellow]{note}[/yellow]\n")


def _cached(row: dict[str, Any]) -> str:
    return f", {row['cached_tokens']:,} of them from the KV cache" if row["cached_tokens"] else ""


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'s' * (number != 1)}"


def _print_comparison(out: Console, variants: Sequence[Variant], rows: Sequence[dict[str, Any]]) -> None:
    from rich.table import Table

    from ..bench.units import number
    from .bench_report import milliseconds, neighbours_note

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    named = any(variant.batching for variant in variants)
    if named:
        table.add_column("batching\n")
    for title in ("seqs\n", "output\ntok/s", "ratio\n", "TTFT\np50 ms", "\np99", "TPOT\np50 ms", "\np99",
                  "ITL\np99 ms", "MBU\n"):  # fmt: skip
        table.add_column(title, justify="right")
    for variant, row in zip(variants, rows, strict=True):
        latencies = [row[key][p] for key, p in (("ttft_ms", "p50"), ("ttft_ms", "p99"), ("tpot_ms", "p50"),
                                                ("tpot_ms", "p99"), ("itl_ms", "p99"))]  # fmt: skip
        table.add_row(
            *([variant.batching or ""] if named else []), str(variant.max_num_seqs),
            f"[bold]{number(row['output_tokens_per_s'])}[/bold]", f"{row['ratio_to_first']:.2f}×",
            *map(milliseconds, latencies), "–" if row["mbu"] is None else f"{row['mbu']:.0%}",
        )  # fmt: skip
    out.print(table)
    rounds = len(rows[0]["rounds_output_tokens_per_s"])
    same = len({row["output_sha256"] for row in rows}) == 1
    notes = [
        "ratio: output tokens/s over the first line's" + (", median of the rounds" if rounds > 1 else ""),
        f"figures of the median of {rounds} rounds" if rounds > 1 else "one round; --rounds 3 is safer",
        "all answers are the same, token by token" if same else "the answers differ between the lines",
    ]
    preempted = [f"{_count(row['preemptions'], 'preemption')} at {v.batching or ''} {v.max_num_seqs}".replace("  ", " ")
                 for v, row in zip(variants, rows, strict=True) if row["preemptions"]]  # fmt: skip
    out.print("\n[dim]" + "\n".join(notes + preempted) + "[/dim]\n")
    if note := neighbours_note(max((row["others_cores"] or 0.0 for row in rows), default=None)):
        out.print(f"[yellow]{note}[/yellow]\n")
