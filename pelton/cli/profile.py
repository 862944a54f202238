"""``pelton profile``: where the time of a model's steps goes."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import click

from ..errors import PeltonError
from . import options

if TYPE_CHECKING:
    from rich.console import Console

    from ..bench.profile import Part, Phase


@click.command(short_help="Show where the time of a step goes.")
@options.model
@click.option("--phase", type=click.Choice(["prefill", "decode", "both"]), default="both", help="What to run.")
@click.option("--prompt-len", type=int, default=512, metavar="N", help="Tokens of each prompt of the prefill.")
@click.option("--context", metavar="N,N", default="512", help="Tokens in the KV cache at a decode step.")
@click.option("--batch-size", type=int, default=1, metavar="N", help="Sequences in a step.")
@click.option("--seconds", type=float, default=2.0, metavar="S", help="Time per phase; at least three runs.")
@options.dtype
@options.kv_cache_dtype
@options.isa
@options.threads
@options.device
@click.option("--layers/--no-layers", default=True, help="A bar for every layer.")
@click.option("--html", "html_file", type=click.Path(dir_okay=False), metavar="FILE", help="Write a page with picture "
              "and tables.")  # fmt: skip
@click.option("--svg", "svg_file", type=click.Path(dir_okay=False), metavar="FILE", help="Write the picture alone.")
@click.option("--json", "json_file", type=click.Path(dir_okay=False), metavar="FILE", help="Write all numbers.")
def profile(
    model: str,
    phase: str,
    prompt_len: int,
    context: str,
    batch_size: int,
    seconds: float,
    dtype: str,
    kv_cache_dtype: str,
    isa: str | None,
    device: str,
    threads: int | None,
    layers: bool,
    html_file: str | None,
    svg_file: str | None,
    json_file: str | None,
) -> None:
    """Run prefill and decode steps and show, per op, the time against what the machine allows.

    "roof" is the least time that the roofline allows over the time taken: weights and KV cache stream from memory,
    activations lie in a cache, products run at the peak of their precision; all measured in the same run. Steps are
    run in turns with and without profiling, which adds a barrier after each call; the table shows medians.

    \b
    Examples:
      pelton profile
      pelton profile model.gguf --phase decode --context 512,2048 --batch-size 8
      pelton profile org/name --html profile.html
    """
    from ..bench import flame
    from ..bench.profile import as_json
    from ..bench.profile import profile as run
    from ..build import build
    from ..config import EngineConfig
    from .bench_report import machine_text
    from .progress import packing_progress
    from .roofs import Working, console

    contexts = options.numbers("context", context)
    for name, value, most in (("prompt-len", prompt_len, 1 << 20), ("batch-size", batch_size, 1024)):
        if not 1 <= value <= most:
            raise PeltonError(f"--{name} is {value}", f"give a whole number from 1 to {most}")
    if not 0 < seconds <= 600:
        raise PeltonError(f"--seconds is {seconds:g}", "give a time above 0 and up to 600")
    phases = ("prefill", "decode") if phase == "both" else (phase,)
    longest = max((prompt_len if "prefill" in phases else 1), (max(contexts) if "decode" in phases else 1))
    config = EngineConfig(
        model=model, dtype=dtype, kv_cache_dtype=kv_cache_dtype, isa=isa, threads=threads, device=device,  # type: ignore[arg-type]
        max_num_seqs=batch_size, max_model_len=longest + 1,
    )  # fmt: skip
    out, done = console(), []
    write_html, write_svg, write_json = map(options.writable, (html_file, svg_file, json_file))
    with packing_progress() as packing:
        built = build(config, packing)
    name = built.plan.checkpoint.path.name
    machine = machine_text(built)
    try:
        with Working() as working:
            for measured in run(
                built, prompt_len=prompt_len if "prefill" in phases else 1,
                contexts=contexts if "decode" in phases else (1,), batch_size=batch_size, phases=phases,
                seconds=seconds, on_work=working.at,
            ):  # fmt: skip
                done.append(measured)
                with working.hidden():
                    _print(out, (name, machine), measured, layers)
    finally:
        built.close()
        if done:  # what was measured before Ctrl-C as well
            write_json(json.dumps([as_json(p) for p in done], indent=1) + "\n")
            write_html(flame.html(name, done))
            write_svg(flame.svg(name, done))


def _print(out: Console, where: tuple[str, str], phase: Phase, layers: bool) -> None:
    from ..bench.units import duration

    model, machine = where
    out.print(f"[bold]{phase.title}[/bold]  [dim]{model}[/dim]")
    rate, fraction = phase.num_tokens / phase.seconds, phase.bound_seconds / phase.seconds
    steps = f"{phase.steps} steps" if phase.steps > 1 else "a step"
    out.print(f"{duration(phase.seconds)} {steps}, {rate:,.1f} tokens/s, {fraction:.0%} of the roofline", end="")
    out.print(f"  [dim]{machine}[/dim]\n")
    _print_ops(out, phase)
    if layers:
        _print_layers(out, phase)
    python = phase.seconds - phase.native_seconds
    added = phase.profiled_seconds / phase.native_seconds - 1 if phase.native_seconds else 0.0
    out.print(
        f"[dim]Without profiling {duration(phase.seconds)}: {duration(phase.native_seconds)} in native code, "
        f"{duration(max(python, 0.0))} of Python (inputs, sampling).\n"
        f"Profiled {duration(phase.profiled_seconds)} ({added:+.0%}): {duration(phase.call_seconds)} in calls, "
        f"{duration(phase.outside_seconds)} outside (planning, waking threads, "
        f"barriers); medians of {phase.repeats} runs.[/dim]\n"
    )


def _print_ops(out: Console, phase: Phase) -> None:
    from rich.table import Table

    from ..bench.units import number
    from .roofs import bar

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), collapse_padding=True, header_style="dim")
    table.add_column("op", no_wrap=True, overflow="ellipsis")
    for title in ("calls", "ms", "share", "GB/s", "TFLOP/s", "roof"):
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    table.add_column("bound", no_wrap=True)
    for part in phase.by_op():
        rate = 1 / part.seconds if part.seconds > 0 else 0.0
        table.add_row(
            part.name, str(part.calls), number(part.seconds * 1e3), f"{part.seconds / phase.profiled_seconds:.1%}",
            number(part.bytes * rate / 1e9), number(part.flops * rate / 1e12), f"{part.roof_fraction:.0%}",
            bar(part.roof_fraction, 6), part.bound_by,
        )  # fmt: skip
    outside = phase.outside_seconds
    table.add_row("outside calls", "", number(outside * 1e3), f"{outside / phase.profiled_seconds:.1%}", style="dim")
    out.print(table)
    out.print()


def _print_layers(out: Console, phase: Phase) -> None:
    """A bar for each layer, cut into its ops: length is time, colour the fraction of the roofline."""
    from rich.text import Text

    from ..bench.units import number

    tree = phase.tree(merge=False)
    names = max(map(len, tree.children))
    width = max(20, min(out.width, 160) - names - 20)
    layers = [part.seconds for name, part in tree.children.items() if "." in name]
    longest = max(layers, default=0.0) or max(part.seconds for part in tree.children.values())
    for part in tree.children.values():
        line = Text(f"{part.name.ljust(names)} {number(part.seconds * 1e3):>6} ms {part.roof_fraction:>5.0%} ")
        line.append_text(_segments(part, width, longest))
        out.print(line, no_wrap=True, crop=True)
    out.print()


def _segments(part: Part, width: int, longest: float) -> Any:
    from rich.text import Text

    from ..bench.flame import colour

    leaves = _leaves(part)
    out, at, drawn = Text(), 0.0, 0
    for leaf in leaves:
        at += leaf.seconds
        cells = min(round(at / longest * width), width) - drawn  # the output layer may be longer than any layer
        drawn += cells
        if cells <= 0:
            continue
        label = leaf.name if len(leaf.name) < cells else leaf.name[: cells - 1]
        # The last column of a segment stays dark, so that two of one colour can be told apart.
        out.append(label.ljust(cells - 1), style=f"#10151c on {colour(leaf.roof_fraction)}")
        out.append("▏", style=f"#10151c on {colour(leaf.roof_fraction)}")
    return out


def _leaves(part: Part) -> list[Part]:
    if not part.children:
        return [part]
    return [leaf for child in part.children.values() for leaf in _leaves(child)]
