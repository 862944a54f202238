"""pelton inspect: what a checkpoint is, and what memory it would need, before anything is loaded."""

from __future__ import annotations

import json
from collections import Counter
from typing import Annotated, Any

import typer

from . import options


def inspect(
    model: options.Model = "",
    max_model_len: options.MaxModelLen = None,
    max_num_seqs: options.MaxNumSeqs = 64,
    dtype: options.Dtype = "auto",
    kv_cache_dtype: options.KVCacheDtype = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")] = False,
) -> None:
    """Show config, parameters by type, and the memory ledger for a context length and batch.

    Nothing is loaded: headers are read, the graph is traced, sizes are computed.

    Examples:

      pelton inspect

      pelton inspect meta-llama/Llama-3.2-1B --max-model-len 8192 --max-num-seqs 16
    """
    from ..build import plan, trained_context
    from ..config import EngineConfig
    from ..graph import TensorType

    planned = plan(
        EngineConfig(
            model=model, max_model_len=max_model_len, max_num_seqs=max_num_seqs,
            dtype=dtype, kv_cache_dtype=kv_cache_dtype,  # type: ignore[arg-type]
        )
    )  # fmt: skip
    counts: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    for leaf in planned.graph.leaves("weight"):
        stored = planned.checkpoint.tensors[leaf.name]
        elements = 1
        for dim in stored.type.shape:
            elements *= int(dim)
        counts[str(stored.type.dtype)] += elements
        sizes[str(stored.type.dtype)] += stored.nbytes
    ledger = planned.ledger
    fields = {k: v for k, v in planned.checkpoint.config.items() if isinstance(v, (str, int, float, bool))}
    caches = Counter(str(n.type) for n in planned.graph.nodes if not isinstance(n.type, TensorType) and n.op == "input")
    result: dict[str, Any] = {
        "path": str(planned.checkpoint.path),
        "format": planned.checkpoint.format,
        "architecture": planned.checkpoint.architecture,
        "config": fields,
        "parameters": dict(counts),
        "stored_bytes": dict(sizes),
        "kv_cache_types": dict(caches),
        "trained_context": trained_context(planned.checkpoint.config),
        "max_model_len": planned.kv_spec.max_model_len,
        "ledger": {name: size for name, size, _ in ledger.rows()},
        "available": planned.available,
        "fits": ledger.total <= planned.available,
    }
    if as_json:
        print(json.dumps(result, indent=2))
        return
    _print(result, ledger.rows())
    planned.check_memory()


def _print(result: dict[str, Any], ledger: list[tuple[str, int, str]]) -> None:
    from rich.table import Table

    from ..ledger import human
    from .console import stdout

    console = stdout()
    console.print(f"[bold]{result['architecture']}[/]  {result['path']}  ({result['format']})\n")
    config = Table(title="config", title_justify="left", show_header=False, box=None)
    for name, value in result["config"].items():
        config.add_row(name, str(value))
    weights = Table("type", "parameters", "stored", title="\nparameters", title_justify="left", box=None)
    for kind, count in result["parameters"].items():
        weights.add_row(kind, f"{count:,}", human(result["stored_bytes"][kind]))
    weights.add_row("in all", f"{sum(result['parameters'].values()):,}", human(sum(result["stored_bytes"].values())))
    title = f"\nmemory for contexts of {result['max_model_len']:,} tokens"
    memory = Table("purpose", "bytes", "", title=title, title_justify="left", box=None)
    for name, size, remark in ledger:
        memory.add_row(name, human(size), remark, style="bold" if name == "total" else None)
    memory.add_row("free now", human(result["available"]), "it fits" if result["fits"] else "[red]it does not fit[/]")
    for table in (config, weights, memory):
        for column in table.columns[1:2]:
            column.justify = "right" if table is not config else "left"
        console.print(table)
