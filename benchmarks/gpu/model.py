"""A model of the right shapes and random weights, without a file: what it says means nothing, its speed does."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .device import empty_cache
from .part import Part

if TYPE_CHECKING:
    from pelton.build import Built
    from pelton.checkpoint import Checkpoint


def random_checkpoint(config: Mapping[str, Any]) -> Checkpoint:
    """A checkpoint in memory. Matrices of one shape are one array: made once, it is sent to the device many times."""
    from pelton.bench.weights import random_weight
    from pelton.checkpoint import Checkpoint, LazyTensor
    from pelton.graph import BF16, TensorType
    from pelton.models import create
    from pelton.nn import trace

    @cache
    def read(type: TensorType) -> Any:
        return random_weight(type)

    fields = dict(config)
    graph = trace(create(fields), fields["architectures"][0])
    tensors = {}
    for node in graph.leaves("weight"):
        type = TensorType(node.tensor.shape, BF16)
        size = 2
        for dim in type.shape:
            size *= int(dim)
        tensors[node.name] = LazyTensor(node.name, type, lambda type=type: read(type), size)  # type: ignore[misc]
    return Checkpoint(Path("random-weights"), "safetensors", fields, {}, tensors, ())


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
