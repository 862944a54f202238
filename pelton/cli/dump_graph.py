"""pelton dump-graph: the model as the compiler sees it."""

from __future__ import annotations

import click

from . import options


@click.command(short_help="Print a model's graph or program as text.")
@options.model
@click.option("--after", metavar="STAGE", help="Stop after this stage. Default: after the last pass.")
@options.max_num_seqs
@options.dtype
@options.quantization
@options.kv_cache_dtype
@click.option("--enable-lora", is_flag=True, help="With a place for adapters behind each product.")
def dump_graph(
    model: str,
    after: str | None,
    max_num_seqs: int,
    dtype: str,
    quantization: str | None,
    kv_cache_dtype: str,
    enable_lora: bool,
) -> None:
    """Print a model's graph as text: one operation per line, with types. It parses back.

    \b
    Stages, in order:
      trace                as recorded, with the checkpoint's types
      last_token_logits    logits only where a token is sampled
      fuse_gated_linear    gate, up and the activation between them as one product
      merge_linears        q, k and v as one product
      insert_lora          with --enable-lora, and then without fuse_gated_linear
      fuse_add_norm        residual addition and norm in one call
      fuse_rope_kv_write   rotary embedding and cache write in one call
      simplify             leftovers removed
      program              kernel calls, buffers and the arena

    \b
    Examples:
      pelton dump-graph --after trace
      pelton dump-graph model.gguf --after program
    """
    from ..build import bound_graph, plan
    from ..checkpoint import open_checkpoint, resolve_model
    from ..config import EngineConfig
    from ..errors import PeltonError
    from ..graph import print_graph
    from ..passes import pipeline, run_passes
    from ..program import print_program

    config = EngineConfig(
        model=model, max_num_seqs=max_num_seqs, dtype=dtype, quantization=quantization,  # type: ignore[arg-type]
        kv_cache_dtype=kv_cache_dtype, enable_lora=enable_lora,  # type: ignore[arg-type]
    )  # fmt: skip
    stages = ["trace", *(p.name for p in pipeline(config.lora)), "program"]
    if after is not None and after not in stages:
        raise PeltonError(f"there is no stage {after!r}", f"choose one of {', '.join(stages)}")
    if after == "program":
        click.echo(print_program(plan(config).program), nl=False)
        return
    graph = bound_graph(config, open_checkpoint(resolve_model(model)))
    click.echo(print_graph(graph if after == "trace" else run_passes(graph, after=after, lora=config.lora)), nl=False)
