"""Every family against transformers, on the oracle and on the CPU with every ISA tier."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from pelton.models import architectures
from tests.helpers.families import Sequences, backends, greedy_oracle, load, tolerance
from tests.helpers.tiny_models import FAMILIES, oracle_logits, tiny_checkpoint

TERMS = 4 * (48 + 48 + 64 + 80) + 48  # sizes of the sums on the longest path of the tiny configs
LIMIT = tolerance(TERMS)


def assert_close(got: np.ndarray, want: np.ndarray) -> None:
    error = np.abs(got - want).max() / np.abs(want).max()
    assert error <= min(LIMIT, 1e-4), f"relative error {error:.2e}"


def test_every_registered_architecture_is_checked() -> None:
    assert {model for _, model, _ in FAMILIES.values()} == set(architectures())


@pytest.mark.parametrize("backend", backends())
@pytest.mark.parametrize("family", FAMILIES)
def test_64_greedy_tokens_are_those_of_transformers(family: str, backend: str) -> None:
    prompt, tokens, logits = greedy_oracle(family)
    built = load(tiny_checkpoint(family)[0], backend)
    sequences = Sequences(built.executor)
    got = sequences.step(a=prompt)[0]
    for token, want in zip(tokens, logits, strict=True):
        assert_close(got, want)
        assert int(np.argmax(got)) == token
        got = sequences.step(a=[token])[0]
    built.close()


@pytest.mark.parametrize("backend", backends())
@pytest.mark.parametrize("family", FAMILIES)
def test_ragged_batch_of_chunks_and_decode_tokens(family: str, backend: str) -> None:
    folder, model = tiny_checkpoint(family)
    built = load(folder, backend)
    sequences = Sequences(built.executor)
    text = [int(t) for t in np.random.default_rng(3).integers(3, 101, 120)]
    a, b, c = text[:50], text[50:91], text[91:]
    sequences.step(a=a[:17], b=b[:40])
    sequences.step(b=b[40:], a=a[17:18], c=c[:5])
    sequences.step(c=c[5:6])
    got = sequences.step(a=a[18:], c=c[6:])
    assert_close(got[0], oracle_logits(model, a)[-1])
    assert_close(got[1], oracle_logits(model, c)[-1])
    after_b = sequences.step(b=[9])
    assert_close(after_b[0], oracle_logits(model, [*b, 9])[-1])
    built.close()


@pytest.mark.parametrize("backend", [b for b in backends() if b != "reference"])
@pytest.mark.parametrize("family", ["llama", "gemma2", "bloom"])
def test_logits_do_not_depend_on_company_chunking_or_threads(family: str, backend: str) -> None:
    """Bit for bit: the promise behind reproducible tokens."""
    folder, _ = tiny_checkpoint(family)
    text = [int(t) for t in np.random.default_rng(5).integers(3, 101, 150)]
    results = []
    for threads in (1, 2):
        alone = load(folder, backend, threads=threads)
        results.append(Sequences(alone.executor).step(a=text[:100])[0])
        chunked = Sequences(alone.executor)
        for start, stop in ((0, 1), (1, 34), (34, 99)):
            chunked.step(a=text[start:stop], **{f"other{start}": text[stop : stop + 7]})
        results.append(chunked.step(x=text[:30], a=text[99:100], y=text[:3])[1])
        alone.close()
    for result in results[1:]:
        np.testing.assert_array_equal(result, results[0])


@pytest.mark.parametrize("backend", [b for b in backends() if b != "reference"])
@pytest.mark.parametrize("family", FAMILIES)
def test_bf16_weights_stay_close_to_f32_arithmetic_on_the_same_weights(family: str, backend: str) -> None:
    """bf16 activations at products and a bf16 cache cost no more than bf16's own precision."""
    folder, _ = tiny_checkpoint(family, "bfloat16")
    built = load(folder, backend)
    oracle = load(folder, "reference", kv_cache_dtype="f32", dtype="f32")
    text = [int(t) for t in np.random.default_rng(3).integers(3, 101, 60)]
    got = Sequences(built.executor).step(a=text)[0]
    want = Sequences(oracle.executor).step(a=text)[0]
    error = np.abs(got - want).max() / np.abs(want).max()
    # 2**-8 per rounding, growing with the root of the number of roundings on the path: per layer two
    # products' operands, k, v and the probabilities.
    assert error <= 2**-8 * (5 * 4) ** 0.5 * 2
    built.close()


