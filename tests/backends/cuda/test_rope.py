"""Rotary embeddings and the writing of the KV cache on the device against the op table."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from pelton.graph import OPS
from pelton.graph.rope import RopeSpec
from tests.backends.cuda.device import DEVICE
from tests.backends.cuda.test_norms import BF16, F16, F32, ROUNDING, f64, gaps_untouched, strided
from tests.helpers.tolerance import F32_EPS, assert_within

from pelton.backends.cuda.triton import rope  # isort: skip  behind device, which chooses the interpreter

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


def marked_cache(kv_heads: int, head_dim: int, dtype: torch.dtype) -> torch.Tensor:
    """The end of a larger one: slot -1 would be before it."""
    return torch.full((1 + BLOCKS, 2, kv_heads, BLOCK_SIZE, head_dim), MARK, dtype=dtype, device=DEVICE)[1:]


def nothing_before(cache: torch.Tensor) -> bool:
    assert cache._base is not None
    return bool((cache._base[0] == MARK).all())


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
    assert_within(f64(cache), exact, np.where(exact == MARK, 0, limit))
    assert nothing_before(cache)

    again = marked_cache(kv_heads, head_dim, stored)
    rope.rope_kv_write(q, again, *args)
    assert torch.equal(q, out) and torch.equal(again, cache)


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
    assert_within(f64(cache), exact, np.where(exact == MARK, 0, ROUNDING[stored] * np.abs(exact) + 2.0**-25))
    assert nothing_before(cache)
    k[0, 0], v[0, 1] = 1e5, -1e5  # in slot 15, the last of block 3
    rope.kv_write(cache, k, v, ints(SLOTS))
    infinite = stored == F16
    assert torch.isinf(cache).sum() == 2 * infinite
    assert torch.isinf(cache[3, 0, 0, 3, 0]) == infinite and (cache[3, 1, 0, 3, 1] == -torch.inf) == infinite


def test_no_rows() -> None:
    _, table = spec_of(8, 8, False)
    x, cache = torch.ones(0, 16, device=DEVICE), marked_cache(2, 8, F32)
    rope.rope(x, x, ints([]), table, 8, 8, False)
    rope.kv_write(cache, x, x, ints([]))
    rope.rope_kv_write(x, cache, x, x, x, ints([]), ints([]), table, 8, 8, False)
    assert bool((cache == MARK).all())
