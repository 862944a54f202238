"""From logits to tokens, bit for bit as :mod:`pelton.engine.sampling` defines it: steps 7 to 9.

Four kernels. A greedy row needs the first and the last:

1. per chunk of a row, the largest logit;
2. per chunk, the mass, and how many tokens with what mass reach each of some levels of y, the scaled logit;
3. with that, it is known which level all tokens reach that the filters (top-k, top-p, min-p, typical-p) might leave:
   the ids of those that reach it become a list, in their order;
4. one program per row filters that list, which is short as a rule, and draws. A row without filters has no list: it
   draws from the chunk to which the masses of the chunks point.

Where tokens are ranked, value and id are one int64 (:func:`_rank`). So no two are equal, and what a filter leaves is
what ranks no lower than a border, which is found by bisection. All sums that decide are of integers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
import triton
import triton.language as tl

from ....config import SamplingParams
from .common import FUSED, next_power_of_2

Words = npt.NDArray[np.int32]

#: Words of a row's parameters: float32 scale (0: greedy), top_k, then with 64 bits each, the low half first,
#: float64 top_p, int64 least mass that min_p leaves, float64 typical_p, int64 random bits.
NUM_WORDS = 10
_BITS = slice(8, 10)

_GREEDY_BELOW = 1e-5
_LOG2_E = 1.4426950408889634
_ONE = 1 << 42

#: Logits that a program looks at together; what is left of a row after its filters should rarely be more.
BLOCK = 4096

_LEVELS = tl.constexpr(16)
_CHUNK_WORDS = tl.constexpr(2 + 2 * 16)
_LOWEST = tl.constexpr(-(2**63))  # no token's rank
_HIGHEST = tl.constexpr(2**63 - 1)
_NONE = tl.constexpr(2**31 - 1)  # no token's id


def request_words(params: SamplingParams) -> Words:
    """The words of a request, int32 [NUM_WORDS], without its random bits."""
    words = np.zeros(NUM_WORDS, np.int32)
    if params.temperature >= _GREEDY_BELOW:
        words[:1].view(np.float32)[0] = np.float32(_LOG2_E / params.temperature)
        words[1] = min(max(params.top_k, 0), 2**31 - 1)
        words[2:4].view(np.float64)[0] = params.top_p
        words[4:6].view(np.int64)[0] = max(1, math.ceil(params.min_p * _ONE)) if params.min_p > 0.0 else 0
        words[6:8].view(np.float64)[0] = params.typical_p
    return words


def sampling_words(requests: Sequence[Words], bits: npt.NDArray[np.uint64]) -> Words:
    """The words of a step, int32 [N, NUM_WORDS]: those of each row's request with its ``random_bits``, uint64 [N]."""
    words = np.concatenate(requests).reshape(-1, NUM_WORDS)
    words[:, _BITS] = bits.view(np.int32).reshape(-1, 2)
    return words


def scratch_words(max_rows: int, vocab: int, block: int = BLOCK) -> int:
    """Elements of the int64 scratch that :func:`sample` needs for as many rows."""
    return max_rows * _row_words(vocab, block)