@pytest.mark.parametrize("backend", [b for b in backends() if b != "reference"])
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "bloom"])
def test_int8_cache_is_that_of_the_oracle_and_close_to_a_cache_of_floats(family: str, backend: str) -> None:
    folder, _ = tiny_checkpoint(family)
    text = [int(t) for t in np.random.default_rng(3).integers(3, 101, 60)]
    logits = {}
    for name, device, cache in (("cpu", backend, "int8"), ("oracle", "reference", "int8"), ("f32", "reference", "f32")):
        built = load(folder, device, kv_cache_dtype=cache)
        sequences = Sequences(built.executor)
        logits[name] = np.stack([sequences.step(a=text[:40])[0], sequences.step(b=text[:5], a=text[40:])[1]])
        built.close()
    scale = np.abs(logits["f32"]).max()
    # A number on the border of two codes may become either, 1 / 127 of its head's largest apart: one of some hundred,
    # as two ways to compute it differ by 1e-6 of it. Their effect on a logit is a small part of all codes' rounding.
    assert np.abs(logits["cpu"] - logits["oracle"]).max() <= scale / 127 / 4
    # Half a code per number, averaged over the dims of a head: per layer keys and values, as for bf16 above.
    assert np.abs(logits["cpu"] - logits["f32"]).max() <= scale / 127 * (2 * 4) ** 0.5


@pytest.mark.parametrize("backend", [b for b in backends() if b != "reference"])
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "bloom"])
def test_fp8_cache_is_that_of_the_oracle_and_close_to_a_cache_of_floats(family: str, backend: str) -> None:
    folder, _ = tiny_checkpoint(family)
    text = [int(t) for t in np.random.default_rng(3).integers(3, 101, 60)]
    logits = {}
    for name, device, cache in (("cpu", backend, "fp8"), ("oracle", "reference", "fp8"), ("f32", "reference", "f32")):
        built = load(folder, device, kv_cache_dtype=cache)
        sequences = Sequences(built.executor)
        logits[name] = np.stack([sequences.step(a=text[:40])[0], sequences.step(b=text[:5], a=text[40:])[1]])
        built.close()
    scale = np.abs(logits["f32"]).max()
    # As for int8: few numbers may become one of two codes, up to 1 / 14 of the largest apart. Tiers with bf16 products
    # round queries and probabilities.
    assert np.abs(logits["cpu"] - logits["oracle"]).max() <= scale * (1 / 14 / 4 + 2**-8 * (2 * 4) ** 0.5)
    # 2**-4 of a number, averaged over the dims of a head: per layer keys and values.
    error = np.abs(logits["cpu"] - logits["f32"]).max()
    assert scale * 1e-4 <= error <= scale * 2**-4 * (2 * 4) ** 0.5


@pytest.mark.parametrize("backend", [b for b in backends() if b != "reference"])
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "bloom"])
def test_f16_cache_is_that_of_the_oracle_and_close_to_a_cache_of_floats(family: str, backend: str) -> None:
    folder, _ = tiny_checkpoint(family)
    text = [int(t) for t in np.random.default_rng(3).integers(3, 101, 60)]
    logits = {}
    for name, device, cache in (("cpu", backend, "f16"), ("oracle", "reference", "f16"), ("f32", "reference", "f32")):
        built = load(folder, device, kv_cache_dtype=cache)
        sequences = Sequences(built.executor)
        logits[name] = np.stack([sequences.step(a=text[:40])[0], sequences.step(b=text[:5], a=text[40:])[1]])
        built.close()
    scale = np.abs(logits["f32"]).max()
    # As for int8: few numbers may become one of two neighbours, 2**-10 apart. No tier rounds anything else.
    assert np.abs(logits["cpu"] - logits["oracle"]).max() <= scale * 2**-10 / 4
    # 2**-11 of a number, averaged over the dims of a head: per layer keys and values.
    error = np.abs(logits["cpu"] - logits["f32"]).max()
    assert scale * 1e-6 <= error <= scale * 2**-11 * (2 * 4) ** 0.5


@pytest.mark.parametrize("backend", [b for b in backends() if b != "reference"])
@pytest.mark.parametrize("kind", ["f16", "int8", "fp8"])
def test_cache_of_another_type_does_not_depend_on_company_chunking_or_threads(kind: Any, backend: str) -> None:
    folder, _ = tiny_checkpoint("llama")
    text = [int(t) for t in np.random.default_rng(5).integers(3, 101, 100)]
    alone = load(folder, backend, threads=1, kv_cache_dtype=kind)
    want = Sequences(alone.executor).step(a=text)[0]
    alone.close()
    built = load(folder, backend, threads=2, kv_cache_dtype=kind)
    chunked = Sequences(built.executor)
    chunked.step(a=text[:1])
    chunked.step(b=text[:7], a=text[1:34])
    chunked.step(a=text[34:99])
    assert np.array_equal(chunked.step(x=text[:30], a=text[99:100])[1], want)
    built.close()
