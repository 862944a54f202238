"""Random LoRA adapters, in files as PEFT writes them, and merged into transformers' weights as the oracle."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import safetensors.numpy

F = npt.NDArray[np.float32]
Weights = Mapping[str, tuple[F, F]]

CONFIG: dict[str, Any] = {
    "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 8, "bias": "none", "use_rslora": False,
    "use_dora": False, "fan_in_fan_out": False, "rank_pattern": {}, "alpha_pattern": {}, "modules_to_save": None,
    "init_lora_weights": True, "base_model_name_or_path": "tiny", "inference_mode": True,
}  # fmt: skip


def linear_layers(model: Any) -> dict[str, tuple[int, int]]:
    """(in, out) of what PEFT's "all-linear" adapts in a transformers model, by name."""
    head = model.get_output_embeddings()
    found = {}
    for name, module in model.named_modules():
        kind = type(module).__name__
        if kind in ("Linear", "Conv1D") and module is not head:
            shape = tuple(int(d) for d in module.weight.shape)
            found[name] = shape if kind == "Conv1D" else shape[::-1]
    return found


def random_weights(
    modules: Mapping[str, tuple[int, int]], seed: int, rank: int = 4, only: Sequence[str] = (), size: float = 1.0
) -> dict[str, tuple[F, F]]:
    """A and B for the modules, or for those whose names end with one of ``only``; B A is as large as a weight."""
    rng = np.random.default_rng(seed)
    return {
        name: (
            (rng.standard_normal((rank, cols)) / cols**0.5).astype(np.float32),
            (rng.standard_normal((rows, rank)) * size / rank).astype(np.float32),
        )
        for name, (cols, rows) in modules.items() if not only or name.endswith(tuple(only))
    }  # fmt: skip


def write_peft(folder: Path, weights: Weights, **config: Any) -> Path:
    """The files of an adapter; without a scale in ``config`` it is 2."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for name, (a, b) in weights.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = a
        tensors[f"base_model.model.{name}.lora_B.weight"] = b
    safetensors.numpy.save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    rank = len(next(iter(weights.values()))[0]) if weights else 4
    leaves = sorted({name.rpartition(".")[2] for name in weights})
    fields = {**CONFIG, "r": rank, "lora_alpha": 2 * rank, "target_modules": leaves} | config
    (folder / "adapter_config.json").write_text(json.dumps(fields))
    return folder


def merged(model: Any, weights: Weights, scale: float = 2.0) -> Any:
    """A copy of a transformers model with scale * B A added to its weights."""
    import torch

    model = copy.deepcopy(model)
    for name, (a, b) in weights.items():
        module = model.get_submodule(name)
        delta = torch.from_numpy(scale * (b.astype(np.float64) @ a.astype(np.float64)))
        with torch.no_grad():
            weight = module.weight.double() + (delta.T if type(module).__name__ == "Conv1D" else delta)
            module.weight.copy_(weight.to(module.weight.dtype))
    return model
