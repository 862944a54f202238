"""Structured output: which tokens may come next, so that an answer is what a JSON schema, regex or grammar describes.

Grammars are compiled and followed by llguidance (https://github.com/guidance-ai/llguidance), which is bounded in time:
a schema that is impossible, or too large, is refused when the request is added. The mask of a step is computed in a
thread while the model runs.
"""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt

from ..config import StructuredOutputsParams
from ..errors import RequestError

Mask = npt.NDArray[np.int32]

#: Between the parts of a JSON text. Unlimited whitespace is what small models like to answer with.
_WHITESPACE = r"[ \n\r\t]{0,32}"
#: Compiled grammars that are kept; many requests have the same.
_KEPT = 64
#: Characters of a schema or grammar. Larger ones take seconds to compile.
_LONGEST = 1 << 20


class Grammar:
    """What one sequence may still say. Follows its tokens; ``mask`` is that of its SampleSpec.

    ``error`` says why no further token can be chosen, if that happens: the grammar became too complex on the way.
    """

    def __init__(self, matcher: Any, vocab_size: int, threads: ThreadPoolExecutor) -> None:
        self._matcher = matcher
        self._words = np.zeros(-(-vocab_size // 32), np.int32)
        self._threads = threads
        self._coming: Future[None] | None = None
        self.error: str | None = None

    def prepare(self) -> None:
        """Start computing the mask of the next token; the model may run meanwhile."""
        if self._coming is None and self.error is None:
            self._coming = self._threads.submit(self._fill, self._words)

    def mask(self, draft: Sequence[int] = ()) -> Mask | None:
        """Which tokens may follow, after those of a draft; bit i % 32 of word i / 32. None if there was an error."""
        words = self._words
        if self._coming is not None:
            self._coming.result()
            self._coming = None
            if not draft:
                return None if self.error else words
        if self.error is None and draft:
            words = np.zeros_like(words)  # the sampler wants the masks of several positions at once
            taken = self._matcher.try_consume_tokens(list(draft))
            self._fill(words)
            self._matcher.rollback(taken)
            if taken < len(draft):
                raise ValueError("a draft that the grammar does not allow")
        elif self.error is None:
            self._fill(words)
        return None if self.error else words

    def _fill(self, words: Mask) -> None:
        self._matcher.unsafe_compute_mask_ptr(words.ctypes.data, words.nbytes)
        self._look()

    def accept(self, token_id: int) -> None:
        """Follow the token that was chosen."""
        self._matcher.consume_token(token_id)
        self._look()

    def allowed(self, draft: Sequence[int]) -> int:
        """How many tokens of a draft the grammar allows one after the other."""
        if self._coming is not None:  # of a step that failed: the matcher may still be at work
            self._coming.result()
        return int(self._matcher.validate_tokens(list(draft)))

    def _look(self) -> None:
        if self._matcher.is_error():
            self.error = _first_line(self._matcher.get_error())

    def copy(self) -> Grammar:
        return Grammar(self._matcher.deep_copy(), 32 * len(self._words), self._threads)


class GrammarCompiler:
    """Makes grammars for one vocabulary. May be called from several threads.

    Args:
        tokenizer_json: gives the tokenizer as Hugging Face's tokenizer.json; called once, at the first grammar.
        vocab_size: number of logits.
        eos_token_ids: what ends an answer.
    """

    def __init__(self, tokenizer_json: Callable[[], str], vocab_size: int, eos_token_ids: frozenset[int]) -> None:
        self._tokenizer_json = tokenizer_json
        self._vocab_size = vocab_size
        self._eos_token_ids = sorted(t for t in eos_token_ids if 0 <= t < vocab_size)
        self._lock = threading.Lock()
        self._tokenizer: Any = None
        self._kept: OrderedDict[str, Grammar] = OrderedDict()
        # One is enough: a mask takes some 50 us, and kernels want the other cores.
        self._threads = ThreadPoolExecutor(1, "pelton-grammar")

    def compile(self, params: StructuredOutputsParams) -> Grammar:
        """A grammar at its start, which others get as well: each sequence follows a copy.

        Raises:
            RequestError: it is no valid schema, regex or grammar, nothing satisfies it, or it is too large.
        """
        kind, text = _source(params)
        key = f"{kind}:{text}"
        with self._lock:
            grammar = self._kept.get(key)
            if grammar is None:
                grammar = self._kept[key] = self._compiled(kind, text)
                if len(self._kept) > _KEPT:
                    self._kept.popitem(last=False)
            self._kept.move_to_end(key)
            return grammar

    def _compiled(self, kind: str, text: str) -> Grammar:
        from llguidance import LLMatcher, LLTokenizer
        from llguidance.gbnf_to_lark import any_to_lark

        if self._tokenizer is None:
            self._tokenizer = LLTokenizer(
                self._tokenizer_json(), n_vocab=self._vocab_size, eos_token=self._eos_token_ids
            )
        try:
            if kind == "json":
                options = {"whitespace_pattern": _WHITESPACE}
                source = LLMatcher.grammar_from_json_schema(text, overrides=options)
            elif kind == "regex":
                source = LLMatcher.grammar_from_regex(text)
            else:
                source = LLMatcher.grammar_from_lark(any_to_lark(text))
        except ValueError as error:
            raise _refused(kind, _first_line(str(error))) from None
        grammar = Grammar(LLMatcher(self._tokenizer, source, log_level=0), self._vocab_size, self._threads)
        grammar._look()
        if grammar.error is None:
            grammar.mask()  # finds what nothing satisfies
        if grammar.error is not None:
            raise _refused(kind, grammar.error)
        return grammar

    def close(self) -> None:
        self._threads.shutdown(wait=False)


def _refused(kind: str, why: str) -> RequestError:
    what = {"json": "JSON schema", "regex": "regex", "grammar": "grammar"}[kind]
    return RequestError(f"the {what} of structured_outputs cannot be used ({why})", "correct or simplify it")


def _source(params: StructuredOutputsParams) -> tuple[str, str]:
    """(kind, text) of what is asked for."""
    if params.json_object:
        return "json", '{"type":"object"}'
    if params.json is not None:
        try:
            text = params.json if isinstance(params.json, str) else json.dumps(params.json)
            json.loads(text)
        except (TypeError, ValueError, RecursionError) as error:
            raise _refused("json", f"{type(error).__name__}: {error}") from None
        kind = "json"
    elif params.regex is not None:
        kind, text = "regex", params.regex
    elif params.choice is not None:
        # A JSON string is a string of Lark's.
        kind, text = "grammar", "start: " + " | ".join(json.dumps(choice) for choice in params.choice)
    else:
        kind, text = "grammar", params.grammar or ""
    if len(text) > _LONGEST:
        raise _refused(kind, f"{len(text):,} characters, more than {_LONGEST:,}")
    return kind, text


def _first_line(message: str) -> str:
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    return lines[0][:200] if lines else "unknown error"
