"""Low-rank adapters as the PEFT library saves them: adapter_config.json beside adapter_model.safetensors.

What PEFT can train and this cannot run is refused by name: an adapter that is applied in part answers wrongly without
a sign of it.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, TypeAlias

import numpy as np
import numpy.typing as npt

from ..errors import CheckpointError
from .mapped import map_file
from .safetensors import _read, read_json, read_safetensors

F = npt.NDArray[np.float32]
#: Raises CheckpointError from cause and remedy, with the folder's name.
Refuse: TypeAlias = Callable[[str, str], NoReturn]

_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_TENSOR = re.compile(r"(?P<module>.+)\.lora_(?P<side>[AB])\.weight")
#: Options that change what is computed, and what people call them.
_REFUSED = {
    "use_dora": "DoRA", "lora_bias": "biases of its own", "use_qalora": "QALoRA", "use_bdlora": "BD-LoRA",
    "layer_replication": "replicated layers", "modules_to_save": "whole modules", "arrow_config": "Arrow routing",
    "target_parameters": "parameters that belong to no linear layer", "trainable_token_indices": "trained tokens",
    "alora_invocation_tokens": "aLoRA, which begins in the middle of a prompt", "kasa_config": "KaSA",
    "monteclora_config": "MonteCLoRA",
}  # fmt: skip
#: Ways to begin that leave the base model as it was; the others move a part of its weights into the adapter.
_HARMLESS_STARTS = (None, True, False, "gaussian", "eva", "orthogonal", "mica")


@dataclass(frozen=True)
class LoraAdapter:
    """``weights``: per module, A [rank, in] and B [out, rank] in float32, with the adapter's scale in B.

    ``identity``: a hash of the files; adapters of equal identity compute the same.
    """

    identity: str
    weights: Mapping[str, tuple[F, F]]


def read_adapter(folder: Path, modules: Mapping[str, tuple[int, int]], max_rank: int) -> LoraAdapter:
    """Read a PEFT adapter for a model with these linear layers: (in, out) by Hugging Face name.

    Raises:
        CheckpointError: files are missing, damaged or pickled; the adapter is of another kind or for another model;
            or a rank exceeds ``max_rank``. The message names the file and what is wrong.
    """
    _require_files(folder)
    path = folder / _WEIGHTS
    config = read_json(folder / _CONFIG, "save the adapter again")

    def refuse(what: str, remedy: str) -> NoReturn:
        raise CheckpointError(f"{folder}: {what}", remedy)

    _check_config(config, refuse)
    data, entries = read_safetensors(path)
    found: dict[str, dict[str, F]] = {}
    for name, entry in entries.items():
        module, side = _place(name, modules, refuse)
        if entry.dtype not in ("F32", "F16", "BF16"):
            refuse(f"tensor {name} is stored as {entry.dtype}", "save the adapter as f32, f16 or bf16")
        value = _read(data, entry).astype(np.float32)
        if not np.isfinite(value).all():
            refuse(f"tensor {name} holds NaN or infinity", "its training diverged, or the file is damaged")
        found.setdefault(module, {})[side] = value
    if not found:
        refuse("the adapter has no tensors", "save it again")
    weights = {m: _pair(m, pair, modules[m], config, max_rank, refuse) for m, pair in sorted(found.items())}
    digest = hashlib.sha256((folder / _CONFIG).read_bytes())
    digest.update(map_file(path))
    return LoraAdapter(digest.hexdigest(), weights)


def _require_files(folder: Path) -> None:
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        raise CheckpointError(f"{folder} {what}", f"give the folder with {_CONFIG} and {_WEIGHTS}")
    if not (folder / _CONFIG).is_file():
        raise CheckpointError(f"{folder} holds no {_CONFIG}", "give the folder that PEFT's save_pretrained wrote")
    if not (folder / _WEIGHTS).is_file():
        pickle = folder / "adapter_model.bin"
        if pickle.is_file():
            raise CheckpointError(
                f"{pickle} is pickled, which could run code when loaded",
                "load it where you trust it and save it again: PEFT's save_pretrained writes safetensors",
            )
        raise CheckpointError(f"{folder} holds no {_WEIGHTS}", "give the folder that PEFT's save_pretrained wrote")


def _check_config(config: Mapping[str, Any], refuse: Refuse) -> None:
    if config.get("peft_type") != "LORA":
        refuse(f"peft_type is {config.get('peft_type')!r}", "only LORA is supported")
    for option, kind in _REFUSED.items():
        if config.get(option):
            refuse(f"the adapter has {kind} ({option}), which is not supported", "train it without")
    if config.get("bias", "none") != "none":
        refuse(f"the adapter has biases (bias = {config['bias']!r}), which is not supported", 'train with bias="none"')
    start = config.get("init_lora_weights")
    if start not in _HARMLESS_STARTS:
        refuse(
            f"init_lora_weights {start!r} has changed the base model's weights, too",
            "save the adapter with path_initial_model_for_weight_conversion",
        )
    for option in ("rank_pattern", "alpha_pattern"):
        if not isinstance(config.get(option) or {}, Mapping):
            refuse(f"{option} is {config[option]!r:.80}", f"check {_CONFIG}")


def _place(name: str, modules: Mapping[str, tuple[int, int]], refuse: Refuse) -> tuple[str, str]:
    """The module of a tensor, and whether it is its A or its B."""
    match = _TENSOR.fullmatch(name.removeprefix(_PREFIX))
    if match is None:
        what = "belongs to DoRA" if "lora_magnitude_vector" in name else "is of no use to a linear layer's adapter"
        what = "adapts an embedding, which is not supported" if "lora_embedding" in name else what
        refuse(f"tensor {name} {what}", "train an adapter of linear layers alone")
    module = match["module"]
    if module.rpartition(".")[2] in ("lm_head", "embed_out"):
        refuse(f"tensor {name} adapts the output layer, which is not supported", "train without it")
    if module not in modules:
        some = next(iter(modules), "none")
        refuse(f"the model has no linear layer {module}", f"is it for another model? One of this one's is {some}")
    return module, match["side"]


def _pair(
    module: str, pair: Mapping[str, F], shape: tuple[int, int], config: Mapping[str, Any], max_rank: int, refuse: Refuse
) -> tuple[F, F]:
    if len(pair) < 2:
        refuse(f"{module} has lora_{next(iter(pair))} alone", "the file is incomplete: save the adapter again")
    a, b = pair["A"], pair["B"]
    rank = _number(config, "r", 8, "rank_pattern", module, refuse)
    wanted = ((rank, shape[0]), (shape[1], rank))
    if (a.shape, b.shape) != wanted:
        refuse(
            f"{module} has lora_A {list(a.shape)} and lora_B {list(b.shape)}, its rank {rank:g} and the model ask for"
            f" {[int(d) for d in wanted[0]]} and {[int(d) for d in wanted[1]]}",
            "the adapter is for another model, or its config is not its own",
        )
    if rank > max_rank:
        refuse(f"{module} has rank {rank:g}, max_lora_rank is {max_rank}", f"set max_lora_rank={rank:g}")
    alpha = _number(config, "lora_alpha", 8, "alpha_pattern", module, refuse)
    scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    return a, b * np.float32(scale)


def _number(config: Mapping[str, Any], name: str, default: int, pattern: str, module: str, refuse: Refuse) -> float:
    """A number of the config for a module: the first pattern that fits the end of its name, else the general one."""
    value = config.get(name, default)
    for key, special in (config.get(pattern) or {}).items():
        try:
            fits = re.match(rf"(.*\.)?({key})$", module)
        except re.error:
            refuse(f"{pattern} holds {key!r}, which is no pattern", f"check {_CONFIG}")
        if fits:
            value = special
            break
    whole = name == "r"
    good = isinstance(value, int) if whole else isinstance(value, (int, float)) and math.isfinite(value)
    if isinstance(value, bool) or not good or (whole and value < 1):
        refuse(f"{name} of {module} is {value!r}", f"check {_CONFIG}")
    return float(value) if not whole else value
