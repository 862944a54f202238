"""Which steps are sampled from on the device, and what its kernel must know of their requests."""

from __future__ import annotations

import numpy as np

from ...config import SamplingParams
from ..base import PENDING, Batch, SampleSpec
from ..step_inputs import Ints
from .philox import random_bits_of
from .triton.sampling import NUM_WORDS, request_words, sampling_words


def on_device(params: SamplingParams) -> bool:
    """Whether the kernel does all that is asked for, but for ``min_tokens``."""
    return (
        params.logprobs is None
        and params.repetition_penalty == 1.0
        and not params.presence_penalty
        and not params.frequency_penalty
        and not params.logit_bias
        and not params.bad_words
        and params.allowed_token_ids is None
        and not params.logits_processors
    )


class SamplingWords:
    """The sampling kernel's view of batches. Keeps what does not change of the requests it has met."""

    def __init__(self, max_num_seqs: int) -> None:
        self._most = 4 * max_num_seqs
        self._known: dict[str, tuple[SampleSpec, Ints | None]] = {}  # None: the host must sample

    def of(self, batch: Batch) -> Ints | None:
        """A row for each row of logits; None if the host must sample, or needs logits or hidden states."""
        rows: list[Ints] = []
        seeds: list[int] = []
        steps: list[int] = []
        for sequence in batch.sequences:
            if sequence.targets or sequence.num_hidden:
                return None
            spec = sequence.sample
            if spec is None:
                continue
            words = self._request(sequence.request_id, spec)
            num_tokens = len(spec.output_token_ids) + (sequence.token_ids[-1] == PENDING)
            stops_forbidden = spec.stop_token_ids and num_tokens < spec.params.min_tokens
            if words is None or spec.mask is not None or stops_forbidden:
                return None
            for i in range(1 + sequence.num_drafts):
                rows.append(words)
                seeds.append(spec.seed)
                steps.append(num_tokens + i)
        if not rows:
            return np.zeros((0, NUM_WORDS), np.int32)
        return sampling_words(rows, random_bits_of(np.array(seeds, np.uint64), np.array(steps, np.uint64)))

    def _request(self, request_id: str, spec: SampleSpec) -> Ints | None:
        known = self._known.get(request_id)
        if known is None or known[0] is not spec:
            if len(self._known) >= self._most:
                self._known.clear()
            known = self._known[request_id] = (spec, request_words(spec.params) if on_device(spec.params) else None)
        return known[1]
