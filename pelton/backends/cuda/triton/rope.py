"""Rotary embeddings (Su et al. 2021) and the writing of keys and values to the paged cache.

Offsets in the cache (:class:`~pelton.backends.cuda.triton.cache.Cache`) are int64.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .cache import Cache
from .codes import encode, magnitude, scale_of
from .common import FUSED, next_power_of_2

_NUM_WARPS = 2


@triton.jit
def _write_heads(
    out_ptr,
    out_head_stride,
    scales_ptr,  # None: ``out`` has floats
    scales_head_stride,
    x_ptr,
    table_ptr,  # the position's row
    head,
    heads,
    HEAD_DIM: tl.constexpr,
    PAIRS: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    PAIR_BLOCK: tl.constexpr,
    REST_BLOCK: tl.constexpr,
):
    """The first 2 * PAIRS columns of each head turn, the rest is copied. All of a head share a scale."""
    x_ptrs = x_ptr + head * HEAD_DIM
    out_ptrs = out_ptr + head * out_head_stride
    if PAIRS > 0:
        pair = tl.arange(0, PAIR_BLOCK)[None, :]
        mask = (head < heads) & (pair < PAIRS)
        cos = tl.load(table_ptr + pair, mask=pair < PAIRS, other=0.0)
        sin = tl.load(table_ptr + PAIRS + pair, mask=pair < PAIRS, other=0.0)
        if INTERLEAVED:
            first = 2 * pair
            second = 2 * pair + 1
        else:
            first = pair
            second = pair + PAIRS
        a = tl.load(x_ptrs + first, mask=mask, other=0.0).to(tl.float32)
        b = tl.load(x_ptrs + second, mask=mask, other=0.0).to(tl.float32)
        left = a * cos - b * sin
        right = b * cos + a * sin
    if REST_BLOCK > 0:
        column = 2 * PAIRS + tl.arange(0, REST_BLOCK)[None, :]
        there = (head < heads) & (column < HEAD_DIM)
        rest = tl.load(x_ptrs + column, mask=there, other=0.0).to(tl.float32)
    if scales_ptr is not None:
        largest = tl.zeros(head.shape, tl.int32)
        if PAIRS > 0:
            both = tl.maximum(magnitude(left), magnitude(right))
            largest = tl.maximum(largest, tl.max(both, 1, keep_dims=True))
        if REST_BLOCK > 0:
            largest = tl.maximum(largest, tl.max(magnitude(rest), 1, keep_dims=True))
        integers: tl.constexpr = out_ptr.dtype.element_ty == tl.int8
        scale = scale_of(largest, integers)
        tl.store(scales_ptr + head * scales_head_stride, scale, mask=head < heads)
        if PAIRS > 0:
            left = encode(left, scale, integers).to(out_ptr.dtype.element_ty, bitcast=True)
            right = encode(right, scale, integers).to(out_ptr.dtype.element_ty, bitcast=True)
        if REST_BLOCK > 0:
            rest = encode(rest, scale, integers).to(out_ptr.dtype.element_ty, bitcast=True)
    if PAIRS > 0:
        tl.store(out_ptrs + first, left, mask=mask)
        tl.store(out_ptrs + second, right, mask=mask)
    if REST_BLOCK > 0:
        tl.store(out_ptrs + column, rest, mask=there)


@triton.jit
def _rope_kernel(
    out_ptr,
    cache_ptr,
    scales_ptr,  # None: the cache has floats
    q_ptr,
    k_ptr,
    v_ptr,
    positions_ptr,
    slots_ptr,
    table_ptr,
    out_stride,
    q_stride,
    k_stride,
    v_stride,
    Q_HEADS: tl.constexpr,  # 0: only the cache is written
    KV_HEADS: tl.constexpr,  # 0: only q is turned
    BLOCK_SIZE: tl.constexpr,
    BLOCK_STRIDE: tl.constexpr,  # from block to block, in elements of the cache
    HEAD_DIM: tl.constexpr,
    PAIRS: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    HEADS: tl.constexpr,
    DIM_BLOCK: tl.constexpr,
    PAIR_BLOCK: tl.constexpr,
    REST_BLOCK: tl.constexpr,
):
    """A program takes HEADS heads of a token: of q, or of both k and v."""
    q_groups: tl.constexpr = (Q_HEADS + HEADS - 1) // HEADS
    token = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1)
    turns = table_ptr  # None without pairs
    if PAIRS > 0:
        turns += tl.load(positions_ptr + token).to(tl.int64) * (2 * PAIRS)
    if Q_HEADS > 0:  # noqa: SIM102 - a constant: without query heads, what follows is not compiled
        if group < q_groups:
            head = group * HEADS + tl.arange(0, HEADS)[:, None]
            _write_heads(
                out_ptr + token * out_stride, HEAD_DIM, None, 0, q_ptr + token * q_stride, turns, head, Q_HEADS,
                HEAD_DIM, PAIRS, INTERLEAVED, PAIR_BLOCK, REST_BLOCK,
            )  # fmt: skip
    if KV_HEADS > 0:
        slot = tl.load(slots_ptr + token).to(tl.int64)
        if (group >= q_groups) & (slot >= 0):
            part: tl.constexpr = KV_HEADS * BLOCK_SIZE  # tokens and heads: keys or values of a block
            head = (group - q_groups) * HEADS + tl.arange(0, HEADS)[:, None]
            block, row = slot // BLOCK_SIZE, slot % BLOCK_SIZE
            keys = cache_ptr + block * BLOCK_STRIDE + row * HEAD_DIM
            if scales_ptr is None:
                key_scales = None
                value_scales = None
            else:
                key_scales = scales_ptr + block * (BLOCK_STRIDE // 4) + row
                value_scales = key_scales + part
            _write_heads(
                keys, BLOCK_SIZE * HEAD_DIM, key_scales, BLOCK_SIZE, k_ptr + token * k_stride, turns, head, KV_HEADS,
                HEAD_DIM, PAIRS, INTERLEAVED, PAIR_BLOCK, REST_BLOCK,
            )  # fmt: skip
            _write_heads(
                keys + part * HEAD_DIM, BLOCK_SIZE * HEAD_DIM, value_scales, BLOCK_SIZE, v_ptr + token * v_stride,
                turns, head, KV_HEADS, HEAD_DIM, 0, INTERLEAVED, PAIR_BLOCK, DIM_BLOCK,
            )  # fmt: skip


def _launch(
    out: torch.Tensor | None,
    cache: Cache | None,
    q: torch.Tensor | None,
    k: torch.Tensor | None,
    v: torch.Tensor | None,
    positions: torch.Tensor | None,
    slots: torch.Tensor | None,
    table: torch.Tensor | None,
    tokens: int,
    head_dim: int,
    rotary_dim: int,
    interleaved: bool,
) -> None:
    if tokens == 0:
        return
    q_heads = 0 if q is None else q.shape[1] // head_dim
    kv_heads, block_size = (0, 0) if cache is None else cache.codes.shape[2:4]
    rest = head_dim - rotary_dim
    dim_block, pair_block = next_power_of_2(head_dim), next_power_of_2(rotary_dim // 2)
    heads = max(1, 1024 // dim_block)
    if rotary_dim:  # no fewer pairs than threads: one that two threads hold could be turned twice when ``out`` is ``q``
        heads = max(heads, 32 * _NUM_WARPS // pair_block)
    groups = triton.cdiv(q_heads, heads) + triton.cdiv(kv_heads, heads)
    _rope_kernel[(tokens, groups)](
        out,
        None if cache is None else cache.codes,
        None if cache is None else cache.scales,
        q,
        k,
        v,
        positions,
        slots,
        table,
        0 if out is None else out.stride(0),
        0 if q is None else q.stride(0),
        0 if k is None else k.stride(0),
        0 if v is None else v.stride(0),
        Q_HEADS=q_heads,
        KV_HEADS=kv_heads,
        BLOCK_SIZE=block_size,
        BLOCK_STRIDE=0 if cache is None else cache.codes.stride(0),
        HEAD_DIM=head_dim,
        PAIRS=rotary_dim // 2,
        INTERLEAVED=interleaved,
        HEADS=heads,
        DIM_BLOCK=dim_block,
        PAIR_BLOCK=pair_block,
        REST_BLOCK=next_power_of_2(rest) if rest else 0,
        num_warps=_NUM_WARPS,
        **FUSED,
    )


def rope(
    out: torch.Tensor,
    x: torch.Tensor,
    positions: torch.Tensor,
    table: torch.Tensor,
    head_dim: int,
    rotary_dim: int,
    interleaved: bool,
) -> None:
    """out, x: float [T, heads * head_dim], out may be x; positions: int32 [T].

    table: float32 [max_positions, rotary_dim], contiguous: cosines of all pairs, then sines.
    """
    _launch(out, None, x, None, None, positions, None, table, x.shape[0], head_dim, rotary_dim, interleaved)


def kv_write(cache: Cache, k: torch.Tensor, v: torch.Tensor, slots: torch.Tensor) -> None:
    """k, v: float [T, kv_heads * head_dim]; slots: int32 [T], -1 writes nothing.

    What a cache of floats cannot hold becomes infinite.
    """
    _launch(None, cache, None, k, v, None, slots, None, k.shape[0], cache.codes.shape[4], 0, False)


def rope_kv_write(
    out: torch.Tensor,
    cache: Cache,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    positions: torch.Tensor,
    slots: torch.Tensor,
    table: torch.Tensor,
    head_dim: int,
    rotary_dim: int,
    interleaved: bool,
) -> None:
    """:func:`rope` of q into out, and :func:`kv_write` of k, turned likewise, and v, in one launch."""
    _launch(out, cache, q, k, v, positions, slots, table, q.shape[0], head_dim, rotary_dim, interleaved)
