"""From logits to tokens on the host, row by row and reproducible.

The order is the documented one of vLLM for logprobs, penalties and temperature:

1. logprobs come from the raw logits;
2. ``min_tokens`` forbids the stop tokens;
3. repetition penalty (prompt and output), frequency and presence penalties (output);
4. temperature; 0 (or below 1e-5, where float32 would overflow) takes the largest logit;
5. top-k, top-p of what top-k left, min-p relative to the most likely token;
6. one uniform random number, a function of seed and number of output tokens alone.

Equal logits rank by token id, the smaller first, so that every step has one right answer.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from ..backends.base import SampledToken, SampleSpec
from ..config import SamplingParams
from ..outputs import Logprob

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]
Ids = npt.NDArray[np.intp]

_GREEDY_BELOW = 1e-5  # the threshold of vLLM


class HostSampler:
    """A :data:`pelton.backends.base.Sampler` in NumPy. Stateless."""

    def __call__(self, logits: Floats, specs: Sequence[SampleSpec]) -> list[SampledToken]:
        """Choose one token per row of ``logits`` (float32 [N, vocab]), which are not changed.

        Raises:
            RuntimeError: a row holds NaN or +inf, or nothing but -inf: the model or a kernel is broken.
        """
        if logits.ndim != 2 or logits.shape[0] != len(specs):
            raise RuntimeError(f"logits of shape {logits.shape} for {len(specs)} sequences to sample")
        if not specs:
            return []
        # One pass over the whole batch answers the greedy rows, and finds NaN, which argmax takes for the
        # largest value.
        best = logits.argmax(axis=1)
        peaks = logits[np.arange(len(specs)), best]
        if not np.isfinite(peaks).all():
            row = int(np.flatnonzero(~np.isfinite(peaks))[0])
            raise RuntimeError(
                f"logits of request row {row} of {len(specs)} (seed {specs[row].seed},"
                f" {len(specs[row].output_token_ids)} output tokens) have maximum {peaks[row]}"
            )
        tokens: list[SampledToken] = []
        for row, spec in enumerate(specs):
            params: SamplingParams = spec.params
            if params.temperature < _GREEDY_BELOW and not _is_changed(spec):
                token = int(best[row])
            else:
                token = _sample_row(logits[row], spec)
            tokens.append(
                SampledToken(token, None if params.logprobs is None else _logprobs(logits[row], token, params.logprobs))
            )
        return tokens


def _has_penalty(params: SamplingParams) -> bool:
    return params.repetition_penalty != 1.0 or params.presence_penalty != 0.0 or params.frequency_penalty != 0.0


def _is_changed(spec: SampleSpec) -> bool:
    """Whether penalties or ``min_tokens`` change this row's logits."""
    params: SamplingParams = spec.params
    return _has_penalty(params) or (len(spec.output_token_ids) < params.min_tokens and bool(spec.stop_token_ids))


def adjusted_logits(row: Floats, spec: SampleSpec) -> Floats:
    """The row after ``min_tokens`` and penalties; the row itself if nothing applies, else a copy."""
    if not _is_changed(spec):
        return row
    params: SamplingParams = spec.params
    row = row.copy()
    if params.repetition_penalty != 1.0:
        # A token that occurs twice is read and written twice with the same values.
        seen = np.array([*spec.prompt_token_ids, *spec.output_token_ids], dtype=np.intp)
        values = row[seen]
        row[seen] = np.where(values > 0, values / params.repetition_penalty, values * params.repetition_penalty)
    if spec.output_token_ids and (params.presence_penalty or params.frequency_penalty):
        out, counts = np.unique(np.array(spec.output_token_ids, dtype=np.intp), return_counts=True)
        row[out] -= (params.frequency_penalty * counts + params.presence_penalty).astype(np.float32)
    if len(spec.output_token_ids) < params.min_tokens and spec.stop_token_ids:
        allowed = row.copy()
        allowed[list(spec.stop_token_ids)] = -np.inf
        # A vocabulary of nothing but stop tokens cannot obey; then it is better to answer than to fail.
        row = allowed if np.isfinite(allowed.max()) else row
    return row


