"""A model of the right shapes and random weights, without a file: what it says means nothing, its speed does."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .device import empty_cache
from .part import Part

if TYPE_CHECKING:
    from pelton.build import Built
    from pelton.checkpoint import Checkpoint
    from pelton.graph import TensorType


def random_checkpoint(config: Mapping[str, Any], codes: Mapping[str, TensorType] | None = None) -> Checkpoint:
    """A checkpoint in memory. Matrices of one shape are one array: made once, it is sent to the device many times.

    codes: tensors that are read as random codes of a quantized type, though they are declared as bf16, as the engine
    would make them of bf16: rounding eight billion weights takes minutes, and what they are says nothing here.
    """
    from pelton.checkpoint import Checkpoint, LazyTensor
    from pelton.graph import BF16, TensorType
    from pelton.models import create
    from pelton.nn import trace

    @cache
    def read(type: TensorType) -> Any:
        return _random(type)

    fields = dict(config)
    graph = trace(create(fields), fields["architectures"][0])
    tensors = {}
    for node in graph.leaves("weight"):
        type = TensorType(node.tensor.shape, BF16)
        size = 2
        for dim in type.shape:
            size *= int(dim)
        what = (codes or {}).get(node.name, type)
        tensors[node.name] = LazyTensor(node.name, type, lambda what=what: read(what), size)  # type: ignore[misc]
    return Checkpoint(Path("random-weights"), "safetensors", fields, {}, tensors, ())


def _random(type: TensorType) -> Any:
    """FP8 codes with both signs: sums of equal signs take less power, and clocks stay higher."""
    import numpy as np

    from pelton.bench.weights import random_weight
    from pelton.graph import GroupQuant

    value = random_weight(type)
    if isinstance(type.dtype, GroupQuant) and type.dtype.floating and type.dtype.bits == 8:
        signs = np.random.default_rng(1).integers(0, 2, 1 << 20, np.uint8) << 7
        return replace(value, codes=value.codes ^ np.resize(signs, value.codes.shape))  # type: ignore[type-var]
    return value


def quantized_types(config: Any, checkpoint: Checkpoint) -> dict[str, TensorType]:
    """Weights that the engine quantizes, by name; without those that it needs in bf16 as well (tied embeddings)."""
    from pelton.build import plan
    from pelton.graph import GroupQuant

    found: dict[str, set[TensorType]] = {}
    for node in plan(config, checkpoint).graph.leaves("weight"):
        found.setdefault(node.name, set()).add(node.tensor)
    return {
        name: next(iter(types)) for name, types in found.items()
        if len(types) == 1 and isinstance(next(iter(types)).dtype, GroupQuant)
    }  # fmt: skip


@contextmanager
def loaded(part: Part, **options: Any) -> Iterator[tuple[Built, Any]]:
    """(the model on the device, its EngineConfig), with the limits of ``options``."""
    from pelton import EngineConfig
    from pelton.build import build

    config = EngineConfig(
        model="random weights", device="cuda", dtype=part.scale.dtype, enable_prefix_caching=False, **options
    )
    empty_cache()
    checkpoint = random_checkpoint(part.scale.config)
    if config.quantization is not None:
        checkpoint = random_checkpoint(part.scale.config, quantized_types(config, checkpoint))
    part.say(f"loading {part.scale.model}: {options}")
    built = build(config, checkpoint=checkpoint)
    spec = built.executor.kv_spec
    part.say(f"loaded: room for {spec.num_blocks * spec.block_size:,} tokens in the KV cache")
    try:
        yield built, config
    finally:
        built.close()
        del built
        empty_cache()
