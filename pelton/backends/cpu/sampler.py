"""Sampling on the executor's threads, bit for bit what :mod:`pelton.engine.sampling` defines."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ...config import SamplingParams
from ...outputs import Logprob
from ..base import MAX_VOCAB, SampledToken, SampleSpec, SamplingError, check_rows, processed_row

if TYPE_CHECKING:
    from . import _native

Floats = npt.NDArray[np.float32]


class NativeSampler:
    """A :class:`pelton.backends.base.Sampler`. Keeps what it has made ready of a request in the request's spec.

    executor: the native one, whose threads share the rows between its steps.
    """

    def __init__(self, executor: _native.Executor) -> None:
        self._executor = executor

    def __call__(
        self, logits: Floats, specs: Sequence[SampleSpec], drafts: Sequence[Sequence[int]] | None = None
    ) -> list[SampledToken]:
        check_rows(logits, specs, drafts)
        if not specs:
            return []
        requests = [spec.sampler_state or _prepare(spec) for spec in specs]
        extras = [
            self._extra(logits, row, specs, drafts[row] if drafts is not None else ())
            for row, spec in enumerate(specs)
            if drafts is not None or spec.mask is not None or spec.params.logits_processors
        ]
        token_ids, logprobs, failed = self._executor.sample(logits, requests, extras)
        if failed is not None:
            row, reason, peak = failed
            raise SamplingError(row, len(specs), specs[row], _REASONS[reason].format(peak))
        if not logprobs:
            return [SampledToken(token_id) for token_id in token_ids]
        entries: list[dict[int, Logprob] | None] = [None] * len(specs)
        for row, entry in logprobs:
            entries[row] = _logprobs(token_ids[row], entry)
        return [SampledToken(token_id, entry) for token_id, entry in zip(token_ids, entries, strict=True)]

    def logprobs(self, logits: Floats, token_ids: Sequence[int], count: int) -> list[dict[int, Logprob]]:
        """Per row of ``logits``, the log-probability of ``token_ids[i]`` and of the ``count`` most likely.

        Raises:
            SamplingError: a row is broken.
        """
        check_rows(logits, token_ids)
        wanted = np.array(token_ids, np.int32)
        entries, failed = self._executor.logprobs(logits, wanted, min(count, logits.shape[1]))
        if failed is not None:
            raise SamplingError(failed[0], len(logits), None, _REASONS[1].format(failed[1]))
        return [_logprobs(token, entry) for token, entry in zip(wanted.tolist(), entries, strict=True)]

    @staticmethod
    def _extra(logits: Floats, row: int, specs: Sequence[SampleSpec], draft: Sequence[int]) -> tuple[Any, ...]:
        spec = specs[row]
        changed = None
        if spec.params.logits_processors:
            peak = logits[row].max()
            if not np.isfinite(peak):  # the processors need not know what to make of that
                raise SamplingError(row, len(specs), spec, _REASONS[1].format(peak))
            changed = processed_row(logits[row], spec, draft)
        mask = None if spec.mask is None else spec.mask(draft)
        if mask is not None:
            if mask.dtype.itemsize != 4 or mask.ndim != 1:
                raise ValueError(f"a mask of {mask.dtype} {mask.shape}, not 32-bit words")
            mask = np.ascontiguousarray(mask).view(np.int32)
        return row, list(draft), mask, changed


#: By the native SampleStatus.
_REASONS = {
    1: "maximum {}",
    2: "no token that its mask and allowed_token_ids leave",
    3: "maximum {} after its own changes to them",
}


def _prepare(spec: SampleSpec) -> _native.SampleRequest:
    """What the native side keeps of a request. The spec keeps it, so that it is made once."""
    from . import _native

    params: SamplingParams = spec.params
    bad_words: list[list[int]] = []
    for word in params.bad_words:
        if isinstance(word, str):
            raise ValueError(f"the bad word {word!r} has not been tokenized")
        bad_words.append(list(word))
    request = _native.SampleRequest(
        output=spec.output_token_ids,
        temperature=params.temperature,
        top_k=min(params.top_k, MAX_VOCAB),
        top_p=params.top_p,
        min_p=params.min_p,
        typical_p=params.typical_p,
        repetition_penalty=params.repetition_penalty,
        presence_penalty=params.presence_penalty,
        frequency_penalty=params.frequency_penalty,
        seed=spec.seed,
        min_tokens=min(params.min_tokens, 2**62),  # it may be any number, and the native one has 64 bits
        logprobs=-1 if params.logprobs is None else params.logprobs,
        prompt=list(spec.prompt_token_ids) if params.repetition_penalty != 1.0 else [],
        stop_ids=sorted(spec.stop_token_ids),
        allowed_ids=None if params.allowed_token_ids is None else list(params.allowed_token_ids),
        biases=list((params.logit_bias or {}).items()),
        bad_words=bad_words,
    )
    object.__setattr__(spec, "sampler_state", request)  # the one field of a spec that is not its maker's
    return request


def _logprobs(token: int, entry: tuple[float, int, list[int], list[float]]) -> dict[int, Logprob]:
    """The sampled token, then the most likely."""
    logprob, rank, token_ids, values = entry
    result = {token: Logprob(logprob, rank)}
    for place, (other, value) in enumerate(zip(token_ids, values, strict=True), 1):
        result.setdefault(other, Logprob(value, place))
    return result
