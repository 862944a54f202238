"""Attention of ragged batches over a paged cache: chunks of prompts, and single tokens with split keys.

The online softmax is that of FlashAttention-2 (Dao 2023, arXiv:2307.08691), the split of the keys among programs that
of Flash-Decoding (Dao et al. 2023). What is computed is ``attention`` of :mod:`pelton.graph.ops`.

The query heads that share a KV head are rows of one product, together with tokens: row r is token r // HEADS, head
r % HEADS. So keys and values are read once for all of them. No key beyond a sequence's length, or before the window of
all queries of a tile, is ever read. Codes of int8 and FP8 caches are multiplied as they are: a key's scale is that of
its scores, a value's goes into its weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache as remembered
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import triton
import triton.language as tl

from .cache import SCALED, Cache, decode
from .common import FUSED, dot, next_power_of_2, tanh

Ints = npt.NDArray[np.int32]

_LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
#: Below any score; finite, so that differences of two of them are no NaN where a row has seen no key yet.
_LOWEST: tl.constexpr = tl.constexpr(-1e30)


class _Tile(NamedTuple):
    """Rows of queries and keys of a product, and what it is compiled with."""

    rows: int
    keys: int
    num_warps: int
    num_stages: int


def _tile(head_dim: int, cached: torch.dtype, q: torch.dtype, prefill: bool, group: int = 1) -> _Tile:
    """Sizes that fit the 99 KiB of shared memory of sm_86, too, and spill no registers (heads of 256: some bytes).

    cached, q: types of the cache and of queries. A wgmma of Hopper's takes 64 rows per 4 warps, an mma of Ampere's 16
    per warp. Single tokens have as few rows as heads, 16 at least for ``tl.dot``: there bytes on their way count, hence
    three stages, and so little of everything that three programs fit on a multiprocessor.
    """
    wide = next_power_of_2(head_dim) > 128
    if _is_exact(cached, q):  # no tensor cores: operands lie in registers
        tile = _Tile(32, 32 if head_dim <= 64 else 16, 8, 1)
    elif prefill:
        tile = _Tile(64, 32, 4, 2) if wide else _Tile(128, 64, 8, 3)
    else:
        tile = _Tile(64, 32, 4, 3) if wide else _Tile(64, 64, 4, 3)
    return tile if prefill else tile._replace(rows=min(tile.rows, max(16, next_power_of_2(group))))


def _is_exact(cached: torch.dtype, q: torch.dtype) -> bool:
    """Whether products are of float32: they have the type of the cache, those with codes that of queries."""
    return (q if cached in SCALED else cached) == torch.float32


@remembered
def _prefill_heads(group: int, rows: int) -> int:
    """Query heads of a program, of those of a KV head. All, unless that leaves more than a quarter of the rows idle."""
    heads, parts = group, 1
    while heads > rows or rows // heads * group < 0.75 * rows * parts:
        parts += 1
        heads = -(-group // parts)
    return heads


def prefill_tiles(
    query_lens: Sequence[int] | Ints, seq_lens: Sequence[int] | Ints, group: int, head_dim: int, cached: torch.dtype,
    q: torch.dtype,
) -> Ints:  # fmt: skip
    """Int32 [n, 2]: sequence and first query token, of as many tokens as a tile of ``prefill_attention`` takes.

    A sequence with no query tokens has no tile: set the length of those to 0 that ``decode_attention`` serves.
    group: query heads per KV head; cached, q: types of the cache and of queries. Those with most keys come first, so
    that none is left for last. Rows of -1 may be appended: they do nothing.
    """
    rows = _tile(head_dim, cached, q, prefill=True).rows
    tokens = rows // _prefill_heads(group, rows)
    lens, contexts = np.asarray(query_lens, np.int64), np.asarray(seq_lens, np.int64)
    counts = -(-lens // tokens)
    sequence = np.repeat(np.arange(len(lens)), counts)
    first = (np.arange(len(sequence)) - np.repeat(np.cumsum(counts) - counts, counts)) * tokens
    keys = (contexts - lens)[sequence] + np.minimum(first + tokens, lens[sequence])
    order = np.argsort(-keys, kind="stable")
    return np.stack([sequence, first], axis=1).astype(np.int32)[order]


def choose_splits(rows: int, kv_heads: int, num_sms: int, max_seq_len: int) -> int:
    """Into how many parts ``decode_attention`` divides the keys of a sequence: a power of two up to 64.

    As few as give 1.5 programs per multiprocessor or more (two fit, and hide each other's latencies), hence 1 where the
    batch does; and none of less than 256 keys. The result of a sequence depends on this number in its last bits. With
    ``rows`` the size of a captured graph and ``max_seq_len`` the model's it depends on the size of the batch (rounded
    up to that of a graph), the model and the GPU, and never on the other sequences themselves. For results that do not
    depend on the batch at all, call this once, with the largest batch.
    """
    splits = 1
    while splits < 64 and 2 * rows * kv_heads * splits < 3 * num_sms and max_seq_len >= 512 * splits:
        splits *= 2
    return splits


def decode_workspace_size(max_rows: int, num_heads: int, head_dim: int, num_splits: int) -> int:
    """Elements of float32: of each row, head and split a sum of values, the largest score and the sum of weights."""
    return max_rows * num_heads * num_splits * (head_dim + 2) if num_splits > 1 else 0


@triton.jit
def _attend(
    acc, total, top, q, keys_ptr, scales_ptr, table_ptr, start, stop, first, last, position, slope, scale,
    MASKED: tl.constexpr, ALIBI: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, KV_HEADS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, BLOCK_STRIDE: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Rows of queries see the keys start:stop, a multiple of BLOCK_N; of these, only first:last exist if MASKED.

    acc [BLOCK_M, BLOCK_D]: weighted sum of values; total [BLOCK_M]: of weights; top: largest score in units of ln 2.
    q [BLOCK_M, BLOCK_D] in the type of products; keys_ptr, scales_ptr: of the head in block 0, no scales for floats;
    slope: of ALiBi, times log2(e).
    """
    tokens: tl.constexpr = KV_HEADS * BLOCK_SIZE  # and heads, from a key to its value
    d = tl.arange(0, BLOCK_D)
    n = start + tl.arange(0, BLOCK_N)
    # Block numbers are loaded an iteration ahead, by hand: the pipeliner would make keys and values wait for them.
    block = tl.load(table_ptr + n // BLOCK_SIZE, mask=n < last, other=0)
    for begin in tl.range(start, stop, BLOCK_N):
        n = begin + tl.arange(0, BLOCK_N)
        exists = (n >= first) & (n < last)
        row = block.to(tl.int64) * BLOCK_STRIDE + (n % BLOCK_SIZE) * HEAD_DIM
        at = keys_ptr + row[:, None] + d[None, :]
        if scales_ptr is not None:
            scale_at = scales_ptr + block.to(tl.int64) * (BLOCK_STRIDE // 4) + n % BLOCK_SIZE
            key_scale = tl.load(scale_at, mask=exists, other=0.0)
            value_scale = tl.load(scale_at + tokens, mask=exists, other=0.0)
        after = n + BLOCK_N
        block = tl.load(table_ptr + after // BLOCK_SIZE, mask=after < last, other=0)
        # Zeros where nothing exists: a weight of zero times what lies there might be NaN.
        there = (d < HEAD_DIM)[None, :]
        if MASKED:
            there = there & exists[:, None]
        k = tl.load(at, mask=there, other=0)
        v = tl.load(at + tokens * HEAD_DIM, mask=there, other=0)
        if scales_ptr is not None:
            k = decode(k, q.dtype)
            v = decode(v, tl.float32 if EXACT else tl.bfloat16)  # float16 has no room for weights times small scales
        score = dot(q, tl.trans(k), tl.zeros((BLOCK_M, BLOCK_N), tl.float32), EXACT)
        if scales_ptr is not None:
            score *= key_scale[None, :]
        # From here on a score is score * unit: the product goes into that of the exponent.
        if SOFTCAP != 0.0:
            score = tanh(score * (scale / SOFTCAP))
            unit = SOFTCAP * _LOG2E
        else:
            unit = scale * _LOG2E
        if ALIBI:
            score = score * unit + slope[:, None] * (n[None, :] - position[:, None]).to(tl.float32)
            unit = 1.0
        if MASKED:
            visible = (n[None, :] <= position[:, None]) & exists[None, :]
            if WINDOW:
                visible = visible & (n[None, :] > position[:, None] - WINDOW)
            score = tl.where(visible, score, float("-inf"))
        higher = tl.maximum(top, tl.max(score, 1) * unit)
        weight = tl.exp2(score * unit - higher[:, None])
        shrink = tl.exp2(top - higher)
        total = total * shrink + tl.sum(weight, 1)
        if scales_ptr is not None:
            weight *= value_scale[None, :]
            if MASKED:  # an infinite scale, of what was not finite, must not reach who does not see it
                weight = tl.where(visible, weight, 0.0)
        acc = dot(weight.to(v.dtype), v, acc * shrink[:, None], EXACT)
        top = higher
    return acc, total, top


@triton.jit
def _prefill_kernel(
    out_ptr, q_ptr, cache_ptr, scales_ptr, table_ptr, width_ptr, seq_lens_ptr, starts_ptr, tiles_ptr, slopes_ptr,
    out_stride, q_stride, scale,
    GROUP: tl.constexpr, HEADS: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, KV_HEADS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, BLOCK_STRIDE: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """A program per tile and HEADS query heads of a KV head.

    Every row meets its keys in blocks that begin at multiples of BLOCK_N, and a block of which it sees nothing changes
    none of its bits: its result depends on no chunk or tile.
    """
    TOKENS: tl.constexpr = BLOCK_M // HEADS
    PARTS: tl.constexpr = (GROUP + HEADS - 1) // HEADS
    program = tl.program_id(0)  # all heads of the longest tile come first
    tile, part = program // (KV_HEADS * PARTS), program % PARTS
    kv_head = program // PARTS % KV_HEADS
    sequence = tl.load(tiles_ptr + 2 * tile)
    if sequence < 0:
        return
    first_token = tl.load(tiles_ptr + 2 * tile + 1)
    query_start = tl.load(starts_ptr + sequence)
    query_len = tl.load(starts_ptr + sequence + 1) - query_start
    context = tl.load(seq_lens_ptr + sequence) - query_len  # position of the first query token

    r = tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    token, head = r // HEADS, part * HEADS + r % HEADS
    exists = (token < TOKENS) & (first_token + token < query_len) & (head < GROUP)
    lowest = context + first_token
    highest = context + tl.minimum(first_token + TOKENS, query_len) - 1
    position = lowest + token
    column = (kv_head * GROUP + head) * HEAD_DIM
    mask = exists[:, None] & (d < HEAD_DIM)[None, :]
    first_row = (query_start + first_token).to(tl.int64)
    q_at = q_ptr + first_row * q_stride + (token * q_stride + column)[:, None] + d[None, :]
    q = tl.load(q_at, mask=mask, other=0.0)
    if scales_ptr is None:
        q = q.to(cache_ptr.dtype.element_ty)
    else:
        scales_ptr += kv_head * BLOCK_SIZE
    if slopes_ptr is None:
        slope = 0.0
    else:
        slope = tl.load(slopes_ptr + kv_head * GROUP + head, mask=exists, other=0.0) * _LOG2E

    keys_ptr = cache_ptr + kv_head * (BLOCK_SIZE * HEAD_DIM)
    table_ptr += sequence * tl.load(width_ptr)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    top = tl.full((BLOCK_M,), _LOWEST, tl.float32)
    end = highest + 1
    whole_end = (lowest + 1) // BLOCK_N * BLOCK_N  # all rows see the keys before this, the window aside
    if WINDOW:
        first_key = tl.maximum(lowest - WINDOW + 1, 0)
        whole_start = tl.cdiv(tl.maximum(highest - WINDOW + 1, 0), BLOCK_N) * BLOCK_N  # all rows see those from here on
        acc, total, top = _attend(
            acc, total, top, q, keys_ptr, scales_ptr, table_ptr, first_key // BLOCK_N * BLOCK_N, whole_start, first_key,
            end, position, slope, scale, True, slopes_ptr is not None, WINDOW, SOFTCAP, KV_HEADS, BLOCK_SIZE,
            BLOCK_STRIDE, HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N, EXACT,
        )  # fmt: skip
        whole_end = tl.maximum(whole_end, whole_start)
    else:
        first_key = 0
        whole_start = 0
    acc, total, top = _attend(
        acc, total, top, q, keys_ptr, scales_ptr, table_ptr, whole_start, whole_end, first_key, end,
        position, slope, scale, False, slopes_ptr is not None, WINDOW, SOFTCAP, KV_HEADS, BLOCK_SIZE, BLOCK_STRIDE,
        HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N, EXACT,
    )  # fmt: skip
    acc, total, top = _attend(
        acc, total, top, q, keys_ptr, scales_ptr, table_ptr, whole_end, end, first_key, end,
        position, slope, scale, True, slopes_ptr is not None, WINDOW, SOFTCAP, KV_HEADS, BLOCK_SIZE, BLOCK_STRIDE,
        HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N, EXACT,
    )  # fmt: skip
    out_at = out_ptr + first_row * out_stride + (token * out_stride + column)[:, None] + d[None, :]
    result = acc / tl.where(exists, total, 1.0)[:, None]
    tl.store(out_at, result.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _decode_kernel(
    out_ptr, q_ptr, cache_ptr, scales_ptr, table_ptr, width_ptr, seq_lens_ptr, starts_ptr, rows_ptr, slopes_ptr,
    workspace_ptr, out_stride, q_stride, scale,
    SPLIT: tl.constexpr, GROUP: tl.constexpr, HEADS: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr,
    KV_HEADS: tl.constexpr, BLOCK_SIZE: tl.constexpr, BLOCK_STRIDE: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """A program per row, HEADS query heads of a KV head, and split of the keys. SPLIT: there is more than one."""
    PARTS: tl.constexpr = (GROUP + HEADS - 1) // HEADS
    kv_head, part = tl.program_id(1) // PARTS, tl.program_id(1) % PARTS
    split, num_splits = tl.program_id(2), tl.num_programs(2)
    sequence = tl.load(rows_ptr + tl.program_id(0))
    if sequence < 0:
        return
    seq_len = tl.load(seq_lens_ptr + sequence)
    query = tl.load(starts_ptr + sequence).to(tl.int64)

    r = tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    head = part * HEADS + r
    exists = (r < HEADS) & (head < GROUP)
    head += kv_head * GROUP
    mask = exists[:, None] & (d < HEAD_DIM)[None, :]
    column = (head * HEAD_DIM)[:, None] + d[None, :]
    q = tl.load(q_ptr + query * q_stride + column, mask=mask, other=0.0)
    if scales_ptr is None:
        q = q.to(cache_ptr.dtype.element_ty)
    else:
        scales_ptr += kv_head * BLOCK_SIZE
    if slopes_ptr is None:
        slope = 0.0
    else:
        slope = tl.load(slopes_ptr + head, mask=exists, other=0.0) * _LOG2E

    first_key = tl.maximum(seq_len - WINDOW, 0) if WINDOW else 0
    first_block = first_key // BLOCK_N
    blocks = tl.cdiv(seq_len, BLOCK_N) - first_block
    start = first_block + blocks * split // num_splits  # no key at all where there are fewer blocks than splits
    stop = first_block + blocks * (split + 1) // num_splits
    acc, total, top = _attend(
        tl.zeros((BLOCK_M, BLOCK_D), tl.float32), tl.zeros((BLOCK_M,), tl.float32),
        tl.full((BLOCK_M,), _LOWEST, tl.float32), q, cache_ptr + kv_head * (BLOCK_SIZE * HEAD_DIM), scales_ptr,
        table_ptr + sequence * tl.load(width_ptr), start * BLOCK_N, stop * BLOCK_N, first_key, seq_len,
        tl.zeros((BLOCK_M,), tl.int32) + (seq_len - 1), slope, scale, True, slopes_ptr is not None, WINDOW, SOFTCAP,
        KV_HEADS, BLOCK_SIZE, BLOCK_STRIDE, HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N, EXACT,
    )  # fmt: skip
    if SPLIT:
        at = (tl.program_id(0).to(tl.int64) * (KV_HEADS * GROUP) + head) * num_splits + split
        tl.store(workspace_ptr + (at * HEAD_DIM)[:, None] + d[None, :], acc, mask=mask)
        sums_ptr = workspace_ptr + tl.num_programs(0).to(tl.int64) * (KV_HEADS * GROUP * HEAD_DIM) * num_splits
        tl.store(sums_ptr + 2 * at, top, mask=exists)
        tl.store(sums_ptr + 2 * at + 1, total, mask=exists)
    else:
        result = acc / tl.where(seq_len > 0, total, 1.0)[:, None]  # zeros of a padding sequence
        tl.store(out_ptr + query * out_stride + column, result.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _merge_kernel(
    out_ptr, workspace_ptr, seq_lens_ptr, starts_ptr, rows_ptr, out_stride,
    SPLITS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """A program per row and query head: the splits of ``_decode_kernel`` become one."""
    head, num_heads = tl.program_id(1), tl.num_programs(1)
    sequence = tl.load(rows_ptr + tl.program_id(0))
    if sequence < 0:
        return
    at = (tl.program_id(0).to(tl.int64) * num_heads + head) * SPLITS + tl.arange(0, SPLITS)
    d = tl.arange(0, BLOCK_D)
    sums_ptr = workspace_ptr + tl.num_programs(0).to(tl.int64) * num_heads * (SPLITS * HEAD_DIM)
    top = tl.load(sums_ptr + 2 * at)
    total = tl.load(sums_ptr + 2 * at + 1)
    acc = tl.load(workspace_ptr + (at * HEAD_DIM)[:, None] + d[None, :], mask=(d < HEAD_DIM)[None, :], other=0.0)
    weight = tl.exp2(top - tl.max(top, 0))
    total = tl.sum(total * weight, 0)
    result = tl.sum(acc * weight[:, None], 0) / tl.where(tl.load(seq_lens_ptr + sequence) > 0, total, 1.0)
    out_at = out_ptr + tl.load(starts_ptr + sequence).to(tl.int64) * out_stride + head * HEAD_DIM + d
    tl.store(out_at, result.to(out_ptr.dtype.element_ty), mask=d < HEAD_DIM)


def _constants(
    cache: Cache, q: torch.Tensor, tile: _Tile, group: int, heads: int, window: int, softcap: float
) -> dict[str, Any]:
    """What both kernels are compiled for."""
    kv_heads, block_size, head_dim = cache.codes.shape[2:]
    return {
        "GROUP": group,
        "HEADS": heads,
        "WINDOW": window,
        "SOFTCAP": softcap,
        "KV_HEADS": kv_heads,
        "BLOCK_SIZE": block_size,
        "BLOCK_STRIDE": cache.codes.stride(0),
        "HEAD_DIM": head_dim,
        "BLOCK_D": max(16, next_power_of_2(head_dim)),
        "BLOCK_M": tile.rows,
        "BLOCK_N": tile.keys,
        "EXACT": _is_exact(cache.codes.dtype, q.dtype),
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
        **FUSED,
    }


def prefill_attention(
    out: torch.Tensor,
    q: torch.Tensor,
    cache: Cache,
    block_table: torch.Tensor,
    table_width: torch.Tensor,
    seq_lens: torch.Tensor,
    query_start_loc: torch.Tensor,
    tiles: torch.Tensor,
    slopes: torch.Tensor | None,
    *,
    num_heads: int,
    scale: float,
    window: int,
    softcap: float,
) -> None:
    """Attention of the query tokens in ``tiles`` (int32 [n, 2], of :func:`prefill_tiles` with this cache's sizes).

    out, q: [T, num_heads * head_dim], rows strided. A sequence's queries are the last of its ``seq_lens`` cached
    tokens. slopes: float32 [num_heads] of ALiBi. scale: positive. window, softcap: 0 for none. Rows of other tokens
    stay as they are.
    """
    if not len(tiles):
        return
    kv_heads, head_dim = cache.codes.shape[2], cache.codes.shape[4]
    group, tile = num_heads // kv_heads, _tile(head_dim, cache.codes.dtype, q.dtype, prefill=True)
    heads = _prefill_heads(group, tile.rows)
    _prefill_kernel[(len(tiles) * kv_heads * -(-group // heads),)](
        out, q, cache.codes, cache.scales, block_table, table_width, seq_lens, query_start_loc, tiles, slopes,
        out.stride(0), q.stride(0), scale, **_constants(cache, q, tile, group, heads, window, softcap),
    )  # fmt: skip


def decode_attention(
    out: torch.Tensor,
    q: torch.Tensor,
    cache: Cache,
    block_table: torch.Tensor,
    table_width: torch.Tensor,
    seq_lens: torch.Tensor,
    query_start_loc: torch.Tensor,
    rows: torch.Tensor,
    slopes: torch.Tensor | None,
    workspace: torch.Tensor,
    *,
    num_heads: int,
    scale: float,
    window: int,
    softcap: float,
    num_splits: int,
) -> None:
    """Attention of sequences with one query token: ``rows``, int32 [R], are their numbers in the step; -1 does nothing.

    Operands as in :func:`prefill_attention`; a sequence of length 0 gets zeros. workspace: float32, flat, of
    :func:`decode_workspace_size` elements or more. num_splits: of :func:`choose_splits`, or any power of two.
    """
    if not len(rows):
        return
    kv_heads, head_dim = cache.codes.shape[2], cache.codes.shape[4]
    group = num_heads // kv_heads
    tile = _tile(head_dim, cache.codes.dtype, q.dtype, prefill=False, group=group)
    parts = -(-group // tile.rows)
    constants = _constants(cache, q, tile, group, -(-group // parts), window, softcap)
    _decode_kernel[(len(rows), kv_heads * parts, num_splits)](
        out, q, cache.codes, cache.scales, block_table, table_width, seq_lens, query_start_loc, rows, slopes, workspace,
        out.stride(0), q.stride(0), scale, SPLIT=num_splits > 1, **constants,
    )  # fmt: skip
    if num_splits > 1:
        _merge_kernel[(len(rows), num_heads)](
            out, workspace, seq_lens, query_start_loc, rows, out.stride(0),
            SPLITS=num_splits, HEAD_DIM=head_dim, BLOCK_D=constants["BLOCK_D"], **FUSED,
        )  # fmt: skip
