"""Rotary embeddings and the writing of the KV cache on the device against the op table."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from pelton.graph import E4M3, I8, OPS
from pelton.graph.ops import scaled_token
from pelton.graph.rope import RopeSpec
from tests.backends.cuda.device import DEVICE
from tests.backends.cuda.test_norms import BF16, F16, F32, ROUNDING, f64, gaps_untouched, strided
from tests.helpers.tolerance import F32_EPS, assert_within

# isort: split
from pelton.backends.cuda.triton import rope
from pelton.backends.cuda.triton.cache import Cache

BLOCKS, BLOCK_SIZE, MAX_POSITIONS, MARK = 4, 4, 50, 7.0
POSITIONS = [49, 0, 7, 8]
#: A block's last slot, its neighbour's first, and a row that is no token.
SLOTS = [15, -1, 3, 4]
#: (head_dim, rotary_dim, heads, kv_heads): odd sizes, a part that turns, heads for more than one program.
SHAPES = [(12, 12, 3, 1), (8, 6, 6, 2), (80, 32, 4, 4), (128, 128, 9, 17), (64, 2, 5, 5)]


def spec_of(head_dim: int, rotary_dim: int, interleaved: bool) -> tuple[RopeSpec, torch.Tensor]:
    spec = RopeSpec(head_dim, rotary_dim, theta=100.0, interleaved=interleaved)
    return spec, torch.from_numpy(spec.table(np.arange(MAX_POSITIONS))).to(DEVICE)


def ints(values: list[int]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def turned(spec: RopeSpec, x: torch.Tensor) -> npt.NDArray[np.float64]:
    out: npt.NDArray[np.float64] = OPS["rope"].reference(spec.attrs(), f64(x), np.array(POSITIONS))
    return out


def bound(x: npt.NDArray[Any], want: npt.NDArray[Any], dtype: torch.dtype) -> npt.NDArray[Any]:
    """Two products and a sum."""
    out: npt.NDArray[Any] = 4 * F32_EPS * np.abs(x).max() + ROUNDING[dtype] * np.abs(want)
    return out


def marked_cache(kv_heads: int, head_dim: int, dtype: torch.dtype) -> Cache:
    """The end of a larger one: slot -1 would be before it."""
    whole = Cache.zeros(dtype, 1 + BLOCKS, kv_heads, BLOCK_SIZE, head_dim, DEVICE)
    whole.codes.fill_(MARK)
    if whole.scales is not None:
        whole.scales.fill_(MARK)
    return Cache(*(None if part is None else part[1:] for part in whole))  # type: ignore[arg-type]


def nothing_before(cache: Cache) -> bool:
    first = cache.memory._base[0].view(cache.codes.dtype)  # type: ignore[index]
    codes = cache.codes[0].numel()
    return bool((first[:codes] == MARK).all()) and bool((first[codes:].view(torch.float32) == MARK).all())


def written(kv_heads: int, head_dim: int, k: npt.NDArray[Any], v: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """A marked cache after the op table's kv_write, laid out as the device's."""
    cache = np.full((2, BLOCKS, BLOCK_SIZE, kv_heads, head_dim), MARK)
    tokens = [i for i, slot in enumerate(SLOTS) if slot >= 0]
    OPS["kv_write"].reference({}, cache, k[tokens], v[tokens], np.array(SLOTS)[tokens])
    return cache.transpose(1, 0, 3, 2, 4)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("head_dim", "rotary_dim", "heads", "kv_heads"), SHAPES)
@pytest.mark.parametrize(("dtype", "stored"), [(F32, F32), (BF16, BF16), (BF16, F16)])
def test_rope_and_cache_in_one_launch(
    head_dim: int, rotary_dim: int, heads: int, kv_heads: int, dtype: torch.dtype, stored: torch.dtype,
    interleaved: bool,
) -> None:  # fmt: skip
    spec, table = spec_of(head_dim, rotary_dim, interleaved)
    merged = strided(len(SLOTS), (heads + 2 * kv_heads) * head_dim, dtype, 1)
    q, k, v = merged.split([n * head_dim for n in (heads, kv_heads, kv_heads)], dim=1)
    before, want, keys = f64(q), turned(spec, q), turned(spec, k)
    cache, out = marked_cache(kv_heads, head_dim, stored), strided(len(SLOTS), heads * head_dim, dtype)
    args = (q, k, v, ints(POSITIONS), ints(SLOTS), table, head_dim, rotary_dim, interleaved)
    rope.rope_kv_write(out, cache, *args)
    assert_within(f64(out), want, bound(before, want, dtype))
    assert gaps_untouched(out)
    exact = written(kv_heads, head_dim, keys, f64(v))
    limit = bound(f64(k), exact, stored)
    limit[:, 1] = ROUNDING[stored] * np.abs(exact[:, 1]) * (dtype != stored)
    assert_within(f64(cache.codes), exact, np.where(exact == MARK, 0, limit))
    assert nothing_before(cache)

    again = marked_cache(kv_heads, head_dim, stored)
    rope.rope_kv_write(q, again, *args)
    assert torch.equal(q, out) and torch.equal(again.codes, cache.codes)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("head_dim", "rotary_dim", "heads", "kv_heads"), SHAPES[::2])
def test_rope_alone(head_dim: int, rotary_dim: int, heads: int, kv_heads: int, interleaved: bool) -> None:
    spec, table = spec_of(head_dim, rotary_dim, interleaved)
    x, out = strided(len(SLOTS), heads * head_dim, F16, 1), strided(len(SLOTS), heads * head_dim, F32)
    rope.rope(out, x, ints(POSITIONS), table, head_dim, rotary_dim, interleaved)
    want = turned(spec, x)
    assert_within(f64(out), want, bound(f64(x), want, F32))
    assert gaps_untouched(out)
    rope.rope(x, x, ints(POSITIONS), table, head_dim, rotary_dim, interleaved)
    assert_within(f64(x), f64(out), ROUNDING[F16] * np.abs(f64(out)) + 2.0**-25)


@pytest.mark.filterwarnings("ignore:overflow encountered in cast")  # the interpreter's NumPy
@pytest.mark.parametrize("stored", [F32, F16, BF16])
@pytest.mark.parametrize(("head_dim", "kv_heads"), [(12, 3), (80, 9)])
def test_kv_write_alone(head_dim: int, kv_heads: int, stored: torch.dtype) -> None:
    k, v = (strided(len(SLOTS), kv_heads * head_dim, F32, seed) for seed in (1, 2))
    cache = marked_cache(kv_heads, head_dim, stored)
    rope.kv_write(cache, k, v, ints(SLOTS))
    exact = written(kv_heads, head_dim, f64(k), f64(v))
    assert_within(f64(cache.codes), exact, np.where(exact == MARK, 0, ROUNDING[stored] * np.abs(exact) + 2.0**-25))
    assert nothing_before(cache)
    k[0, 0], v[0, 1] = 1e5, -1e5  # in slot 15, the last of block 3
    rope.kv_write(cache, k, v, ints(SLOTS))
    infinite, (keys, values) = stored == F16, cache.codes[3]
    assert torch.isinf(cache.codes).sum() == 2 * infinite
    assert torch.isinf(keys[0, 3, 0]) == infinite and (values[0, 3, 1] == -torch.inf) == infinite


def test_no_rows() -> None:
    _, table = spec_of(8, 8, False)
    x, cache = torch.ones(0, 16, device=DEVICE), marked_cache(2, 8, F32)
    rope.rope(x, x, ints([]), table, 8, 8, False)
    rope.kv_write(cache, x, x, ints([]))
    rope.rope_kv_write(x, cache, x, x, x, ints([]), ints([]), table, 8, 8, False)
    assert bool((cache.codes == MARK).all())


#: Of caches with scales: the torch type of the codes, and as the op table has them.
CODES = {torch.int8: I8, torch.uint8: E4M3}


def tokens_of(cache: Cache) -> npt.NDArray[Any]:
    """A cache with scales as the op table has it."""
    assert cache.scales is not None
    parts = cache.codes.cpu().numpy().transpose(1, 0, 3, 2, 4), cache.scales.cpu().numpy().transpose(1, 0, 3, 2)
    tokens = np.empty(parts[1].shape, scaled_token(CODES[cache.codes.dtype], parts[0].shape[-1]))
    tokens["codes"], tokens["scale"] = parts[0].view(tokens["codes"].dtype), parts[1]
    return tokens


@pytest.mark.parametrize("stored", CODES)
@pytest.mark.parametrize(("head_dim", "kv_heads", "dtype"), [(12, 3, F32), (80, 9, BF16), (64, 17, F16)])
def test_codes_and_scales_of_kv_write_are_the_references_bit_for_bit(
    head_dim: int, kv_heads: int, dtype: torch.dtype, stored: torch.dtype
) -> None:
    k, v = (strided(len(SLOTS), kv_heads * head_dim, dtype, seed, spread=10.0**seed) for seed in (1, 2))
    v[0, :head_dim] = 0.0
    v[0, 1] = -0.0
    k[2, 3], k[3, head_dim], v[3, 5], v[2, head_dim + 1] = torch.nan, torch.inf, -torch.inf, 1e-7
    k[0, :8] = torch.tensor([127.0, 0.5, 1.5, -2.5, 3.5, -126.5, 1e-30, -0.5])  # ties, of a scale of 1
    k[0, 8:head_dim] = 0.0
    cache = marked_cache(kv_heads, head_dim, stored)
    want = tokens_of(cache)
    tokens = [i for i, slot in enumerate(SLOTS) if slot >= 0]
    given = [x.cpu().float().numpy()[tokens] for x in (k, v)]
    OPS["kv_write"].reference({}, want, *given, np.array(SLOTS)[tokens])
    rope.kv_write(cache, k, v, ints(SLOTS))
    got = tokens_of(cache)
    assert np.isinf(got["scale"]).sum() == 3
    np.testing.assert_array_equal(got["scale"], want["scale"])
    np.testing.assert_array_equal(got["codes"].view(np.uint8), want["codes"].view(np.uint8))
    assert nothing_before(cache)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("stored", CODES)
@pytest.mark.parametrize(("head_dim", "rotary_dim", "heads", "kv_heads"), SHAPES)
def test_turned_keys_become_codes(
    head_dim: int, rotary_dim: int, heads: int, kv_heads: int, stored: torch.dtype, interleaved: bool
) -> None:
    """A key's last bit may differ, where a product and a sum are one instruction, so a code may be the next one."""
    spec, table = spec_of(head_dim, rotary_dim, interleaved)
    q, k, v = (strided(len(SLOTS), n * head_dim, F32, seed) for seed, n in ((0, heads), (1, kv_heads), (2, kv_heads)))
    if rotary_dim < head_dim:  # a scale that comes from what does not turn
        k[:, head_dim - 1] = 50.0
    cache, out = marked_cache(kv_heads, head_dim, stored), strided(len(SLOTS), heads * head_dim, F32)
    want = tokens_of(cache)
    tokens = [i for i, slot in enumerate(SLOTS) if slot >= 0]
    keys = turned(spec, k).astype(np.float32)[tokens]
    OPS["kv_write"].reference({}, want, keys, v.cpu().numpy()[tokens], np.array(SLOTS)[tokens])
    rope.rope_kv_write(out, cache, q, k, v, ints(POSITIONS), ints(SLOTS), table, head_dim, rotary_dim, interleaved)
    got = tokens_of(cache)
    np.testing.assert_allclose(got["scale"][0], want["scale"][0], rtol=8 * F32_EPS)
    near = got["codes"][0].view(np.int8).astype(int) - want["codes"][0].view(np.int8)
    assert np.abs(near).max() <= 1 and (near != 0).mean() < 0.01
    np.testing.assert_array_equal(got["scale"][1], want["scale"][1])
    np.testing.assert_array_equal(got["codes"][1].view(np.uint8), want["codes"][1].view(np.uint8))
    assert_within(f64(out), turned(spec, q), bound(f64(q), turned(spec, q), F32))
    assert nothing_before(cache)
