"""Attention over paged caches against its row of the op table: ragged batches, garbage wherever nothing may be read."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
import torch

from tests.backends.cuda.device import DEVICE

# isort: split
from pelton.backends.cuda.triton.attention import (
    choose_splits,
    decode_attention,
    decode_workspace_size,
    prefill_attention,
    prefill_tiles,
)
from pelton.backends.cuda.triton.cache import SCALED, Cache
from pelton.backends.cuda.triton.common import INTERPRETED
from pelton.graph.ops import _attention, _scaled_tokens, alibi_slopes, scaled_token
from pelton.graph.quantized import CODE_VALUES
from tests.backends.cuda.test_rope import CODES
from tests.helpers.tolerance import assert_within

BLOCK = 16
#: The relative error of one rounding to this type. Triton's interpreter truncates to bfloat16.
ROUNDING = {torch.float32: 0.0, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-7 if INTERPRETED else 2.0**-8}


@dataclass(frozen=True)
class Shape:
    heads: int = 3
    kv_heads: int = 1
    head_dim: int = 16
    dtype: torch.dtype = torch.float32
    window: int = 0
    softcap: float = 0.0
    alibi: bool = False
    spread: float = 1.0  # of keys and values

    @property
    def attrs(self) -> dict[str, Any]:
        scale = 1.7 * self.head_dim**-0.5
        return {"num_heads": self.heads, "scale": scale, "window": self.window, "softcap": self.softcap}


def numbers(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape, np.float32)).to(dtype)


def encoded(x: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Codes and scales as ``kv_write`` has them, or numbers of this type."""
    if dtype not in SCALED:
        return x.to(dtype), None
    tokens = _scaled_tokens(x.numpy(), scaled_token(CODES[dtype], x.shape[-1]))
    codes = np.ascontiguousarray(tokens["codes"]).view(np.int8 if dtype == torch.int8 else np.uint8)
    return torch.from_numpy(codes), torch.from_numpy(np.ascontiguousarray(tokens["scale"]))


def values_of(codes: torch.Tensor) -> torch.Tensor:
    """What codes of int8 and FP8 stand for."""
    return codes.float() if codes.dtype == torch.int8 else torch.from_numpy(CODE_VALUES[8][codes.numpy()])


def on_device(cache: Cache) -> Cache:
    """A copy."""
    _, _, kv_heads, block_size, head_dim = cache.codes.shape
    copy = Cache.zeros(cache.codes.dtype, len(cache.codes), kv_heads, block_size, head_dim, DEVICE)
    copy.memory.copy_(cache.memory)
    return copy