def _sample_row(row: Floats, spec: SampleSpec) -> int:
    params: SamplingParams = spec.params
    row = adjusted_logits(row, spec)
    if params.temperature < _GREEDY_BELOW:
        return int(row.argmax())
    peak = float(row.max())
    vocab = row.shape[0]
    ids: Ids | None = None  # None: the whole vocabulary in its order
    if 0 < params.top_k < vocab:
        ids = _largest(row, params.top_k)
        weights = _weights(row[ids], peak, params.temperature)
        if params.top_p < 1.0:
            ids, weights = _top_p(ids, weights, float(weights.sum()), params.top_p)
    else:
        weights = _weights(row, peak, params.temperature)
        if params.top_p < 1.0:
            total = float(weights.sum())
            ids = _candidates(weights, params.top_p, total)
            ids, weights = _top_p(ids, weights[ids], total, params.top_p)
    if params.min_p > 0.0:
        # The most likely token weighs 1.
        kept = np.flatnonzero(weights >= params.min_p)
        weights = weights[kept]
        ids = kept if ids is None else ids[kept]
    chosen = _draw(weights, uniform(spec.seed, len(spec.output_token_ids)))
    return chosen if ids is None else int(ids[chosen])


def uniform(seed: int, step: int) -> float:
    """The random number in [0, 1) of a request's ``step``-th output token: counter-based, no state."""
    # 64 bits of a counter-based generator; the upper 53 are a double's mantissa.
    return (int(np.random.Philox(key=seed, counter=step).random_raw()) >> 11) * 2.0**-53


def _weights(row: Floats, peak: float, temperature: float) -> Doubles:
    """exp((logit - peak) / temperature): the probabilities up to a factor, 1.0 for the most likely."""
    weights = np.subtract(row, peak, dtype=np.float64)
    weights /= temperature
    return np.exp(weights, out=weights)


def _largest(row: Floats | Doubles, k: int) -> Ids:
    """The ids of the k largest values, largest first, ties by id; without sorting the row."""
    k = min(k, row.shape[0])
    threshold = np.partition(row, row.shape[0] - k)[row.shape[0] - k]
    ids = np.flatnonzero(row >= threshold)  # at least k: equal values may be more than wanted
    return ids[np.argsort(-row[ids], kind="stable")[:k]]


def _candidates(weights: Doubles, top_p: float, total: float) -> Ids:
    """A prefix of the ranking, largest first, that surely holds what top-p keeps; the rest stays unsorted."""
    for k in (1024, 16384):  # a peaked distribution needs few, and a partition is cheap beside a sort
        if k < len(weights):
            ids = _largest(weights, k)
            if float(weights[ids].sum()) > (top_p + 1e-9) * total:
                return ids
    # Tokens below this weight sum to less than half of what top-p leaves out, wherever they stand.
    ids = np.flatnonzero(weights >= 0.5 * (1.0 - top_p) * total / len(weights))
    return ids[np.argsort(-weights[ids], kind="stable")]


def _top_p(ids: Ids, weights: Doubles, total: float, top_p: float) -> tuple[Ids, Doubles]:
    """The shortest prefix with at least ``top_p`` of ``total``; the token that crosses it is kept."""
    length = int(np.searchsorted(np.cumsum(weights), top_p * total, side="left")) + 1
    return ids[:length], weights[:length]


def _draw(weights: Doubles, u: float) -> int:
    cumulative = np.cumsum(weights)
    # side="right": a token of weight 0 has an empty interval and is never drawn.
    chosen = int(np.searchsorted(cumulative, u * cumulative[-1], side="right"))
    if chosen == len(weights):  # u * total was rounded up to the total
        chosen = int(np.flatnonzero(weights)[-1])
    return chosen


def _logprobs(row: Floats, token: int, count: int) -> dict[int, Logprob]:
    """The log-probability of ``token``, then those of the ``count`` most likely, largest first."""
    peak = float(row.max())
    offset = peak + float(np.log(np.exp(row - np.float32(peak), dtype=np.float32).sum(dtype=np.float64)))
    result = {token: Logprob(float(row[token]) - offset, int((row > row[token]).sum()) + 1)}
    if count:
        for rank, other in enumerate(_largest(row, count), 1):
            result.setdefault(int(other), Logprob(float(row[other]) - offset, rank))
    return result
