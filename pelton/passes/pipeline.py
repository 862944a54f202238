"""The ordered list of passes. Each takes a verified graph and returns a verified graph."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from ..graph import Graph
from .fuse_add_norm import fuse_add_norm
from .fuse_gated_linear import fuse_gated_linear
from .fuse_rope_kv_write import fuse_rope_kv_write
from .insert_lora import insert_lora
from .last_token_logits import last_token_logits
from .merge_linears import merge_linears
from .simplify import simplify


@dataclass(frozen=True)
class Pass:
    name: str
    run: Callable[[Graph], Graph]
    reason: str  # why it stands at this place


PIPELINE: tuple[Pass, ...] = (
    Pass("last_token_logits", last_token_logits, "first: it moves through single ops, not through fused ones"),
    Pass("fuse_gated_linear", fuse_gated_linear, "before merge_linears, which would join gate and up side by side"),
    Pass("merge_linears", merge_linears, "before fusions, which then see q, k and v as views of one product"),
    Pass("fuse_add_norm", fuse_add_norm, "needs the row selection in place: it must not cross a fused pair"),
    Pass("fuse_rope_kv_write", fuse_rope_kv_write, "works on the views that merge_linears made"),
    Pass("simplify", simplify, "last: clears what the others left behind"),
)


def pipeline(lora: tuple[int, int] | None = None, *, fuse_gates: bool = True) -> tuple[Pass, ...]:
    """The passes in order; ``lora``: (max_loras, max_lora_rank), None without adapters.

    fuse_gates: the backend has a kernel for products of gates and ups in turns. What gate and up add must be known
    before the activation, so with adapters these are not fused either.
    """
    steps = [p for p in PIPELINE if p.name != "fuse_gated_linear" or (fuse_gates and lora is None)]
    if lora is None:
        return tuple(steps)
    insert = partial(insert_lora, max_loras=lora[0], max_lora_rank=lora[1])
    at = [p.name for p in steps].index("merge_linears") + 1
    return (*steps[:at], Pass("insert_lora", insert, "one op behind all parts of a merged product"), *steps[at:])


def run_passes(
    graph: Graph, *, after: str | None = None, lora: tuple[int, int] | None = None, fuse_gates: bool = True
) -> Graph:
    """Run the pipeline, all of it or up to and including the pass named ``after``; the others as for it.

    Raises:
        ValueError: no such pass.
    """
    steps = pipeline(lora, fuse_gates=fuse_gates)
    if after is not None and after not in [p.name for p in steps]:
        raise ValueError(f"no pass named {after!r}; the passes are {', '.join(p.name for p in steps)}")
    for step in steps:
        graph = step.run(graph)
        if step.name == after:
            break
    return graph
