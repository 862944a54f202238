"""``pelton bench latency``: how long one batch of known shape takes."""

from __future__ import annotations

import json
from contextlib import closing
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import click

from ..errors import PeltonError
from . import options

if TYPE_CHECKING:
    from rich.console import Console


@click.command(short_help="How long one batch of known shape takes.")
@options.model
@click.option("--batch-size", type=int, default=1, metavar="N", help="Sequences that run together.")
@click.option("--input-len", type=int, default=512, metavar="N", help="Tokens of each prompt.")
@click.option("--output-len", type=int, default=128, metavar="N", help="Tokens to generate for each.")
@click.option("--iterations", type=int, default=10, metavar="N", help="How often the batch is measured.")
@click.option("--warmup", type=int, default=2, metavar="N", help="Iterations before that, not counted.")
@click.option("--seed", type=int, default=0, help="Same seed, same prompts.")
@click.option("--max-num-batched-tokens", type=int, metavar="N", help="Tokens of one step: longer prompts are computed "
              "in chunks. Default: 1024.")  # fmt: skip
@options.loading
@click.option("--json", "json_file", type=click.Path(dir_okay=False), metavar="FILE", help="Write all numbers.")
@click.option("--plot", "plot_file", type=click.Path(dir_okay=False), metavar="FILE", help="Write a picture (.png, "
              ".svg, .pdf): ITL by position, and its histogram.")  # fmt: skip
def latency(
    model: str,
    batch_size: int,
    input_len: int,
    output_len: int,
    iterations: int,
    warmup: int,
    seed: int,
    max_num_batched_tokens: int | None,
    engine: dict[str, Any],
    json_file: str | None,
    plot_file: str | None,
) -> None:
    """Run one batch of random prompts again and again, with nothing beside it, and report its latencies.

    Prompts go in together and each gets exactly --output-len greedy tokens. Prefill ends with the last sequence's
    first token; decode is what comes after. MBU of decode and MFU of prefill are fractions of what this machine's
    memory and cores do at best, measured in the same run. docs/benchmarking.md has all definitions.

    Ctrl-C stops and keeps the iterations that are complete.

    \b
    Examples:
      pelton bench latency
      pelton bench latency model.gguf --input-len 2048 --output-len 128
      pelton bench latency org/name --batch-size 8 --json out.json --plot out.png
    """
    from ..bench import latency as bench
    from ..bench import plots
    from ..bench.neighbours import Neighbours
    from ..bench.replay import Replay
    from ..bench.throughput import peak_meter, precision_of
    from ..bench.workloads import WorkloadSpec, make
    from ..build import build
    from ..config import EngineConfig
    from ..llm import LLM
    from .bench_report import record, where
    from .progress import packing_progress
    from .roofs import Working, console

    for name, value, least, most in (
        ("batch-size", batch_size, 1, 4096), ("iterations", iterations, 1, 10_000), ("warmup", warmup, 0, 1000),
    ):  # fmt: skip
        if not least <= value <= most:
            raise PeltonError(f"--{name} is {value}", f"give a whole number from {least} to {most}")
    spec = WorkloadSpec("random", batch_size, input_len, output_len, seed=seed)
    if max_num_batched_tokens is not None:
        engine["max_num_batched_tokens"] = max_num_batched_tokens
    if engine["max_model_len"] is None:
        engine["max_model_len"] = input_len + output_len
    config = EngineConfig(model=model, max_num_seqs=batch_size, **engine)
    # The KV cache is laid out for twice as many: no sequence waits because another may grow.
    roomy = replace(config, max_num_seqs=max(batch_size, min(2 * batch_size, config.step_tokens)))
    write_json, _ = options.writable(json_file), options.writable(plot_file)
    plots.check(plot_file)
    with packing_progress() as packing:
        built = build(roomy, packing)
    with closing(built):
        kv_spec = built.executor.kv_spec
        workload = make(spec, vocab_size=built.vocab_size, tokenizer=None, max_model_len=kv_spec.max_model_len)
        workload.check_lengths(kv_spec.max_model_len)
        bench.check_capacity(kv_spec, batch_size, input_len + output_len)
        meter, replays = peak_meter(built), list[Replay]()
        neighbours = Neighbours()
        try:
            with Working(warmup + iterations, calm=True) as working:
                if meter is not None:
                    meter.measure()
                runs = bench.run_iterations(lambda: LLM.from_parts(built, config).engine, workload, warmup + iterations)
                for number, done in enumerate(runs, 1):
                    working.at("measuring" if number >= warmup else "warming up", number, warmup + iterations)
                    if number > warmup:
                        replays.append(done)
        except KeyboardInterrupt:
            click.echo(f"stopped: {len(replays)} of {iterations} iterations are complete", err=True)
            raise
        finally:
            others = neighbours.cores()
            if replays:  # what was measured before Ctrl-C as well
                if meter is not None:
                    meter.measure()
                row = {
                    **record("latency", built, config),
                    "workload": {**workload.settings, "batch_size": batch_size},
                    "iterations": len(replays),
                    "others_cores": others,
                    **bench.summary(replays, None if meter is None else meter.peaks(), precision_of(built.executor)),
                }
                write_json(json.dumps(row, indent=1) + "\n")
                shape = f"{batch_size} × {input_len:,} prompt tokens, {output_len:,} output tokens"
                shape += f"; {len(replays)} iterations"
                out = console()
                out.print(f"[bold]latency[/bold]  [dim]{where(built)}[/dim]")
                out.print(f"{shape}\n")
                _print(out, row)
                if plot_file is not None:
                    plots.latency(replays, f"Latency of {where(built)}", shape, plot_file)


def _print(out: Console, row: dict[str, Any]) -> None:
    from rich.table import Table

    from ..bench.units import number
    from .bench_report import neighbours_note, print_fractions, print_latencies

    print_latencies(out, row)
    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0), show_header=False)
    table.add_column("")
    table.add_column("", justify="right")
    table.add_row("prefill tokens/s", f"[bold]{number(row['prefill_tokens_per_s'])}[/bold]")
    if row["decode_tokens_per_s"] is not None:
        table.add_row("decode tokens/s", f"[bold]{number(row['decode_tokens_per_s'])}[/bold]")
    out.print(table)
    out.print()
    print_fractions(
        out, row["peaks"], row["mfu_precision"], mbu={"MBU of decode": row["mbu_decode"]},
        mfu={"MFU of prefill": row["mfu_prefill"]},
    )  # fmt: skip
    if note := neighbours_note(row["others_cores"]):
        out.print(f"[yellow]{note}[/yellow]\n")