@dataclass
class Step:
    """Sequences of (length in the cache, query tokens), their keys and values in blocks drawn at random.

    cache: NaN wherever no query may look: slots beyond a sequence or before its window, and blocks of nobody, which the
    table names where nothing may be read; of caches with scales these are NaN, codes are not zero. whole: zeros there
    instead, which is what the reference reads, as float32.
    """

    shape: Shape
    sequences: list[tuple[int, int]]
    seed: int = 0
    dtype: torch.dtype = torch.float32
    q: torch.Tensor = field(init=False)
    out: torch.Tensor = field(init=False)

    def __post_init__(self) -> None:
        s, rng = self.shape, np.random.default_rng(self.seed)
        counts = [-(-length // BLOCK) for length, _ in self.sequences]
        free = rng.permutation(sum(counts) + 2)
        self.width = max(counts) + 2  # wider than any sequence needs
        self.table = np.full((len(counts), self.width), free[-1], np.int32)
        self.cache = Cache.zeros(s.dtype, len(free), s.kv_heads, BLOCK, s.head_dim, torch.device("cpu"))
        self.cache.codes.fill_(3 if s.dtype in SCALED else torch.nan)
        if self.cache.scales is not None:
            self.cache.scales.fill_(torch.nan)
        self.whole = torch.zeros(self.cache.codes.shape)
        for i, (length, queries) in enumerate(self.sequences):
            blocks, free = free[: counts[i]], free[counts[i] :]
            self.table[i, : counts[i]] = blocks
            n = np.arange(length)
            content = numbers(length, 2, s.kv_heads, s.head_dim, seed=self.seed + i) * s.spread
            codes, scales = encoded(content, s.dtype)
            means = codes.float() if scales is None else values_of(codes) * scales[..., None]
            self.whole[blocks[n // BLOCK], :, :, n % BLOCK] = means
            n = n[max(0, length - queries + 1 - s.window) if s.window else 0 :]
            self.table[i, : n[0] // BLOCK if length else 0] = free[-1]
            self.cache.codes[blocks[n // BLOCK], :, :, n % BLOCK] = codes[n]
            if self.cache.scales is not None and scales is not None:
                self.cache.scales[blocks[n // BLOCK], :, :, n % BLOCK] = scales[n]
        self.starts = np.cumsum([0] + [n for _, n in self.sequences]).astype(np.int32)
        self.lens = np.array([n for n, _ in self.sequences], np.int32)
        width = s.heads * s.head_dim
        # Columns of a wider matrix, and two rows of nobody. Queries are numbers of the cache's type, lest rounding
        # them be an error of its own.
        stored = self.dtype if s.dtype in SCALED else s.dtype
        wide = numbers(int(self.starts[-1]) + 2, width + 5, seed=self.seed + 99, dtype=stored).to(self.dtype)
        self.q = wide.to(DEVICE)[:, 3:-2]
        self.out = torch.full((len(wide), width + 1), 7.0, dtype=self.dtype, device=DEVICE)[:, :-1]

    def operands(self) -> tuple[Any, ...]:
        ints = (self.table.reshape(-1), np.array([self.width], np.int32), self.lens, self.starts)
        return (self.out, self.q, on_device(self.cache), *(torch.from_numpy(a).to(DEVICE) for a in ints))

    def slopes(self) -> torch.Tensor | None:
        return torch.from_numpy(alibi_slopes(self.shape.heads)).to(DEVICE) if self.shape.alibi else None

    def prefill(self, *, of: tuple[int, ...] | None = None) -> None:
        """The tiles of all sequences, or of these; one of nobody among them."""
        s = self.shape
        lens = [n if of is None or i in of else 0 for i, (_, n) in enumerate(self.sequences)]
        tiles = prefill_tiles(lens, self.lens, s.heads // s.kv_heads, s.head_dim, s.dtype, self.dtype)
        tiles = torch.from_numpy(np.insert(tiles, len(tiles) // 2, -1, axis=0)).to(DEVICE)
        prefill_attention(*self.operands(), tiles, self.slopes(), **s.attrs)

    def decode(self, num_splits: int, rows: list[int]) -> None:
        s = self.shape
        size = decode_workspace_size(len(rows), s.heads, s.head_dim, num_splits)
        workspace = torch.full((size + 1,), torch.nan, device=DEVICE)
        decode_attention(
            *self.operands(), torch.tensor(rows, dtype=torch.int32, device=DEVICE), self.slopes(), workspace,
            num_splits=num_splits, **s.attrs,
        )  # fmt: skip
        assert workspace[-1].isnan()

    def check(self, of: list[int] | None = None) -> None:
        """The rows of these sequences, or of all, mean what the reference says; others are as they were."""
        s = self.shape
        attrs = s.attrs | {"alibi": s.alibi}
        q = self.q.cpu().float().numpy()
        paged = self.whole.permute(1, 0, 3, 2, 4).numpy().copy()  # the reference's order
        lens = np.maximum(self.lens, 1)  # it knows no sequences of nobody
        want = _attention(attrs, q, paged, self.table, lens, self.starts)
        # Beyond float32: each weight is rounded once, to the type of the values, and so is the result.
        paged[1] = np.abs(paged[1])
        size = _attention(attrs, q, paged, self.table, lens, self.starts)
        limit = 40 * np.finfo(np.float32).eps * max(1.0, float(np.abs(want).max()))
        weights = s.dtype
        if s.dtype in SCALED:
            weights = torch.float32 if self.dtype == torch.float32 else torch.bfloat16
        bound = limit + (ROUNDING[weights] + ROUNDING[self.dtype]) * size
        seen = np.zeros(len(q), bool)
        for i in range(len(self.sequences)) if of is None else of:
            seen[self.starts[i] : self.starts[i + 1]] = True
        got = self.out.cpu().float().numpy()
        assert seen.any()
        assert_within(got[seen], want[seen], bound[seen])
        assert (got[~seen] == 7).all()


#: name -> what differs from the first.
SHAPES = {
    "three heads on one": Shape(),
    "no groups": Shape(heads=2, kv_heads=2, head_dim=12),
    "groups of three": Shape(heads=6, kv_heads=2),
    "window": Shape(heads=2, kv_heads=1, window=5),
    "softcap": Shape(softcap=3.0),
    "alibi": Shape(heads=3, kv_heads=1, alibi=True),
    "window, softcap, alibi": Shape(heads=3, kv_heads=3, head_dim=12, window=18, softcap=2.0, alibi=True),
    "bf16": Shape(dtype=torch.bfloat16),
    "wide window": Shape(heads=2, kv_heads=2, head_dim=12, window=90),
    "f16": Shape(heads=2, kv_heads=1, head_dim=80, dtype=torch.float16),
}
#: Whole prompts, chunks that begin amid a block, drafts of a few tokens; a last key on either side of a tile's border.
CHUNKS = [(23, 23), (64, 3), (1, 1), (65, 2), (140, 47)]
#: One query token each; the fourth is nobody.
TOKENS = [(37, 1), (1, 1), (130, 1), (0, 1), (64, 1)]


@pytest.mark.parametrize("name", SHAPES)
def test_chunks_mean_what_the_op_says(name: str) -> None:
    step = Step(SHAPES[name], CHUNKS, seed=3)
    step.prefill()
    step.check()


def check_tokens(shape: Shape, splits: int) -> None:
    step = Step(shape, TOKENS, seed=5)
    step.decode(splits, [4, 0, -1, 2, 1])
    step.decode(splits, [3])
    nobody = int(step.starts[3])
    assert (step.out[nobody] == 0).all()
    step.out[nobody] = 7
    step.check([0, 1, 2, 4])


@pytest.mark.parametrize("name", SHAPES)
def test_tokens_mean_what_the_op_says(name: str) -> None:
    check_tokens(SHAPES[name], splits=4)


@pytest.mark.parametrize("splits", [1, 2, 8])
def test_any_number_of_splits(splits: int) -> None:
    check_tokens(Shape(dtype=torch.bfloat16, window=100), splits)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_queries_of_another_type_than_the_cache(dtype: torch.dtype) -> None:
    for step in (Step(Shape(), CHUNKS[:2], dtype=dtype), Step(Shape(dtype=dtype), CHUNKS[:2], dtype=dtype)):
        step.prefill()
        step.check()
    for splits in (1, 2):
        step = Step(Shape(dtype=dtype), TOKENS[:3], dtype=dtype)
        step.decode(splits, [0, 1, 2])
        step.check()


#: Shapes of caches with scales, and types of queries.
CODED = {
    "int8, bf16": (Shape(heads=6, kv_heads=2, dtype=torch.int8), torch.bfloat16),
    "int8, f16, window": (Shape(heads=2, kv_heads=2, head_dim=80, dtype=torch.int8, window=18), torch.float16),
    "int8, f32, softcap, alibi": (Shape(head_dim=12, dtype=torch.int8, softcap=3.0, alibi=True), torch.float32),
    "fp8, bf16, alibi": (Shape(head_dim=12, dtype=torch.uint8, alibi=True), torch.bfloat16),
    "fp8, f16, softcap": (Shape(heads=6, kv_heads=2, dtype=torch.uint8, softcap=2.0), torch.float16),
    "fp8, f32, window": (Shape(heads=2, kv_heads=1, head_dim=24, dtype=torch.uint8, window=90), torch.float32),
    "int8, f16, small": (Shape(dtype=torch.int8, spread=1e-6), torch.float16),
    "fp8, bf16, small": (Shape(dtype=torch.uint8, spread=1e-6), torch.bfloat16),
}


@pytest.mark.parametrize("name", CODED)
def test_codes_mean_what_the_op_says(name: str) -> None:
    shape, dtype = CODED[name]
    step = Step(shape, CHUNKS, seed=3, dtype=dtype)
    step.prefill()
    step.check()
    for splits in (1, 4):
        step = Step(shape, TOKENS, seed=5, dtype=dtype)
        step.decode(splits, [4, 0, -1, 2, 1])
        step.check([0, 1, 2, 4])


def broken_heads(step: Step, part: int, position: int) -> list[list[bool]]:
    """Which heads of which queries are NaN, all their columns, when head 1 at a position is not finite."""
    assert step.cache.scales is not None
    for blocks in step.table:
        step.cache.codes[blocks[position // BLOCK], part, 1, position % BLOCK] = 0
        step.cache.scales[blocks[position // BLOCK], part, 1, position % BLOCK] = torch.inf
    step.prefill(of=(0,))
    step.decode(2, [1])
    heads = step.out[: step.starts[-1]].cpu().unflatten(1, (2, 16))
    assert torch.equal(heads.isnan().any(-1), ~heads.isfinite().all(-1))
    assert torch.equal(heads.isnan().any(-1), heads.isnan().all(-1))
    broken: list[list[bool]] = heads.isnan().any(-1).tolist()
    return broken


@pytest.mark.filterwarnings("ignore:invalid value encountered")  # the interpreter's NumPy
@pytest.mark.parametrize("part", [0, 1])  # keys, values
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_infinite_scale_breaks_those_who_see_it_alone(dtype: torch.dtype, part: int) -> None:
    fine, broken = [False, False], [False, True]
    shape = Shape(heads=2, kv_heads=2, dtype=torch.int8)
    late = Step(shape, [(70, 3), (70, 1)], dtype=dtype)  # queries 67 to 69, and 69
    assert broken_heads(late, part, 68) == [fine, broken, broken, broken]
    early = Step(replace(shape, window=5), [(90, 2), (90, 1)], dtype=dtype)  # from 84 on, 85 on, and 85 on
    assert broken_heads(early, part, 84) == [broken, fine, fine]


@pytest.mark.parametrize("heads", [37, 71])
def test_more_heads_on_a_kv_head_than_a_tile_has_rows(heads: int) -> None:
    shape = Shape(heads=heads, alibi=True)
    step = Step(shape, [(19, 4), (33, 1)])
    step.prefill(of=(0,))
    step.decode(2, [1])
    step.check()


def test_chunks_and_tokens_of_one_step() -> None:
    """Each kernel leaves the other's rows alone; a step of neither does nothing."""
    step = Step(Shape(heads=6, kv_heads=2), [(20, 1), (30, 9), (12, 1), (3, 3)])
    step.prefill(of=())
    step.decode(1, [])
    assert (step.out == 7).all()
    step.prefill(of=(1, 3))
    step.check([1, 3])
    step.decode(2, [2, 0])
    step.check()


@pytest.mark.parametrize("name", ["groups of three", "window", "bf16", "f16"])
def test_a_token_does_not_depend_on_its_chunk_or_company(name: str) -> None:
    """Bit by bit: the tiles of another chunk begin elsewhere, other sequences come and go."""
    whole = Step(SHAPES[name], [(90, 90)])
    whole.prefill()
    part = Step(SHAPES[name], [(90, 23), (33, 33)])
    part.q[:23] = whole.q[67:90]
    part.prefill()
    assert torch.equal(part.out[:23], whole.out[67:90])


def test_tiles_cover_every_token_once_and_those_of_most_keys_come_first() -> None:
    lens, seq_lens = [0, 50, 1, 129], [9, 50, 300, 140]
    tiles = prefill_tiles(lens, seq_lens, 4, 128, torch.bfloat16, torch.bfloat16)
    assert tiles.dtype == np.int32
    assert tiles.tolist() == [[2, 0], [3, 128], [3, 96], [3, 64], [3, 32], [1, 32], [3, 0], [1, 0]]
    assert prefill_tiles([], [], 4, 128, torch.bfloat16, torch.bfloat16).shape == (0, 2)
    bf16, f32, int8 = torch.bfloat16, torch.float32, torch.int8
    assert len(prefill_tiles([7], [7], 71, 64, bf16, bf16)) == 3  # of 36 and 35 heads, 3 tokens each
    # Codes are multiplied as queries are, floats as the cache is.
    pairs = ((int8, bf16), (int8, f32), (f32, bf16), (bf16, f32))
    assert [len(prefill_tiles([128], [128], 1, 64, *types)) for types in pairs] == [1, 4, 4, 1]


def test_splits_fill_the_gpu_about_twice() -> None:
    assert [choose_splits(rows, 8, 132, 1 << 17) for rows in (1, 2, 4, 8, 16, 24, 25, 512)] == [
        32,
        16,
        8,
        4,
        2,
        2,
        1,
        1,
    ]
    assert [choose_splits(1, 1, 132, length) for length in (16, 511, 512, 4096, 1 << 20)] == [1, 1, 2, 16, 64]
