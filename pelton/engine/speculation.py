"""Speculative decoding: guess the next tokens, check all guesses in one step, keep those that are right.

A step computes the last token and a draft of what may follow, as one ragged piece, and samples at each of these
positions as if the draft were true: with the request's own parameters and the random number of that position. Where
the sampled token is the draft's, the next position was computed on a true history; at the first difference the rest is
thrown away. So the tokens are not only of the right distribution (Leviathan et al., 2023, arXiv:2211.17192), they are
the very ones that come without speculation, and a bad draft costs time, nothing else.

``NgramProposer`` finds drafts in the sequence itself: what followed the last time that the latest few tokens were there
(prompt lookup). It is right where answers repeat their prompts: summaries, corrections, code.

``SpeculationControl`` decides how long drafts may be. Decoding a small batch is bound by memory, and more tokens cost
little; in a large one every token costs. It goes by measured times and acceptance, not by rules.
"""

from __future__ import annotations

from collections.abc import Sequence

#: Longest and shortest context that a draft is looked up by, in tokens.
_CONTEXTS = (4, 3, 2)
#: Weight of the newest value in running means.
_NEWEST = 0.1
#: Every so many steps without drafts one is tried again: the text may have changed.
_RETRY = 32


class NgramProposer:
    """Drafts for one sequence, by looking up its latest tokens in all that it has. Takes a microsecond per token."""

    __slots__ = ("_after", "_seen")

    def __init__(self) -> None:
        self._after: dict[tuple[int, ...], int] = {}  # context -> where the latest text after it starts
        self._seen = 0

    def propose(self, token_ids: Sequence[int], count: int) -> tuple[int, ...]:
        """Up to ``count`` tokens that may follow ``token_ids``; empty if these end as never before."""
        end = len(token_ids)
        after = self._after
        # Contexts whose next token is known; the one at the very end is what is looked up.
        for position in range(max(self._seen, _CONTEXTS[-1]), end):
            for n in _CONTEXTS:
                if n <= position:
                    after[tuple(token_ids[position - n : position])] = position
        self._seen = end
        for n in _CONTEXTS:
            start = after.get(tuple(token_ids[end - n : end])) if n <= end else None
            if start is not None:
                return tuple(token_ids[start : start + count])
        return ()


class SpeculationControl:
    """How many tokens a draft may have, from 0 to ``most``, for a batch of a given size.

    Keeps the time of steps by their number of tokens, and how often a draft token was right.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._seconds: dict[int, float] = {}  # number of tokens in a step that only decodes -> running mean
        self._acceptance = 0.7  # of a token whose predecessors were right; at first an optimist's
        self._steps_without = 0
        self.num_draft_tokens = 0
        self.num_accepted_tokens = 0

    def length(self, num_sequences: int) -> int:
        """Draft tokens for each sequence of a step that decodes ``num_sequences``."""
        best, best_rate = 0, 0.0
        for length in range(self._most + 1):
            seconds = self._time(num_sequences * (1 + length))
            if seconds is None:
                return length  # find out
            rate = _expected(self._acceptance, length) / seconds
            if rate > best_rate:
                best, best_rate = length, rate
        if best == 0:
            self._steps_without += 1
            if self._steps_without >= _RETRY:
                self._steps_without = 0
                return 1
        return best

    def _time(self, num_tokens: int) -> float | None:
        """Seconds of a step; that of the next larger one that is known, if it is not much larger."""
        known = self._seconds.get(num_tokens)
        if known is not None:
            return known
        near = [n for n in self._seconds if num_tokens < n <= num_tokens + num_tokens // 8]
        return self._seconds[min(near)] if near else None

    def took(self, num_tokens: int, seconds: float) -> None:
        """A step that only decoded took that long."""
        before = self._seconds.get(num_tokens)
        self._seconds[num_tokens] = seconds if before is None else before + _NEWEST * (seconds - before)

    def judged(self, num_drafts: int, num_accepted: int) -> None:
        """Of a draft, the first ``num_accepted`` tokens were right."""
        self.num_draft_tokens += num_drafts
        self.num_accepted_tokens += num_accepted
        tried = num_accepted + (num_accepted < num_drafts)  # what comes after a wrong one says nothing
        for i in range(tried):
            self._acceptance += _NEWEST * 0.2 * ((i < num_accepted) - self._acceptance)


def _expected(acceptance: float, length: int) -> float:
    """Tokens that a step gives a sequence: 1 + a + a^2 + ... + a^length."""
    total, power = 0.0, 1.0
    for _ in range(length + 1):
        total += power
        power *= acceptance
    return total


def max_num_logits(max_num_seqs: int, num_speculative_tokens: int) -> int:
    """Rows of logits that a step may have: drafts use what a small batch leaves, and there is room for one at least."""
    return max(max_num_seqs, 1 + num_speculative_tokens)
