"""Options that several verbs share, each described once."""

from __future__ import annotations

from typing import Annotated, Optional

import typer

Model = Annotated[
    str,
    typer.Argument(
        metavar="[MODEL]",
        help="A Hugging Face folder, a .gguf file or a hub id (org/name). Nothing: the demo model, if installed.",
        show_default=False,
    ),
]
MaxModelLen = Annotated[
    Optional[int],  # noqa: UP045 (typer reads the annotation on Python 3.10)
    typer.Option(help="Longest prompt plus answer, in tokens. Default: what the model and memory allow."),
]
MaxNumSeqs = Annotated[int, typer.Option(help="Sequences that run together in one step.")]
Threads = Annotated[
    Optional[int],  # noqa: UP045
    typer.Option(help="CPU threads. Default: the cores this process may use."),
]
Isa = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(help="Instruction set: generic, avx2, avx512, avx512_bf16. Default: PELTON_CPU_ISA, else the best."),
]
Dtype = Annotated[str, typer.Option(help="Type of weights that are not quantized: auto, f32 or bf16.")]
KVCacheDtype = Annotated[str, typer.Option(help="Type of the KV cache: auto, f32 or bf16.")]
