"""From logits to tokens in NumPy: the definition that native samplers must meet bit for bit.

The order is that of vLLM where it has one:

1. logprobs come from the raw logits;
2. ``logits_processors``, in their order;
3. the mask of structured output, then ``allowed_token_ids``, forbid tokens; at least one must be left;
4. ``bad_words`` forbid their last token after an output that ends with the others; ``min_tokens`` forbids the
   stop tokens. Each of the two gives way if it would leave no token: better to answer than to fail;
5. ``logit_bias`` is added;
6. repetition penalty (prompt and output), frequency and presence penalties (output);
7. temperature; 0 (or below 1e-5, where float32 would overflow) takes the largest logit;
8. top-k, top-p of what top-k left, min-p relative to the most likely token, then typical-p of what is left;
9. one uniform random number, a function of seed and number of output tokens alone, picks a token from
   what is left in the order of token ids.

Equal logits rank by token id, the smaller first, so that every step has one right answer.

Everything that is compared is the same number in any implementation. A token's weight is ``2**y`` of its scaled
logit y as :func:`weights` computes it, float32 products and sums one by one, rounded to a whole number of 2**-42.
Sums of weights are sums of integers, exact in any order.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

from ..backends.base import MAX_VOCAB, SampledToken, SampleSpec, SamplingError, check_rows, processed_row
from ..config import SamplingParams
from ..outputs import Logprob

Floats = npt.NDArray[np.float32]
Counts = npt.NDArray[np.int64]
Ids = npt.NDArray[np.intp]

_GREEDY_BELOW = 1e-5  # the threshold of vLLM
_LOG2_E = 1.4426950408889634
_FRACTION_BITS = 42
_ONE = 1 << _FRACTION_BITS


class HostSampler:
    """A :class:`pelton.backends.base.Sampler`. Stateless."""

    def __call__(
        self, logits: Floats, specs: Sequence[SampleSpec], drafts: Sequence[Sequence[int]] | None = None
    ) -> list[SampledToken]:
        check_rows(logits, specs, drafts)
        if not specs:
            return []
        check_vocab(logits.shape[1])
        # One pass over the whole batch answers the greedy rows, and finds NaN, which argmax takes for the
        # largest value.
        best = logits.argmax(axis=1)
        peaks = logits[np.arange(len(specs)), best]
        if not np.isfinite(peaks).all():
            broken = int(np.flatnonzero(~np.isfinite(peaks))[0])
            raise SamplingError(broken, len(specs), specs[broken], f"maximum {peaks[broken]}")
        tokens: list[SampledToken] = []
        for index, spec in enumerate(specs):
            params: SamplingParams = spec.params
            draft = drafts[index] if drafts is not None else ()
            raw = logits[index]
            try:
                with np.errstate(over="ignore"):  # an infinity is found below
                    row = adjusted_logits(raw, spec, draft)
            except ArithmeticError as error:
                raise SamplingError(index, len(specs), spec, str(error)) from None
            if params.temperature < _GREEDY_BELOW:
                token = int(best[index]) if row is raw else int(row.argmax())
            else:
                token = _sample_row(row, params, random_bits(spec.seed, len(spec.output_token_ids) + len(draft)))
            tokens.append(
                SampledToken(token, None if params.logprobs is None else logprobs_of(raw, token, params.logprobs))
            )
        return tokens

    def logprobs(self, logits: Floats, token_ids: Sequence[int], count: int) -> list[dict[int, Logprob]]:
        """Per row of ``logits``, the log-probability of ``token_ids[i]`` and of the ``count`` most likely.

        Raises:
            SamplingError: a row is broken.
        """
        check_rows(logits, token_ids)
        peaks = logits.max(axis=1)
        if not np.isfinite(peaks).all():
            broken = int(np.flatnonzero(~np.isfinite(peaks))[0])
            raise SamplingError(broken, len(logits), None, f"maximum {peaks[broken]}")
        return [logprobs_of(row, int(token), count) for row, token in zip(logits, token_ids, strict=True)]


def check_vocab(vocab: int) -> None:
    if not 1 <= vocab <= MAX_VOCAB:
        raise ValueError(f"rows of {vocab} logits cannot be sampled, only of 1 to {MAX_VOCAB}")


def adjusted_logits(raw: Floats, spec: SampleSpec, draft: Sequence[int] = ()) -> Floats:
    """The row after steps 2 to 6; the row itself if nothing applies, else a copy.

    Raises:
        ArithmeticError: its maximum is not finite.
    """
    params: SamplingParams = spec.params
    output = [*spec.output_token_ids, *draft]
    row = processed_row(raw, spec, draft) if params.logits_processors else raw
    if row is not raw:
        _require_finite(row)
    mask = None if spec.mask is None else spec.mask(draft)
    if mask is not None:
        row = np.where(_allowed(mask, len(row)), row, np.float32(-np.inf))
    if params.allowed_token_ids is not None:
        _check_ids("allowed_token_ids", params.allowed_token_ids, len(row))
        only = np.full_like(row, -np.inf)
        only[list(params.allowed_token_ids)] = row[list(params.allowed_token_ids)]
        row = only
    if (mask is not None or params.allowed_token_ids is not None) and row.max() == -np.inf:
        raise ArithmeticError("no token that its mask and allowed_token_ids leave")
    if params.bad_words:
        row = _without(row, _bad_tokens(params.bad_words, output, len(row)))
    if params.min_tokens:
        _check_ids("stop_token_ids", spec.stop_token_ids, len(row))
        if len(output) < params.min_tokens:
            row = _without(row, list(spec.stop_token_ids))
    if params.logit_bias:
        _check_ids("logit_bias", params.logit_bias, len(row))
        row = row.copy()
        row[list(params.logit_bias)] += np.array(list(params.logit_bias.values()), np.float32)
    if params.repetition_penalty != 1.0:
        row = row.copy()
        # A token that occurs twice is read and written twice with the same values.
        seen = np.array([*spec.prompt_token_ids, *output], dtype=np.intp)
        values, penalty = row[seen], np.float32(params.repetition_penalty)
        row[seen] = np.where(values > 0, values / penalty, values * penalty)
    if output and (params.presence_penalty or params.frequency_penalty):
        row = row.copy()
        out, counts = np.unique(np.array(output, dtype=np.intp), return_counts=True)
        row[out] -= (params.frequency_penalty * counts + params.presence_penalty).astype(np.float32)
    if row is not raw:
        _require_finite(row)
    return row


def _require_finite(row: Floats) -> None:
    peak = row.max()  # NaN if there is one
    if not np.isfinite(peak):
        raise ArithmeticError(f"maximum {peak} after its own changes to them")


def _allowed(mask: npt.NDArray[np.int32] | npt.NDArray[np.uint32], vocab: int) -> npt.NDArray[np.bool_]:
    words = -(-vocab // 32)
    if mask.shape != (words,) or mask.dtype.itemsize != 4:
        raise ValueError(f"a mask of {mask.dtype} {mask.shape} for {vocab} logits, not 32-bit words [{words}]")
    bits = np.unpackbits(np.ascontiguousarray(mask).view(np.uint8), bitorder="little")
    return bits[:vocab].astype(np.bool_)


def _check_ids(name: str, ids: Iterable[int], vocab: int) -> None:
    largest = max(ids, default=-1)
    if largest >= vocab:
        raise ValueError(f"{name} names token {largest}, a row has {vocab} logits")


def _bad_tokens(words: Sequence[str | Sequence[int]], output: list[int], vocab: int) -> list[int]:
    """The last tokens of the words whose other tokens end the output."""
    found: list[int] = []
    for word in words:
        if isinstance(word, str):
            raise ValueError(f"the bad word {word!r} has not been tokenized")
        _check_ids("bad_words", word, vocab)
        *before, last = word
        if not before or output[-len(before) :] == before:
            found.append(last)
    return found


def _without(row: Floats, forbidden: list[int]) -> Floats:
    """The row without these tokens, or the row itself if it has no others."""
    left = row.copy()
    left[forbidden] = -np.inf
    return left if left.max() > -np.inf else row


def _sample_row(row: Floats, params: SamplingParams, bits: int) -> int:
    peak, vocab = row.max(), row.shape[0]
    ids = np.arange(vocab)  # what is left, in the order of ids
    scaled, mass = weights(row, peak, params.temperature)
    if 0 < params.top_k < vocab:
        ids = _first(row, ids, params.top_k)
    if params.top_p < 1.0:
        ids = _share(row, mass, ids, params.top_p)
    if params.min_p > 0.0:
        # The most likely token weighs 1.
        ids = ids[mass[ids] >= max(1, math.ceil(params.min_p * _ONE))]
    if params.typical_p < 1.0:
        # A token's surprise is log2(total) - scaled, their mean is the entropy: the total cancels out.
        total = int(mass[ids].sum())
        kept = scaled[ids].astype(np.float64) * _as_float(mass[ids])
        mean = np.float32(float(_fixed(kept).sum()) / float(total))
        distance = np.full_like(row, np.inf)
        distance[ids] = np.abs(scaled[ids] - mean)
        ids = _share(-distance, mass, ids, params.typical_p)
    cumulative = np.cumsum(mass[ids])
    # side="right": a token of weight 0 has an empty interval and is never drawn.
    return int(ids[np.searchsorted(cumulative, bits * int(cumulative[-1]) >> 53, side="right")])


def _first(key: Floats, ids: Ids, count: int) -> Ids:
    """The ``count`` of ``ids`` with the largest keys, ties by id; in the order of ids."""
    return np.sort(ids[np.argsort(-key[ids], kind="stable")[:count]])


def _share(key: Floats, mass: Counts, ids: Ids, share: float) -> Ids:
    """The fewest of ``ids``, by key, that together have ``share`` of their mass; in the order of ids.

    The token that crosses the border is kept.
    """
    ranked = ids[np.argsort(-key[ids], kind="stable")]
    cumulative = np.cumsum(mass[ranked])
    total = int(cumulative[-1])
    needed = min(total, max(1, math.ceil(share * float(total))))
    return np.sort(ranked[: int(np.searchsorted(cumulative, needed, side="left")) + 1])


def random_bits(seed: int, step: int) -> int:
    """53 random bits for a request's ``step``-th output token: counter-based, no state."""
    return int(np.random.Philox(key=seed, counter=step).random_raw()) >> 11


