"""pelton dump-graph: the model as the compiler sees it."""

from __future__ import annotations

from typing import Annotated, Optional

import typer

from . import options

_STAGES = "trace, one of the passes, or program"


def dump_graph(
    model: options.Model = "",
    after: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help=f"Stop after this stage: {_STAGES}. Default: after the last pass.", show_default=False),
    ] = None,
    max_num_seqs: options.MaxNumSeqs = 64,
) -> None:
    """Print a model's graph as text: one operation per line, with types. It parses back.

    The stages, in order: trace (as recorded, with the checkpoint's types), last_token_logits,
    merge_linears, fuse_add_norm, fuse_rope_kv_write, simplify, and program (the kernel calls).

    Examples:

      pelton dump-graph --after trace

      pelton dump-graph model.gguf --after program
    """
    from ..build import bound_graph, plan
    from ..checkpoint import open_checkpoint, resolve_model
    from ..config import EngineConfig
    from ..errors import PeltonError
    from ..graph import print_graph
    from ..passes import PIPELINE, run_passes
    from ..program import print_program

    config = EngineConfig(model=model, max_num_seqs=max_num_seqs)
    names = [p.name for p in PIPELINE]
    if after not in (None, "trace", "program", *names):
        raise PeltonError(f"no stage {after!r}", f"choose one of trace, {', '.join(names)}, program")
    if after == "program":
        typer.echo(print_program(plan(config).program), nl=False)
        return
    graph = bound_graph(config, open_checkpoint(resolve_model(model)))
    typer.echo(print_graph(graph if after == "trace" else run_passes(graph, after=after)), nl=False)
