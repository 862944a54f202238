"""pelton build: pack a model's weights ahead of time."""

from __future__ import annotations

import time

from . import options


def build(
    model: options.Model = "",
    dtype: options.Dtype = "auto",
    threads: options.Threads = None,
    isa: options.Isa = None,
) -> None:
    """Pack a model's weights for this machine now, so that the next start is instant.

    The same happens by itself at the first run. The packed weights lie under PELTON_CACHE
    (default ~/.cache/pelton) and are found by the content of the checkpoint.
    """
    from ..build import build as build_model
    from ..config import EngineConfig
    from ..ledger import human
    from ..paths import cache_dir
    from .console import stderr, stdout
    from .progress import packing_progress

    start = time.perf_counter()
    with packing_progress(stderr()) as progress:
        built = build_model(
            EngineConfig(model=model, dtype=dtype, threads=threads, isa=isa),  # type: ignore[arg-type]
            progress,
        )
    ledger = built.plan.ledger
    built.close()
    size = human(ledger.weights + ledger.mapped)
    stdout().print(
        f"{size} of packed weights in {cache_dir() / 'packed'}, ready in {time.perf_counter() - start:.1f} s"
    )
