"""pelton build: pack a model's weights ahead of time."""

from __future__ import annotations

import time

import click

from . import options


@click.command(short_help="Pack a model's weights ahead of time.")
@options.model
@options.dtype
@options.quantization
@options.isa
@options.threads
def build(model: str, dtype: str, quantization: str | None, isa: str | None, threads: int | None) -> None:
    """Pack a model's weights for this machine now, so that the next start is instant.

    The same happens by itself at the first run. Packed weights lie under PELTON_CACHE (default
    ~/.cache/pelton) and are found by the content of the checkpoint: a model that was moved or copied is
    not packed again.

    \b
    Examples:
      pelton build
      pelton build Qwen/Qwen3-0.6B --dtype bf16
      pelton build Qwen/Qwen3-0.6B --quantization int8
    """
    from ..build import build as build_model
    from ..config import EngineConfig
    from ..ledger import human
    from ..paths import cache_dir
    from .progress import packing_progress

    start = time.perf_counter()
    packed = False

    with packing_progress() as progress:

        def note(done: int, total: int) -> None:
            nonlocal packed
            packed = True
            progress(done, total)

        # One sequence: how many run later changes no weight, and less memory is asked for.
        config = EngineConfig(
            model=model, dtype=dtype, quantization=quantization, threads=threads, isa=isa, max_num_seqs=1  # type: ignore[arg-type]
        )  # fmt: skip
        built = build_model(config, note)
    ledger = built.plan.ledger
    built.close()
    size, took = human(ledger.weights + ledger.mapped), time.perf_counter() - start
    where = cache_dir() / "packed"
    click.echo(f"{size} packed in {took:.1f} s, kept in {where}" if packed else f"{size} were packed already: {where}")
