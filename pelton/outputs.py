"""What a caller gets back, in the shape that vLLM users know."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from .metrics import RequestMetrics


@dataclass(slots=True)
class CompletionOutput:
    """One answer to a prompt.

    In a stream, ``text``, ``token_ids`` and ``logprobs`` are what is new since the last output of this
    answer; otherwise they are all of it. ``logprobs[i]`` maps token id to log-probability (natural
    logarithm, of the raw logits) at position i. ``stop_reason`` is the stop string or stop token id
    that ended the answer, None for an end-of-sequence token or another ``finish_reason``.
    """

    index: int
    text: str = ""
    token_ids: Sequence[int] = ()
    logprobs: list[dict[int, float]] | None = None
    finish_reason: str | None = None  # "stop" | "length" | "abort"; None: not finished
    stop_reason: int | str | None = None
    cumulative_logprob: float | None = None

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None


@dataclass(slots=True)
class RequestOutput:
    """A prompt and its answers. ``prompt`` is None for a prompt given as token ids.

    ``metrics`` belongs to the first answer; it is None until that is finished.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: Sequence[int]
    outputs: list[CompletionOutput] = field(default_factory=list)
    finished: bool = False
    metrics: RequestMetrics | None = None