def _row_words(vocab: int, block: int) -> int:
    # Per chunk best, total, masses [levels] and counts [levels]; then, of 32 bits, list [vocab] and work [block].
    chunk_words: int = _CHUNK_WORDS.value
    return -(-vocab // block) * chunk_words + -(-vocab // 2) + block // 2


def sample(
    tokens: torch.Tensor, logits: torch.Tensor, words: torch.Tensor, scratch: torch.Tensor, *, block: int = BLOCK
) -> None:
    """Choose one token per row.

    tokens: int32 [N, 2], written: the token, and the bits of the row's float32 maximum. If that is not finite (NaN
    where the row holds one), the row is broken and its token 0.
    logits: float32 [N, vocab]. words: int32 [N, NUM_WORDS], of :func:`sampling_words`; rows of zeros are greedy.
    scratch: int64, contiguous, at least ``scratch_words(N, vocab, block)``. block: a power of two.
    """
    rows, vocab = logits.shape
    if rows == 0:
        return
    chunks = -(-vocab // block)
    wide = next_power_of_2(chunks)
    row_words = _row_words(vocab, block)
    grid = (rows, chunks)
    lists = scratch.view(torch.int32)
    _best_kernel[grid](logits, scratch, vocab, logits.stride(0), row_words, BLOCK=block, num_warps=8, **FUSED)
    # Weights are the same everywhere only if no product and sum become one: see weights() of the definition.
    _levels_kernel[grid](
        logits, words, scratch, vocab, logits.stride(0), words.stride(0), row_words, chunks,
        CHUNKS=wide, BLOCK=block, num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip
    _list_kernel[grid](
        logits, words, scratch, lists, vocab, logits.stride(0), words.stride(0), row_words, chunks,
        CHUNKS=wide, BLOCK=block, num_warps=8, enable_fp_fusion=False,
    )  # fmt: skip
    _draw_kernel[(rows,)](
        tokens, logits, words, scratch, lists, vocab, tokens.stride(0), logits.stride(0), words.stride(0), row_words,
        chunks, CHUNKS=wide, BLOCK=block, num_warps=16, enable_fp_fusion=False,
    )  # fmt: skip


@triton.jit
def _best_kernel(logits_ptr, scratch_ptr, vocab, logits_stride, row_words, BLOCK: tl.constexpr):
    """Of each chunk, the rank of the first largest logit."""
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    ids, x = _chunk(logits_ptr + row * logits_stride, chunk, vocab, BLOCK)
    tl.store(scratch_ptr + row * row_words + chunk, tl.max(_rank(x, ids), 0))


@triton.jit(do_not_specialize=["words_ptr"])
def _levels_kernel(
    logits_ptr, words_ptr, scratch_ptr, vocab, logits_stride, words_stride, row_words, num_chunks,
    CHUNKS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Of each chunk, the mass; and, if it is needed, mass and number of the tokens that reach each level."""
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    scale, top_k, top_p, least, typical_p = _params(words_ptr + row * words_stride)
    row_ptr = scratch_ptr + row * row_words
    _, peak = _peak(row_ptr, num_chunks, CHUNKS)
    if (scale == 0.0) | _is_broken(peak):
        return
    _, x = _chunk(logits_ptr + row * logits_stride, chunk, vocab, BLOCK)
    y, mass = _weights(x, peak, scale)
    tl.store(row_ptr + num_chunks + chunk, tl.sum(mass.to(tl.int64), 0))
    if _is_filtered(top_k, top_p, least, typical_p, vocab):
        level = tl.arange(0, _LEVELS)
        masses_ptr = row_ptr + num_chunks * 2 + chunk * _LEVELS + level
        reached = y[None, :] >= _level(level)[:, None]
        # Float32 sums err by at most BLOCK * 2**-24. That is enough for the choice of a level, and cheap.
        tl.store(masses_ptr, tl.sum(tl.where(reached, mass[None, :], 0.0), 1).to(tl.int64))
        tl.store(masses_ptr + num_chunks * _LEVELS, tl.sum(tl.where(reached, 1.0, 0.0), 1).to(tl.int64))


@triton.jit(do_not_specialize=["words_ptr"])
def _list_kernel(
    logits_ptr, words_ptr, scratch_ptr, lists_ptr, vocab, logits_stride, words_stride, row_words, num_chunks,
    CHUNKS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The ids of the tokens that a filter might leave, in their order."""
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    scale, top_k, top_p, least, typical_p = _params(words_ptr + row * words_stride)
    row_ptr = scratch_ptr + row * row_words
    _, peak = _peak(row_ptr, num_chunks, CHUNKS)
    if (scale == 0.0) | _is_broken(peak) | (not _is_filtered(top_k, top_p, least, typical_p, vocab)):
        return
    level, _, _ = _least_level(row_ptr, top_k, top_p, least, vocab, num_chunks, CHUNKS)
    others = tl.arange(0, CHUNKS)
    counts_ptr = row_ptr + num_chunks * (2 + _LEVELS) + level
    before = tl.sum(tl.load(counts_ptr + others * _LEVELS, mask=others < chunk, other=0), 0).to(tl.int32)
    ids, x = _chunk(logits_ptr + row * logits_stride, chunk, vocab, BLOCK)
    y, _ = _weights(x, peak, scale)
    reached = (y >= _level(level)).to(tl.int32)
    list_ptr = lists_ptr + 2 * (row * row_words + num_chunks * _CHUNK_WORDS)
    tl.store(list_ptr + before + tl.cumsum(reached, 0) - 1, ids, mask=reached != 0)


@triton.jit(do_not_specialize=["tokens_ptr", "words_ptr"])
def _draw_kernel(
    tokens_ptr, logits_ptr, words_ptr, scratch_ptr, lists_ptr, vocab, tokens_stride, logits_stride, words_stride,
    row_words, num_chunks, CHUNKS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The token of each row."""
    row = tl.program_id(0).to(tl.int64)
    scale, top_k, top_p, least, typical_p = _params(words_ptr + row * words_stride)
    bits = _word64(words_ptr + row * words_stride + 8)
    logits_ptr += row * logits_stride
    row_ptr = scratch_ptr + row * row_words
    token, peak = _peak(row_ptr, num_chunks, CHUNKS)
    if _is_broken(peak):
        token = 0
    elif scale != 0.0:
        if _is_filtered(top_k, top_p, least, typical_p, vocab):
            list_ptr = lists_ptr + 2 * (row * row_words + num_chunks * _CHUNK_WORDS)
            work_ptr = list_ptr + (vocab + 1) // 2 * 2
            _, size, total = _least_level(row_ptr, top_k, top_p, least, vocab, num_chunks, CHUNKS)
            token = _drawn_from_list(
                logits_ptr, peak, scale, list_ptr, work_ptr, size, total, top_k, top_p, least, typical_p, bits, BLOCK
            )
        else:
            token = _drawn_from_all(
                logits_ptr, peak, scale, row_ptr + num_chunks, vocab, num_chunks, bits, CHUNKS, BLOCK
            )
    tl.store(tokens_ptr + row * tokens_stride, token)
    tl.store(tokens_ptr + row * tokens_stride + 1, peak.to(tl.int32, bitcast=True))


@triton.jit
def _drawn_from_all(
    logits_ptr, peak, scale, masses_ptr, vocab, num_chunks, bits, CHUNKS: tl.constexpr, BLOCK: tl.constexpr
):
    chunks = tl.arange(0, CHUNKS)
    masses = tl.load(masses_ptr + chunks, mask=chunks < num_chunks, other=0)
    target = _target(bits, tl.sum(masses, 0))
    chunk = tl.sum((tl.cumsum(masses, 0) <= target).to(tl.int32), 0)
    ids, x = _chunk(logits_ptr, chunk, vocab, BLOCK)
    _, mass = _weights(x, peak, scale)
    return _first_beyond(ids, mass.to(tl.int64), target - tl.sum(tl.where(chunks < chunk, masses, 0), 0))


@triton.jit
def _drawn_from_list(
    logits_ptr, peak, scale, list_ptr, work_ptr, size, total, top_k, top_p, least, typical_p, bits, BLOCK: tl.constexpr
):
    border = tl.full((), _LOWEST + 1, tl.int64)  # by logit: of what top-k and top-p leave
    near, mean = border, tl.full((), 0, tl.float32)  # by nearness to the mean: of what typical-p leaves
    has_top_k = (top_k > 0) & (top_k <= size)  # a list that is too short for it has all that weighs something
    stage = tl.full((), 0, tl.int32)
    while stage < 3:
        is_top_k, is_top_p = (stage == 0) & has_top_k, (stage == 1) & (top_p < 1.0)
        is_typical = (stage == 2) & (typical_p < 1.0)
        if is_top_k | is_top_p | is_typical:
            floor = tl.where(is_typical, least, 0)
            left, scaled = _sums((logits_ptr, peak, scale, border, floor, near, mean), list_ptr, size, BLOCK)
            # A token's surprise is log2(total) - y, their mean is the entropy: the total cancels out.
            mean = (scaled.to(tl.float64) / left.to(tl.float64)).to(tl.float32)
            if is_top_k:
                needed = top_k.to(tl.int64)
            elif is_top_p:  # of a list that was made for top-p, all the rest of the row is shared, too
                needed = _share(top_p, tl.where(has_top_k, left, total))
            else:
                needed = _share(typical_p, left)
            state = (logits_ptr, peak, scale, border, floor, near, mean)
            found = _border(state, list_ptr, work_ptr, size, needed, is_top_k, is_typical, BLOCK)
            border, near = tl.where(is_typical, border, found), tl.where(is_typical, found, near)
        stage += 1
    state = (logits_ptr, peak, scale, border, least, near, mean)
    left, _ = _sums(state, list_ptr, size, BLOCK)
    return _drawn(state, list_ptr, size, _target(bits, left), BLOCK)


@triton.jit
def _border(state, list_ptr, work_ptr, size, needed, counted, is_near, BLOCK: tl.constexpr):
    """The largest rank whose token, with all that rank higher, weighs ``needed``; see :func:`_ranked`."""
    above = tl.full((), 0, tl.int64)  # the mass of what ranks higher than all that is still looked at
    if size > BLOCK:
        lows, highs = tl.full((BLOCK,), _HIGHEST, tl.int64), tl.full((BLOCK,), _LOWEST, tl.int64)
        counts = tl.full((BLOCK,), 0, tl.int32)
        for start in range(0, size, BLOCK):
            rank, _, _, _ = _ranked(state, list_ptr, start, size, counted, is_near, BLOCK)
            lows = tl.minimum(lows, tl.where(rank > _LOWEST, rank, _HIGHEST))
            highs = tl.maximum(highs, rank)
            counts += (rank > _LOWEST).to(tl.int32)
        low, high = tl.min(lows, 0), tl.max(highs, 0)
        at_low, at_high = tl.sum(counts, 0), tl.full((), 0, tl.int32)  # how many rank from low, above high
        while at_low - at_high > BLOCK:
            middle = _middle(low, high)
            masses, counts = tl.full((BLOCK,), 0, tl.int64), tl.full((BLOCK,), 0, tl.int32)
            for start in range(0, size, BLOCK):
                rank, weight, _, _ = _ranked(state, list_ptr, start, size, counted, is_near, BLOCK)
                masses += tl.where(rank >= middle, weight, 0)
                counts += (rank >= middle).to(tl.int32)
            mass, count = tl.sum(masses, 0), tl.sum(counts, 0)
            if mass >= needed:
                low, at_low = middle, count
            else:
                high, at_high, above = middle - 1, count, mass
        filled = tl.full((), 0, tl.int32)
        tl.debug_barrier()  # all threads have read what an earlier search left there
        for start in range(0, size, BLOCK):
            rank, _, _, ids = _ranked(state, list_ptr, start, size, counted, is_near, BLOCK)
            taken = ((rank >= low) & (rank <= high)).to(tl.int32)
            tl.store(work_ptr + filled + tl.cumsum(taken, 0) - 1, ids, mask=taken != 0)
            filled += tl.sum(taken, 0)
        tl.debug_barrier()  # each thread reads what others have written
        list_ptr, size = work_ptr, filled
    rank, weight, _, _ = _ranked(state, list_ptr, 0, size, counted, is_near, BLOCK)
    low, high = tl.min(tl.where(rank > _LOWEST, rank, _HIGHEST), 0), tl.max(rank, 0)
    while low < high:
        middle = (low | high) - ((low ^ high) >> 1)  # rounded up
        enough = above + tl.sum(tl.where(rank >= middle, weight, 0), 0) >= needed
        low, high = tl.where(enough, middle, low), tl.where(enough, high, middle - 1)
    return low


@triton.jit
def _middle(low, high):
    """Between two ranks, above the lower: half way between their floats, or if none is there, between their ids."""
    middle = _rank(_value(low) * 0.5 + _value(high) * 0.5, 0x7FFFFFFF)
    return tl.where((middle > low) & (middle <= high), middle, (low | high) - ((low ^ high) >> 1))


@triton.jit
def _sums(state, list_ptr, size, BLOCK: tl.constexpr):
    """Of what is left, the mass and the sum of y times mass."""
    # Added up at the end: until then, no warp waits for another.
    total, scaled = tl.full((BLOCK,), 0, tl.int64), tl.full((BLOCK,), 0, tl.int64)
    for start in range(0, size, BLOCK):
        _, mass, y, _ = _ranked(state, list_ptr, start, size, False, False, BLOCK)
        total += mass
        product = y.to(tl.float64) * mass.to(tl.float64)  # exact: both have 24 bits
        scaled += ((product + 6755399441055744.0) - 6755399441055744.0).to(tl.int64)  # ties to even
    return tl.sum(total, 0), tl.sum(scaled, 0)


@triton.jit
def _drawn(state, list_ptr, size, target, BLOCK: tl.constexpr):
    """Of what is left, the first token whose mass, with that of all before it, exceeds ``target``."""
    token, start = tl.full((), _NONE, tl.int32), tl.full((), 0, tl.int32)
    while (token == _NONE) & (start < size):
        _, mass, _, ids = _ranked(state, list_ptr, start, size, False, False, BLOCK)
        token = _first_beyond(ids, mass, target)
        target -= tl.sum(mass, 0)
        start += BLOCK
    return token


@triton.jit
def _first_beyond(ids, mass, target):
    return tl.min(tl.where((tl.cumsum(mass, 0) > target) & (mass > 0), ids, _NONE), 0)


@triton.jit
def _ranked(state, list_ptr, start, size, counted, is_near, BLOCK: tl.constexpr):
    """Of the list's tokens from ``start``: rank, weight, y, id. Those that are not left rank and weigh least.

    They rank by logit, or if ``is_near``, by how near y is to the mean. If ``counted``, each weighs 1.
    """
    logits_ptr, peak, scale, border, least, near, mean = state
    at = start + tl.arange(0, BLOCK)
    ids = tl.load(list_ptr + at, mask=at < size, other=0)
    x = tl.load(logits_ptr + ids, mask=at < size, other=float("-inf"))
    y, weight = _weights(x, peak, scale)
    mass = weight.to(tl.int64)
    by_logit, by_nearness = _rank(x, ids), _rank(-tl.abs(y - mean), ids)
    left = (at < size) & (by_logit >= border) & (mass >= least) & (by_nearness >= near)
    rank = tl.where(is_near, by_nearness, by_logit)
    return tl.where(left, rank, _LOWEST), tl.where(left, tl.where(counted, 1, mass), 0), y, ids


@triton.jit
def _params(words_ptr):
    """scale, top_k, top_p, least mass, typical_p of a row."""
    scale = tl.load(words_ptr).to(tl.float32, bitcast=True)
    top_p = _word64(words_ptr + 2).to(tl.float64, bitcast=True)
    typical_p = _word64(words_ptr + 6).to(tl.float64, bitcast=True)
    return scale, tl.load(words_ptr + 1), top_p, _word64(words_ptr + 4), typical_p


@triton.jit
def _word64(words_ptr):
    return (tl.load(words_ptr + 1).to(tl.int64) << 32) | (tl.load(words_ptr).to(tl.int64) & 0xFFFFFFFF)


@triton.jit
def _is_filtered(top_k, top_p, least, typical_p, vocab):
    return ((top_k > 0) & (top_k < vocab)) | (top_p < 1.0) | (least > 0) | (typical_p < 1.0)


@triton.jit
def _chunk(logits_ptr, chunk, vocab, BLOCK: tl.constexpr):
    """Ids and logits of a chunk, -inf beyond the row's end."""
    ids = chunk * BLOCK + tl.arange(0, BLOCK)
    return ids, tl.load(logits_ptr + ids, mask=ids < vocab, other=float("-inf"))


@triton.jit
def _peak(best_ptr, num_chunks, CHUNKS: tl.constexpr):
    """Id and value of the row's first largest logit."""
    chunks = tl.arange(0, CHUNKS)
    best = tl.max(tl.load(best_ptr + chunks, mask=chunks < num_chunks, other=_LOWEST), 0)
    return 0x7FFFFFFF - best.to(tl.int32), _value(best)


@triton.jit
def _is_broken(peak):
    return (peak.to(tl.int32, bitcast=True) & 0x7F800000) == 0x7F800000


@triton.jit
def _level(index):
    """Of y, dense where the tokens are that matter. The last, -44: what is below weighs nothing."""
    return ((index + 1) * (index + 7)).to(tl.float32) * -0.125


@triton.jit
def _least_level(row_ptr, top_k, top_p, least, vocab, num_chunks, CHUNKS: tl.constexpr):
    """A level that all tokens reach that the first of the filters might leave, how many do, and the mass of the row."""
    chunks, level = tl.arange(0, CHUNKS), tl.arange(0, _LEVELS)
    at = row_ptr + num_chunks * 2 + chunks[:, None] * _LEVELS + level[None, :]
    valid = chunks < num_chunks
    total = tl.sum(tl.load(row_ptr + num_chunks + chunks, mask=valid, other=0), 0)
    masses = tl.sum(tl.load(at, mask=valid[:, None], other=0), 0)
    counts = tl.sum(tl.load(at + num_chunks * _LEVELS, mask=valid[:, None], other=0), 0)
    # The token with the largest y below a level weighs no more than that level, but for roundings.
    _, mass = _weights(_level(level), 0.0, 1.0)
    enough = (least > 0) & (mass * 1.001 + 2.0 <= least.to(tl.float32))
    enough = tl.where(top_p < 1.0, masses - (masses >> 11) >= _share(top_p, total), enough)
    enough = tl.where((top_k > 0) & (top_k < vocab), counts >= top_k, enough)
    index = tl.min(tl.where(enough, level, _LEVELS - 1), 0)
    return index, tl.sum(tl.where(level == index, counts, 0), 0).to(tl.int32), total


@triton.jit
def _share(share, total):
    """How much mass the fewest tokens have that together have ``share`` of ``total``."""
    product = share * total.to(tl.float64)
    whole = product.to(tl.int64)
    whole += (whole.to(tl.float64) < product).to(tl.int64)
    return tl.minimum(total, tl.maximum(whole, 1))


@triton.jit
def _target(bits, total):
    """bits * total >> 53"""
    return tl.umulhi((bits << 11).to(tl.uint64), total.to(tl.uint64)).to(tl.int64)


@triton.jit
def _rank(x, ids):
    """int64 that orders tokens by x (NaN is the largest, -0.0 is 0.0), then by smaller id."""
    bits = x.to(tl.int32, bitcast=True)
    key = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    key = tl.where(key == -1, 0, key)
    key = tl.where((bits & 0x7FFFFFFF) > 0x7F800000, 0x7FFFFFFF, key)
    return (key.to(tl.int64) << 32) | (0x7FFFFFFF - ids)


@triton.jit
def _value(rank):
    """The float32 that a rank orders by."""
    key = (rank >> 32).to(tl.int32)
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _weights(x, peak, scale):
    """weights() of the definition: y, and 2**y in units of 2**-42. Needs multiply-add not to be fused.

    The weight is a whole number, but a float32.
    """
    y = tl.maximum((x - peak) * scale, -60.0)
    n = (y + 12582912.0) - 12582912.0  # 1.5 * 2**23: rounds to an integer
    r = y - n
    p = r * 1.326472731e-03 + 9.671512991e-03
    p = p * r + 5.550733581e-02
    p = p * r + 2.402224243e-01
    p = p * r + 6.931470037e-01
    p = p * r + 1.0
    weight = p * ((n.to(tl.int32) + (127 + 42)) << 23).to(tl.float32, bitcast=True)  # a power of two: exact
    # From 2**23 on, a float32 is an integer; below, the sum with 2**23 rounds to one, ties to even.
    whole = (weight + 8388608.0) - 8388608.0
    return y, tl.where(weight < 8388608.0, whole, weight)