def uniform(seed: int, step: int) -> float:
    """:func:`random_bits` as a number in [0, 1)."""
    return random_bits(seed, step) * 2.0**-53


def weights(row: Floats, peak: np.float32, temperature: float) -> tuple[Floats, Counts]:
    """float32 scaled logits y = (logit - peak) / (ln 2 temperature), at least -60, and 2**y in units of 2**-42.

    2**y = 2**n * p(r) with y = n + r, |r| <= 1/2. Every product and sum is rounded to float32 on its own, without
    fused multiply-add: the relative error is below 1e-6 for weights that matter. 1 for the most likely.
    """
    f = np.float32
    with np.errstate(over="ignore"):  # of what is far below
        y = np.maximum((row - peak) * f(_LOG2_E / temperature), f(-60.0))  # 2**-60 rounds to 0
    shifter = f(12582912.0)  # 1.5 * 2**23: adding it rounds to an integer
    n = (y + shifter) - shifter
    r = y - n
    p = f(1.326472731e-03) * r + f(9.671512991e-03)
    for coefficient in (5.550733581e-02, 2.402224243e-01, 6.931470037e-01, 1.0):
        p = p * r + f(coefficient)
    return y, _fixed(np.ldexp(p, n.astype(np.int32)).astype(np.float64))


def _fixed(value: npt.NDArray[np.float64]) -> Counts:
    """In units of 2**-42, ties to even."""
    return np.rint(np.ldexp(value, _FRACTION_BITS)).astype(np.int64)


def _as_float(mass: Counts) -> npt.NDArray[np.float64]:
    return np.ldexp(mass.astype(np.float64), -_FRACTION_BITS)


def logprobs_of(row: Floats, token: int, count: int) -> dict[int, Logprob]:
    """The log-probability of ``token``, then those of the ``count`` most likely, largest first."""
    peak = row.max()
    total = int(weights(row, peak, 1.0)[1].sum())
    offset = float(peak) + math.log(math.ldexp(float(total), -_FRACTION_BITS))
    result = {token: Logprob(float(row[token]) - offset, int((row > row[token]).sum()) + 1)}
    for rank, other in enumerate(np.argsort(-row, kind="stable")[:count] if count else (), 1):
        result.setdefault(int(other), Logprob(float(row[other]) - offset, rank))
    return result
