"""Options that several verbs share, each described once."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from ..errors import PeltonError


class _Described(click.Argument):
    """An argument that the help describes; older versions of click leave arguments to the prose."""

    def __init__(self, param_decls: Sequence[str], help: str, **settings: Any) -> None:
        super().__init__(param_decls, **settings)
        self._text = help

    def get_help_record(self, ctx: click.Context) -> tuple[str, str]:
        return self.make_metavar(ctx), self._text


model = click.argument(
    "model",
    default="",
    metavar="[MODEL]",
    cls=_Described,
    help="A Hugging Face folder, a .gguf file or a hub id (org/name). Nothing: the demo model, if installed.",
)
max_model_len = click.option(
    "--max-model-len",
    type=int,
    metavar="TOKENS",
    help="Longest prompt plus answer. Default: what the model was trained for and memory allows.",
)
max_num_seqs = click.option(
    "--max-num-seqs", type=int, default=64, metavar="N", help="Sequences that run together in one step."
)
threads = click.option("--threads", type=int, metavar="N", help="CPU threads. Default: the cores this process may use.")
isa = click.option(
    "--isa",
    metavar="ISA",
    help="Instruction set of the kernels: generic, avx2, avx512, avx512_bf16, amx. "
    "Default: PELTON_CPU_ISA, else the best one this machine has.",
)
dtype = click.option(
    "--dtype",
    type=click.Choice(["auto", "f32", "f16", "bf16"]),
    default="auto",
    help="Type of weights that are not quantized; auto: as stored (f16 as bf16 on CPUs). f16 is for GPUs.",
)
quantization = click.option(
    "--quantization",
    type=click.Choice(["int8", "int4", "fp8", "nvfp4", "w8a8"]),
    help="Round the linear layers of an f32, f16 or bf16 model as it is loaded: int8 and fp8 take half the memory of "
    "bf16 and change little, int4 and nvfp4 take a third of it and cost some quality; w8a8 is int8 with one scale "
    "per row and int8 activations with one per token (the output layer is int8 in groups in all). A file that was "
    "quantized with data (GPTQ, AWQ, GGUF) is better at 4 bits.",
)
kv_cache_dtype = click.option(
    "--kv-cache-dtype",
    type=click.Choice(["auto", "f32", "f16", "bf16", "int8", "fp8"]),
    default="auto",
    help="Type of the KV cache; auto: as the model, bf16 beside codes. f16 takes the memory of bf16 and "
    "rounds eight times finer. int8 and fp8 (E4M3) take half, with a scale per token and head; int8 rounds much finer "
    "(docs/engine.md has figures).",
)
activations = click.option(
    "--activations",
    type=click.Choice(["auto", "float", "int8"]),
    default="auto",
    help="What quantized weights are multiplied with: activations rounded to int8 per group, which is fastest, or "
    "floats. auto: int8 where that adds little to the weights' own error (docs/quantization.md has figures); on GPUs "
    "floats, and FP8 beside FP8.",
)
num_speculative_tokens = click.option(
    "--num-speculative-tokens",
    type=int,
    default=0,
    metavar="N",
    help="Guess up to N tokens from the text so far and check them in one step: faster where an answer repeats its "
    "prompt, with the very same tokens. 0: off.",
)
speculative_model = click.option(
    "--speculative-model",
    metavar="MODEL",
    help="A smaller model with the same tokenizer that makes the guesses, 4 tokens unless --num-speculative-tokens "
    "says otherwise: the very same tokens, sooner where it is much faster and mostly agrees.",
)
speculative_quantization = click.option(
    "--speculative-quantization",
    type=click.Choice(["int8", "int4", "fp8", "nvfp4", "w8a8"]),
    help="As --quantization, for the speculative model. MODEL itself, quantized, often makes good guesses.",
)
device = click.option(
    "--device",
    type=click.Choice(["cpu", "cuda", "reference"]),
    default="cpu",
    help="cpu, cuda (the first NVIDIA GPU; docs/cuda.md), or the slow interpreter that everything is checked against.",
)
gpu_memory_utilization = click.option(
    "--gpu-memory-utilization",
    type=float,
    default=0.9,
    metavar="SHARE",
    help="Of the GPU's memory: what weights and steps leave of it is KV cache.",
)
enforce_eager = click.option(
    "--enforce-eager", is_flag=True, help="Without CUDA graphs: starts sooner, decodes slower. Of --device cuda."
)


def lora(command: Callable[..., Any]) -> Callable[..., Any]:
    """--lora and --max-lora-rank, for :func:`adapters`."""
    for option in (
        click.option(
            "--max-lora-rank", type=int, metavar="N", help="Room for adapters of this rank. Default: 64 with --lora."
        ),
        click.option(
            "--lora",
            multiple=True,
            metavar="[NAME=]DIR",
            help="Answer with this LoRA adapter: a folder that the PEFT library wrote, or a hub id. May be repeated: "
            "the first one answers, and /lora NAME in the chat changes to another.",
        ),
    ):
        command = option(command)
    return command


@dataclass(frozen=True)
class Adapters:
    """What --lora asks for: folders by name, and the fields of an EngineConfig."""

    folders: dict[str, str]
    engine: dict[str, Any]

    @property
    def first(self) -> str | None:
        return next(iter(self.folders), None)


def adapters(given: Sequence[str], max_lora_rank: int | None) -> Adapters:
    """``NAME=DIR``, or DIR alone, which is called as its last part is.

    Raises:
        PeltonError: a name is empty or occurs twice, or there is a rank without an adapter.
    """
    folders: dict[str, str] = {}
    for text in given:
        name, is_named, folder = text.partition("=")
        if not is_named or Path(text).exists():
            name, folder = Path(text).resolve().name, text
        if not name or not folder or name in folders:
            raise PeltonError(f"--lora is {text!r}", "give NAME=DIR, each name once")
        folders[name] = folder
    if not folders:
        if max_lora_rank is not None:
            raise PeltonError("--max-lora-rank without --lora has no use", "add --lora DIR")
        return Adapters({}, {})
    # Rank 64 is the most that is common; its room is address space until an adapter takes it.
    rank = 64 if max_lora_rank is None else max_lora_rank
    return Adapters(folders, {"enable_lora": True, "max_loras": len(folders), "max_lora_rank": rank})


as_json = click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of tables.")

#: What the verbs that run a model have in common, in the order of the help.
_LOADING = {
    "max_model_len": max_model_len, "dtype": dtype, "quantization": quantization, "kv_cache_dtype": kv_cache_dtype,
    "activations": activations, "num_speculative_tokens": num_speculative_tokens,
    "speculative_model": speculative_model, "speculative_quantization": speculative_quantization,
    "isa": isa, "threads": threads, "device": device,
    "gpu_memory_utilization": gpu_memory_utilization, "enforce_eager": enforce_eager,
}  # fmt: skip


def loading(command: Callable[..., Any]) -> Callable[..., Any]:
    """All options of how a model is loaded. The command gets them as ``engine``, fields of an EngineConfig."""

    @functools.wraps(command)
    def with_engine(**arguments: Any) -> Any:
        return command(engine={name: arguments.pop(name) for name in _LOADING}, **arguments)

    for option in reversed(_LOADING.values()):
        option(with_engine)
    return with_engine


def chosen(param: str, text: str | None, allowed: Sequence[str], default: Sequence[str]) -> tuple[str, ...]:
    """A comma-separated choice; ``all`` is everything."""
    if text is None:
        return tuple(default)
    names = [name.strip() for name in text.split(",") if name.strip()]
    if names == ["all"]:
        return tuple(allowed)
    wrong = [name for name in names if name not in allowed]
    if wrong or not names:
        raise PeltonError(f"there is no {param} {', '.join(wrong) or repr(text)}", f"choose of {', '.join(allowed)}")
    return tuple(dict.fromkeys(names))


def numbers(param: str, text: str) -> tuple[int, ...]:
    try:
        numbers = tuple(dict.fromkeys(int(part) for part in text.split(",")))
    except ValueError:
        numbers = ()
    if not numbers or not all(1 <= n <= 1 << 20 for n in numbers):
        raise PeltonError(f"--{param} is {text!r}", "give whole numbers from 1 to 1048576, separated by commas")
    return numbers


def writable(path: str | None) -> Callable[[str], object]:
    """write(text), which replaces the file's content. Fails now if that will not work in the end."""
    if path is None:
        return lambda text: None
    file = Path(path)
    if not os.access(file if file.exists() else file.parent, os.W_OK):
        raise PeltonError(f"cannot write {path}", "give a file in a folder that exists and may be written to")
    return file.write_text
