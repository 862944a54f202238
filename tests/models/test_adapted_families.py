"""Adapters in every family against transformers with the adapter merged into its weights."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pelton.backends.base import Batch, ScheduledSequence
from pelton.quantize import QUANTIZATIONS
from tests.helpers.adapters import linear_layers, merged, random_weights, write_peft
from tests.helpers.families import BLOCK, backends, load, spec, tolerance
from tests.helpers.tiny_models import FAMILIES, oracle_logits, tiny_checkpoint

TOKENS = [[int(t) for t in np.random.default_rng(seed).integers(3, 101, 33)] for seed in range(4)]
LIMIT = tolerance(8 * (48 + 48 + 64 + 80))  # the longest path of the tiny configs, with adapters beside it


def assert_close(got: Any, want: Any) -> None:
    error = np.abs(got - want).max() / np.abs(want).max()
    assert error <= min(LIMIT, 1e-4), f"relative error {error:.2e}"


def run(executor: Any, chunks: list[dict[int, tuple[int, int]]], slots: dict[int, int]) -> dict[int, Any]:
    """The last logits of sequences whose tokens [start, end) come in these steps; slots: their adapters."""
    logits = {}
    for chunk in chunks:
        scheduled = tuple(
            ScheduledSequence(str(i), tuple(TOKENS[i][a:b]), a, tuple(range(4 * i, 4 * i + -(-b // BLOCK))), spec(),
                              adapter=slots[i])
            for i, (a, b) in chunk.items()
        )  # fmt: skip
        rows = np.array(executor.logits(Batch(scheduled)))
        logits |= dict(zip(chunk, rows, strict=True))
    return logits


@pytest.mark.parametrize("backend", backends())
@pytest.mark.parametrize("family", FAMILIES)
def test_adapters_of_all_linear_layers_in_one_batch(family: str, backend: str, tmp_path: Path) -> None:
    folder, model = tiny_checkpoint(family)
    modules = linear_layers(model)
    adapters = [random_weights(modules, 1, rank=4), random_weights(modules, 2, rank=3)]
    # The second leaves out every other layer of the model.
    adapters[1] = {name: pair for i, (name, pair) in enumerate(adapters[1].items()) if i % 2}
    built = load(folder, backend, enable_lora=True, max_loras=3, max_lora_rank=5)
    for slot, weights in zip((3, 1), adapters, strict=True):
        built.executor.set_adapter(slot, built.read_adapter(str(write_peft(tmp_path / str(slot), weights))).weights)
    whole: list[dict[int, tuple[int, int]]] = [dict.fromkeys(range(4), (0, 33))]
    got = run(built.executor, whole, {0: 3, 1: 0, 2: 1, 3: 3})
    models = {3: merged(model, adapters[0]), 0: model, 1: merged(model, adapters[1])}
    for i, slot in {0: 3, 1: 0, 2: 1, 3: 3}.items():
        assert_close(got[i], oracle_logits(models[slot], TOKENS[i])[-1])
    assert np.abs(got[0] - oracle_logits(model, TOKENS[0])[-1]).max() > 0.1 * np.abs(got[0]).max()
    if backend != "reference":  # in chunks, in other company, decoding at the end: the same bits
        chunks: list[dict[int, tuple[int, int]]] = [
            {0: (0, 7)}, {2: (0, 32), 0: (7, 8)}, {0: (8, 32), 1: (0, 32)}, {2: (32, 33), 1: (32, 33), 0: (32, 33)},
        ]  # fmt: skip
        again = run(built.executor, chunks, {0: 3, 1: 0, 2: 1})
        assert all(np.array_equal(again[i], got[i]) for i in range(3))
    built.close()


@pytest.mark.parametrize("backend", [b for b in backends() if b != "reference"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_without_an_adapter_the_bits_are_those_of_a_model_without_room_for_any(family: str, backend: str) -> None:
    folder, model = tiny_checkpoint(family)
    plain, roomy = load(folder, backend), load(folder, backend, enable_lora=True)
    weights = random_weights(linear_layers(model), 3)
    roomy.executor.set_adapter(2, weights)
    whole: list[dict[int, tuple[int, int]]] = [dict.fromkeys(range(3), (0, 33))]
    want = run(plain.executor, whole, dict.fromkeys(range(3), 0))
    got = run(roomy.executor, whole, {0: 0, 1: 2, 2: 0})
    assert np.array_equal(got[0], want[0]) and np.array_equal(got[2], want[2])
    assert not np.array_equal(got[1], want[1])
    plain.close(), roomy.close()


@pytest.mark.parametrize("options", [{"dtype": "bf16"}, *({"quantization": q} for q in QUANTIZATIONS)], ids=str)
def test_beside_weights_of_every_type(options: dict[str, Any]) -> None:
    folder, model = tiny_checkpoint("llama")
    weights = random_weights(linear_layers(model), 4)
    logits = []
    for backend in ("reference", "generic"):  # in the generic tier all products are of floats
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # rows that are no whole groups
            built = load(folder, backend, enable_lora=True, kv_cache_dtype="f32", **options)
        built.executor.set_adapter(1, weights)
        logits.append(run(built.executor, [{0: (0, 33), 1: (0, 33)}], {0: 1, 1: 0}))
        built.close()
    for want, got in zip(logits[0].values(), logits[1].values(), strict=True):
        assert_close(got, want)
