"""pelton inspect: what a checkpoint is, and what memory it would need, before anything is loaded."""

from __future__ import annotations

import json
import math
from collections import Counter
from typing import Any

import click

from . import options


@click.command(short_help="Show config, parameters and needed memory.")
@options.model
@options.max_model_len
@options.max_num_seqs
@options.dtype
@options.quantization
@options.kv_cache_dtype
@options.as_json
def inspect(
    model: str,
    max_model_len: int | None,
    max_num_seqs: int,
    dtype: str,
    quantization: str | None,
    kv_cache_dtype: str,
    as_json: bool,
) -> None:
    """Show a model's config, its parameters by type, and the memory it would need.

    Nothing is loaded: headers are read, the graph is traced, sizes are computed. The exit code is 2 if
    the model would not fit into the memory that is free now.

    \b
    Examples:
      pelton inspect
      pelton inspect Qwen/Qwen3-0.6B --max-model-len 8192 --max-num-seqs 16
      pelton inspect Qwen/Qwen3-0.6B --quantization int4
      pelton inspect model.gguf --json
    """
    from ..build import plan, trained_context
    from ..config import EngineConfig
    from ..graph import TensorType

    planned = plan(
        EngineConfig(
            model=model, max_model_len=max_model_len, max_num_seqs=max_num_seqs,
            dtype=dtype, quantization=quantization, kv_cache_dtype=kv_cache_dtype,  # type: ignore[arg-type]
        )
    )  # fmt: skip
    counts: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    runs_as: Counter[str] = Counter()
    for leaf in planned.graph.leaves("weight"):
        runs_as[str(leaf.tensor.dtype)] += math.prod(int(d) for d in leaf.tensor.shape)
    for name in {leaf.name: None for leaf in planned.graph.leaves("weight")}:  # a tied weight may have two leaves
        stored = planned.checkpoint.tensors[name]
        counts[str(stored.type.dtype)] += math.prod(int(d) for d in stored.type.shape)
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
        "runs_as": dict(runs_as),
        "kv_cache_types": dict(caches),
        "trained_context": trained_context(planned.checkpoint.config),
        "max_model_len": planned.kv_spec.max_model_len,
        "max_num_seqs": max_num_seqs,
        "ledger": {name: size for name, size, _ in ledger.rows()},
        "available": planned.available,
        "notes": list(planned.notes),
        "fits": ledger.total <= planned.available,
    }
    if as_json:
        click.echo(json.dumps(result, indent=2))
    else:
        _print(result, ledger.rows())
    planned.check_memory()


def _print(result: dict[str, Any], ledger: list[tuple[str, int, str]]) -> None:
    from ..ledger import human
    from .tables import print_table

    print_table(f"{result['architecture']} ({result['format']})", [(result["path"],)])
    print_table("config", [(name, str(value)) for name, value in result["config"].items()])
    counts, sizes = result["parameters"], result["stored_bytes"]
    rows = [(kind, f"{counts[kind]:,}", human(sizes[kind])) for kind in counts]
    total = ("in all", f"{sum(counts.values()):,}", human(sum(sizes.values())))
    print_table("parameters", [("type", "number", "stored"), *rows, total], "lrr")
    if dict(result["runs_as"]) != counts:
        print_table("they run as", [(kind, f"{count:,}") for kind, count in result["runs_as"].items()], "lr")
    caches = [(kind, f"{layers} layers") for kind, layers in result["kv_cache_types"].items()]
    print_table("KV cache", caches)
    memory = [(name, human(size), remark) for name, size, remark in ledger]
    memory.append(("free now", human(result["available"]), "it fits" if result["fits"] else "it does not fit"))
    title = f"memory for contexts of {result['max_model_len']:,} tokens, {result['max_num_seqs']} sequences at once"
    print_table(title, memory, "lrl")
    if result["notes"]:
        print_table("notes", [(note,) for note in result["notes"]])
