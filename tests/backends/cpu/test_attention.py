"""KV writes and attention over ragged batches against NumPy, and the same bits whatever the batch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from pelton.graph import E4M3, I8
from pelton.graph.ops import _cached, _scaled_tokens, scaled_token
from tests.helpers.tolerance import BF16_EPS, assert_within

from .native import BF16_DOT, ISAS, NONE, Runner, native
from .test_rowwise import rope_table, rotate

F32_CACHE, BF16_CACHE, INT8_CACHE, FP8_CACHE, F16_CACHE = FORMATS = range(5)
SCALED = {INT8_CACHE: I8, FP8_CACHE: E4M3}
SPLIT = 512  # keys that are attended to on their own, csrc/cpu/ops/attention/contract.h


@dataclass(frozen=True)
class Shape:
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 64
    block_size: int = 16
    format: int = BF16_CACHE
    window: int = 0
    softcap: float = 0.0
    alibi: bool = False


@dataclass
class Sequence:
    """Keys, values and queries of all positions; the tests feed them in whatever steps they like."""

    q: Any
    k: Any
    v: Any

    @staticmethod
    def random(shape: Shape, length: int, seed: int) -> Sequence:
        r = np.random.default_rng([length, seed])
        q = r.normal(size=(length, shape.heads * shape.head_dim)).astype(np.float32) * 2
        k, v = (r.normal(size=(length, shape.kv_heads * shape.head_dim)).astype(np.float32) for _ in range(2))
        return Sequence(q, k, v)


def slopes_of(shape: Shape) -> Any:
    return (2.0 ** -np.arange(1, shape.heads + 1)).astype(np.float32)


class Model:
    """One layer's cache with kv_write and attention; ``step`` feeds (sequence index, begin, end) pieces."""

    def __init__(self, isa: str, shape: Shape, sequences: list[Sequence], threads: int = 1) -> None:
        self.shape, self.sequences = shape, sequences
        longest = max(len(s.q) for s in sequences)
        self.width = -(-longest // shape.block_size)
        num_blocks = self.width * len(sequences) + 3
        ids = np.random.default_rng(1).permutation(num_blocks)[: self.width * len(sequences)]
        self.blocks = ids.reshape(len(sequences), self.width)
        total = sum(len(s.q) for s in sequences)
        q_cols, kv_cols = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
        run = self.run = Runner(isa, threads, (total + 1) * (2 * q_cols + 2 * kv_cols + 64) + 4096)
        size = native.cache_bytes(shape.kv_heads, shape.head_dim, shape.block_size, num_blocks, shape.format)
        cache = run.cache(size)
        operands = {n: run.place(n, total, c, c + 3) for n, c in
                    [("out", q_cols), ("q", q_cols), ("k", kv_cols), ("v", kv_cols)]}  # fmt: skip
        slots, table, lens, starts = (run.input([0]) for _ in range(4))
        geometry = [shape.block_size, num_blocks, shape.format]
        run.call("kv_write", [cache, operands["k"], operands["v"], slots],
                 [shape.kv_heads, shape.head_dim, kv_cols + 3, kv_cols + 3, *geometry])  # fmt: skip
        slopes = run.const(slopes_of(shape)) if shape.alibi else NONE
        self.scale = shape.head_dim**-0.5
        ints = [shape.heads, shape.kv_heads, shape.head_dim, q_cols + 3, q_cols + 3, *geometry, shape.window]
        run.call("attention", [operands["out"], operands["q"], cache, table, lens, starts, slopes], ints,
                 [self.scale, shape.softcap])  # fmt: skip

    def write(self, index: int, begin: int, end: int) -> None:
        """Fills the cache without attending to it."""
        size, sequence = self.shape.block_size, self.sequences[index]
        for first in range(begin, end, 4096):
            rows = range(first, min(first + 4096, end))
            for name in ("k", "v"):
                self.run.view(name)[: len(rows)] = getattr(sequence, name)[rows.start : rows.stop]
            slots = [int(self.blocks[index, p // size]) * size + p % size for p in rows]
            self.run.inputs = [np.asarray(slots, np.int32), *(np.zeros(1, np.int32) for _ in range(3))]
            self.run.run(len(rows), 0)

    def step(self, pieces: list[tuple[int, int, int]]) -> list[Any]:
        rows = {"q": [], "k": [], "v": []}  # type: dict[str, list[Any]]
        slots: list[int] = []
        size = self.shape.block_size
        for s, begin, end in pieces:
            for name, parts in rows.items():
                parts.append(getattr(self.sequences[s], name)[begin:end])
            slots += [int(self.blocks[s, p // size]) * size + p % size for p in range(begin, end)]
        for name, parts in rows.items():
            self.run.view(name)[: len(slots)] = np.concatenate(parts)
        starts = np.cumsum([0] + [end - begin for _, begin, end in pieces])
        # Entries behind the blocks in use are padding and may be anything.
        table = np.stack([np.where(np.arange(self.width) * size < end, self.blocks[s], -1) for s, _, end in pieces])
        lens = [end for _, _, end in pieces]
        self.run.inputs = [np.ascontiguousarray(a, dtype=np.int32).reshape(-1) for a in (slots, table, lens, starts)]
        self.run.run(len(slots), len(pieces))
        out = self.run.view("out")[: len(slots)].copy()
        return np.split(out, starts[1:-1])


def stored(shape: Shape, x: Any) -> Any:
    """What the cache holds of [tokens, kv_heads * head_dim], as float64 [tokens, kv_heads, head_dim]."""
    x = x.reshape(len(x), shape.kv_heads, -1)
    if shape.format in SCALED:
        return _cached(_scaled_tokens(x, scaled_token(SCALED[shape.format], shape.head_dim))).astype(np.float64)
    types = {F32_CACHE: np.float32, BF16_CACHE: ml_dtypes.bfloat16, F16_CACHE: np.float16}
    return x.astype(types[shape.format]).astype(np.float64)


def reference(isa: str, shape: Shape, seq: Sequence, begin: int, end: int) -> tuple[Any, Any]:
    """Exact attention in double precision over what the cache holds, and a bound of the error."""
    dots = isa in BF16_DOT and shape.format in (BF16_CACHE, FP8_CACHE)
    integers = isa in BF16_DOT and shape.format == INT8_CACHE
    group = shape.heads // shape.kv_heads
    k = stored(shape, seq.k[:end]).repeat(group, axis=1)
    v = stored(shape, seq.v[:end]).repeat(group, axis=1)
    q = seq.q[begin:end].astype(ml_dtypes.bfloat16) if dots else seq.q[begin:end]
    q = q.astype(np.float64).reshape(end - begin, shape.heads, -1)
    raw = np.einsum("thd,jhd->htj", q, k) * shape.head_dim**-0.5
    scores = shape.softcap * np.tanh(raw / shape.softcap) if shape.softcap else raw
    i, j = np.arange(begin, end)[:, None], np.arange(end)[None]
    if shape.alibi:
        scores = scores + slopes_of(shape).astype(np.float64)[:, None, None] * (j - i)
    visible = (j <= i) & ((j > i - shape.window) if shape.window else True)
    scores = np.where(visible, scores, -np.inf)
    p = np.exp(scores - scores.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    out = np.einsum("htj,jhd->thd", p, v).reshape(end - begin, -1)
    weight = np.einsum("htj,jhd->thd", p, np.abs(v)).reshape(end - begin, -1)
    # An error e of a score is a relative error e of a probability; bf16 rounds each probability once.
    size = np.einsum("thd,jhd->htj", np.abs(q), np.abs(k)).max() * shape.head_dim**-0.5
    relative = 2e-6 * (1 + size) + (BF16_EPS if dots else 0)
    bound = relative * 2 * weight + 1e-6
    if integers:
        # A query is rounded to 1 / 32512 of its largest number, the products of probability and scale of 64
        # keys to 1 / 130000 of what they are at most: of the largest probability a query has, at most.
        score = np.abs(q).max(-1).T[:, :, None] / 32512 * np.abs(k).sum(-1).T[:, None] * shape.head_dim**-0.5
        bound += 2 * score.max() * weight
        largest = p.max(-1) * np.abs(v).max((0, 2))[:, None]
        bound += (largest / 130000 * np.minimum(np.arange(begin, end) + 1, shape.window or end)).T.repeat(
            shape.head_dim, -1
        )
    return out, bound


SHAPES = [
    Shape(),
    Shape(format=F32_CACHE),
    Shape(heads=9, kv_heads=3, head_dim=64, block_size=32),
    Shape(heads=3, kv_heads=3, head_dim=80, block_size=48),
    Shape(heads=7, kv_heads=1, head_dim=96, format=F32_CACHE),
    Shape(heads=2, kv_heads=2, head_dim=8, block_size=128),
    Shape(heads=2, kv_heads=1, head_dim=12, format=F32_CACHE, block_size=64),
    Shape(heads=8, kv_heads=2, head_dim=128),
    Shape(heads=2, kv_heads=1, head_dim=256, window=50),
    Shape(heads=4, kv_heads=2, head_dim=512, format=F32_CACHE),
    Shape(window=7, softcap=5.0),
    Shape(window=70, format=F32_CACHE),
    Shape(softcap=20.0, format=F32_CACHE),
    Shape(alibi=True),
    Shape(alibi=True, heads=60, kv_heads=1, head_dim=16),
    Shape(format=INT8_CACHE),
    Shape(heads=9, kv_heads=3, head_dim=80, block_size=48, format=INT8_CACHE),
    Shape(heads=2, kv_heads=1, head_dim=14, format=INT8_CACHE, softcap=5.0),
    Shape(heads=8, kv_heads=1, head_dim=128, window=70, format=INT8_CACHE),
    Shape(heads=4, kv_heads=2, head_dim=512, format=INT8_CACHE),
    Shape(alibi=True, heads=14, kv_heads=2, head_dim=20, format=INT8_CACHE),
    Shape(format=FP8_CACHE),
    Shape(heads=9, kv_heads=3, head_dim=80, block_size=48, format=FP8_CACHE),
    Shape(heads=2, kv_heads=1, head_dim=14, format=FP8_CACHE, softcap=5.0),
    Shape(heads=8, kv_heads=1, head_dim=128, window=70, format=FP8_CACHE),
    Shape(heads=4, kv_heads=2, head_dim=512, format=FP8_CACHE),
    Shape(alibi=True, heads=14, kv_heads=2, head_dim=20, format=FP8_CACHE),
    Shape(format=F16_CACHE),
    Shape(heads=9, kv_heads=3, head_dim=80, block_size=48, format=F16_CACHE),
    Shape(heads=2, kv_heads=1, head_dim=14, format=F16_CACHE, softcap=5.0),
    Shape(heads=8, kv_heads=1, head_dim=128, window=70, format=F16_CACHE),
    Shape(heads=4, kv_heads=2, head_dim=512, block_size=32, format=F16_CACHE),
    Shape(alibi=True, heads=14, kv_heads=2, head_dim=20, format=F16_CACHE),
]


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_prefill_chunks_and_decode_mixed(isa: str, shape: Shape) -> None:
    sequences = [Sequence.random(shape, n, i) for i, n in enumerate([150, 1, 64, 65, 33])]
    model = Model(isa, shape, sequences, threads=2)
    steps = [
        [(0, 0, 100), (1, 0, 1), (2, 0, 63)],
        [(2, 63, 64), (3, 0, 65), (0, 100, 149), (4, 0, 31)],
        [(4, 31, 33), (0, 149, 150)],
    ]
    for pieces in steps:
        for (s, begin, end), got in zip(pieces, model.step(pieces), strict=True):
            want, bound = reference(isa, shape, sequences[s], begin, end)
            assert_within(got, want, bound)
    assert model.run.gaps_untouched("out")


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("window", [0, 40])
def test_a_row_has_the_same_bits_however_it_is_batched(isa: str, format: int, window: int) -> None:
    shape = Shape(heads=6, kv_heads=2, head_dim=48, format=format, window=window)
    sequences = [Sequence.random(shape, n, i) for i, n in enumerate([140, 90, 20])]
    whole = Model(isa, shape, sequences, threads=1).step([(0, 0, 140)])[0]

    alone = Model(isa, shape, sequences, threads=2)
    assert np.array_equal(np.concatenate([alone.step([(0, p, p + 1)])[0] for p in range(140)]), whole)

    chunked = Model(isa, shape, sequences, threads=2)
    parts = [chunked.step([(2, 0, 20), (0, 0, 37), (1, 0, 64)])[1]]
    parts += [chunked.step([(0, 37, 101), (1, 64, 65)])[0], chunked.step([(1, 65, 90), (0, 101, 140)])[1]]
    assert np.array_equal(np.concatenate(parts), whole)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("shape", [Shape(6, 3, 16), Shape(4, 2, 32, window=700, softcap=20.0)], ids=str)
def test_splits_of_a_long_context_change_no_bit(isa: str, format: int, shape: Shape) -> None:
    """1 to 64 threads, chunks that end beside the borders of splits, company or none."""
    shape = replace(shape, format=format, block_size=32)
    length = 2 * SPLIT + 130
    sequences = [Sequence.random(shape, length, 1), Sequence.random(shape, 90, 2)]
    whole = Model(isa, shape, sequences, threads=1).step([(0, 0, length)])[0]
    for position in (SPLIT - 1, SPLIT, 2 * SPLIT + 64, length - 1):
        want, bound = reference(isa, shape, sequences[0], position, position + 1)
        assert_within(whole[position : position + 1], want, bound)
    cuts = [
        0,
        300,
        SPLIT - 1,
        SPLIT,
        SPLIT + 1,
        SPLIT + 2,
        2 * SPLIT - 3,
        2 * SPLIT + 1,
        length - 2,
        length - 1,
        length,
    ]
    for threads, company in [(1, False), (2, True), (7, False), (64, True)]:
        model = Model(isa, shape, sequences, threads)
        parts = []
        for n, (a, b) in enumerate(pairwise(cuts)):
            others = [(1, 9 * n, 9 * n + 9)] if company and n else []
            parts.append(model.step([(0, a, b), *others])[0])
        assert np.array_equal(np.concatenate(parts), whole), threads


def test_more_results_of_splits_than_the_shared_scratch_takes() -> None:
    """Chunks of long contexts on many threads: some tiles are divided, others stay whole."""
    shape = Shape(heads=6, kv_heads=2, head_dim=16)
    length = 8000
    sequence = Sequence.random(shape, length, 3)
    results = []
    for threads in (1, 64):
        model = Model(ISAS[-1], shape, [sequence], threads)
        model.write(0, 0, length - 512)
        results.append(model.step([(0, length - 512, length)])[0])
    assert np.array_equal(*results)
    want, bound = reference(ISAS[-1], shape, sequence, length - 20, length)
    assert_within(results[0][-20:], want, bound)


@pytest.mark.parametrize("isa", ISAS[-1:])
@pytest.mark.parametrize("format", FORMATS)
def test_contexts_of_32k_tokens(isa: str, format: int) -> None:
    shape = Shape(heads=2, kv_heads=1, head_dim=32, block_size=32, format=format)
    length = 1 << 15
    sequence = Sequence.random(shape, length, 7)
    sequence.q *= 4  # attends to few keys: else the values average out and nothing is left to see
    model = Model(isa, shape, [sequence], threads=3)
    model.write(0, 0, length - 41)
    got = np.concatenate([model.step([(0, length - 41, length - 1)])[0], model.step([(0, length - 1, length)])[0]])
    want, bound = reference(isa, shape, sequence, length - 41, length)
    assert_within(got, want, bound)
    alone = Model(isa, shape, [sequence], threads=1)
    alone.write(0, 0, length - 1)
    assert np.array_equal(alone.step([(0, length - 1, length)])[0], got[-1:])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("format", FORMATS)
def test_garbage_of_an_earlier_owner_of_a_block_does_not_leak(isa: str, format: int) -> None:
    shape = Shape(format=format, head_dim=16)
    poison = Sequence(*(np.full((40, c), np.nan, np.float32) for c in (64, 32, 32)))
    clean = Sequence.random(shape, 37, 3)
    model = Model(isa, shape, [poison, clean])
    model.step([(0, 0, 40)])
    model.blocks[1] = model.blocks[0]
    for begin, end in [(0, 33), (33, 34), (34, 37)]:
        got = model.step([(1, begin, end)])[0]
        want, bound = reference(isa, shape, clean, begin, end)
        assert_within(got, want, bound)


def special_heads(head_dim: int) -> Any:
    """Float32 [n, head_dim] whose largest number is 448 (127 scales or 448 of 1 behind it) and the like: every float
    next to a border of two E4M3 codes, subnormals, infinities, NaN, zeros of both signs, the largest floats and the
    smallest."""
    codes = np.arange(127, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    borders = (codes[1:] + codes[:-1]) / 2
    near = np.concatenate([codes, borders, np.nextafter(borders, 0), np.nextafter(borders, np.float32(500))])
    near = np.concatenate([near, -near])
    near = np.resize(near, (-(-len(near) // (head_dim - 1)), head_dim - 1))
    heads = np.concatenate([np.full((len(near), 1), 448, np.float32), near], axis=1)
    random = np.random.default_rng(8).standard_normal((40, head_dim)).astype(np.float32)
    random *= np.float32(10.0) ** np.arange(-40, 40, 2)[:, None].clip(-38, 37)
    random[3] *= np.float32(1e-5)  # all of it subnormal
    other = np.tile(random[20], (6, 1))
    other[0, 5], other[1, 2], other[2, -1], other[3], other[4], other[5, 1] = np.nan, np.inf, -np.inf, 0, -0.0, 3.4e38
    return np.concatenate([heads, heads * np.float32(2.0**-20), random, other])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("format", SCALED)
@pytest.mark.parametrize("head_dim", [64, 22])
def test_codes_and_scales_in_the_cache_are_those_of_the_reference(isa: str, format: int, head_dim: int) -> None:
    """In every tier the same bits, whatever the numbers; a token that is not finite has codes 0, infinite scales."""
    k = special_heads(head_dim)
    k = np.concatenate([k, k[: len(k) % 2]]).reshape(-1, 2 * head_dim)
    v, size, blocks = np.roll(k, 3, axis=0), 32, len(k) // 32 + 1
    run = Runner(isa, 2)
    cache = run.cache(native.cache_bytes(2, head_dim, size, blocks, format))
    slots = np.random.default_rng(2).permutation(size * blocks)[: len(k)]
    operands = [cache, run.put("k", k), run.put("v", v), run.input(slots)]
    run.call("kv_write", operands, [2, head_dim, 2 * head_dim, 2 * head_dim, size, blocks, format])
    run.run(len(k))

    lanes, padded = -(-head_dim // 4), -(-head_dim // 16) * 16
    held = run.executor.cache(0).reshape(blocks, 2, -1)
    keys, values, scales = np.split(held, [lanes * size * 4, (lanes + padded // 4) * size * 4], axis=2)
    keys = keys.reshape(blocks, 2, lanes, size, 4).transpose(0, 3, 1, 2, 4)  # block, token, head, lane, byte
    values = values.reshape(blocks, 2, size // 4, padded, 4).transpose(0, 2, 4, 1, 3)
    if format == FP8_CACHE:
        keys, values = keys[..., [0, 2, 1, 3]], values[:, :, [0, 2, 1, 3]]
    scales = scales.copy().view(np.float32).reshape(blocks, 2, 2, size).transpose(2, 0, 3, 1)
    for part, codes, x in ((0, keys, k), (1, values, v)):
        want = _scaled_tokens(x.reshape(-1, 2, head_dim), scaled_token(SCALED[format], head_dim))
        got = codes.reshape(size * blocks, 2, -1)[slots, :, :head_dim]
        assert np.array_equal(got, want["codes"].view(np.uint8))
        assert np.array_equal(scales[part].reshape(-1, 2)[slots], want["scale"])
    # The reference itself: what 448 stands for is exact, codes are never NaN, nothing finite comes of a NaN.
    want = _scaled_tokens(k.reshape(-1, head_dim), scaled_token(E4M3, head_dim))
    with np.errstate(invalid="ignore"):
        back, largest = _cached(want), np.abs(k.reshape(-1, head_dim)).max(axis=-1)
    assert np.isfinite(want["codes"].astype(np.float32)).all()
    finite = np.isfinite(largest)
    assert not finite.all() and np.isnan(back[~finite]).all()
    assert np.allclose(np.abs(back[finite]).max(axis=-1), largest[finite], rtol=1e-6, atol=1e-42)


def special_f16_heads(head_dim: int) -> Any:
    """Float32 [n, head_dim]: every f16 number, what lies halfway to the next and the floats beside that; infinities,
    NaN, what is too large (from 65520 on) and just not, subnormal floats."""
    numbers = np.arange(0x7C00, dtype=np.uint16).view(np.float16).astype(np.float32)
    borders = np.append((numbers[1:] + numbers[:-1]) / 2, np.float32(65520))
    others = np.array([np.inf, np.nan, 65536, 1e5, 3.4e38, 1e-10, 1e-45, 2e-38], np.float32)
    x = np.concatenate([numbers, borders, np.nextafter(borders, 0), np.nextafter(borders, np.float32(1e9)), others])
    return np.resize(np.concatenate([x, -x]), (-(-2 * len(x) // head_dim), head_dim))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("head_dim", [64, 22])
def test_f16_in_the_cache_is_that_of_numpy(isa: str, head_dim: int) -> None:
    k = special_f16_heads(head_dim)
    k = np.concatenate([k, k[: len(k) % 2]]).reshape(-1, 2 * head_dim)
    v, size, blocks = np.roll(k, 3, axis=0), 32, len(k) // 32 + 1
    run = Runner(isa, 2)
    cache = run.cache(native.cache_bytes(2, head_dim, size, blocks, F16_CACHE))
    slots = np.random.default_rng(2).permutation(size * blocks)[: len(k)]
    operands = [cache, run.put("k", k), run.put("v", v), run.input(slots)]
    run.call("kv_write", operands, [2, head_dim, 2 * head_dim, 2 * head_dim, size, blocks, F16_CACHE])
    run.run(len(k))

    padded = -(-head_dim // 16) * 16
    held = run.executor.cache(0).view(np.uint16).reshape(blocks, 2, -1)
    keys, values = np.split(held, [head_dim * size], axis=2)
    keys = keys.reshape(blocks, 2, head_dim, size).transpose(0, 3, 1, 2)
    values = values.reshape(blocks, 2, size, padded).transpose(0, 2, 1, 3)[..., :head_dim]
    for part, x in ((keys, k), (values, v)):
        with np.errstate(over="ignore"):
            want = x.astype(np.float16).view(np.uint16)
        assert np.array_equal(part.reshape(size * blocks, -1)[slots], want)


@pytest.mark.parametrize("isa", ISAS)
def test_every_f16_number_is_read_as_what_it_is(isa: str) -> None:
    """As the values of tokens that are seen one at a time; infinities as well, lest what overflows goes unnoticed."""
    numbers = np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float32)
    x = np.resize(numbers[~np.isnan(numbers)], (1025, 62))
    shape = Shape(heads=1, kv_heads=1, head_dim=62, format=F16_CACHE, window=1)
    sequence = Sequence(np.ones_like(x), np.zeros_like(x), x)
    got = Model(isa, shape, [sequence]).step([(0, 0, len(x))])[0]
    assert np.array_equal(got, x)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("part", ["k", "v"])
def test_every_fp8_code_is_read_as_what_it_stands_for(isa: str, part: str) -> None:
    """Both zeros, subnormals and 448. 254 codes as the values, or the keys, of tokens that are seen one at a time."""
    codes = np.array([c for c in range(256) if c & 127 != 127], np.uint8).view(ml_dtypes.float8_e4m3fn)
    shape = Shape(heads=1, kv_heads=1, head_dim=32, format=FP8_CACHE, window=1 if part == "v" else 0)
    length = len(codes)
    x = np.zeros((length, 32), np.float32)
    x[:, 0] = 448  # hence the scale is 1
    x[np.arange(length), 1 + np.arange(length) % 31] = codes.astype(np.float32)
    sequence = Sequence(np.ones_like(x), np.zeros_like(x), x.copy())
    if part == "k":
        # The score of a code is itself times 2^-4: the value of a key is its number, so the mean tells a wrong score.
        sequence = Sequence(np.zeros_like(x), x, np.random.default_rng(1).standard_normal(x.shape).astype(np.float32))
        sequence.q[:, 1:] = 0.0625
    model = Model(isa, shape, [sequence])
    got = model.step([(0, 0, length)])[0]
    if part == "v":
        assert np.array_equal(got, x)
    else:
        want, bound = reference(isa, shape, sequence, 0, length)
        assert_within(got, want, bound)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("interleaved", [False, True])
def test_rope_kv_write_is_rope_and_kv_write(isa: str, format: int, interleaved: bool) -> None:
    heads, kv_heads, dim, rot, tokens, blocks = 4, 2, 24, 16, 9, 3
    r = np.random.default_rng(4)
    q, k, v = (r.normal(size=(tokens, h * dim)).astype(np.float32) for h in (heads, kv_heads, kv_heads))
    positions, slots = r.integers(0, 30, tokens), r.permutation(16 * blocks)[:tokens]
    table = rope_table(30, rot)
    size = native.cache_bytes(kv_heads, dim, 16, blocks, format)
    outputs = []
    for fused in (True, False):
        run = Runner(isa, 2)
        cache = run.cache(size)
        pq, pk, pv = run.put("q", q, q.shape[1] + 1), run.put("k", k, k.shape[1] + 2), run.put("v", v)
        pos, where, tab = run.input(positions), run.input(slots), run.const(table)
        out = run.place("out", tokens, heads * dim)
        lds = [heads * dim + 1, kv_heads * dim + 2, kv_heads * dim]
        geometry = [16, blocks, format]
        if fused:
            run.call("rope_kv_write", [out, cache, pq, pk, pv, tab, pos, where],
                     [heads, kv_heads, dim, rot, heads * dim, *lds, int(interleaved), 30, *geometry])  # fmt: skip
        else:
            rope = [dim, rot, int(interleaved), 30]
            run.call("rope", [out, pq, tab, pos], [0, heads, *rope[:2], heads * dim, lds[0], *rope[2:]])
            run.call("rope", [pk, pk, tab, pos], [0, kv_heads, *rope[:2], lds[1], lds[1], *rope[2:]])
            run.call("kv_write", [cache, pk, pv, where], [kv_heads, dim, *lds[1:], *geometry])
        # Read the cache back: a query of zeros weighs all keys alike, so one slot at a time shows its value.
        ints = [heads, kv_heads, dim, heads * dim, lds[0], *geometry, 0]
        run.call("attention", [out, pq, cache, run.input([0]), run.input([1]), run.input([0, 0]), NONE], ints, [1, 0])
        run.inputs[-3:] = [np.array(a, np.int32) for a in ([0, 1, 2], [16 * blocks], [0, tokens])]
        run.run(tokens, 1)
        outputs.append(run.view("out").copy())
    assert np.array_equal(outputs[0], outputs[1])
    want = rotate(q.reshape(tokens, heads, dim), table[positions], rot, interleaved)
    assert np.isfinite(outputs[0]).all() and want.shape == (tokens, heads, dim)
