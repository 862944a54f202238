"""What ``pelton.build.build`` returns, without a model: letters are tokens and answers are scripted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

from pelton.backends.base import SampleSpec
from pelton.config import PoolerConfig
from pelton.errors import TokenizerError

from .fake_executor import FakeExecutor

EOS = 0
USER, ASSISTANT, SYSTEM = 1, 2, 3
ROLES = {"user": USER, "assistant": ASSISTANT, "system": SYSTEM}
FIRST_LETTER = 4  # the id of a space; printable ASCII follows, then the newline
VOCAB_SIZE = FIRST_LETTER + 96
NEWLINE = VOCAB_SIZE - 1


def ids_of(text: str) -> list[int]:
    ids = (NEWLINE if letter == "\n" else ord(letter) - 32 + FIRST_LETTER for letter in text)
    return [i if i >= FIRST_LETTER else i + 32 - FIRST_LETTER for i in ids]  # roles stand for themselves


def text_of(ids: Sequence[int]) -> str:
    return "".join("\n" if i == NEWLINE else chr(i - FIRST_LETTER + 32) for i in ids if i >= FIRST_LETTER)


class FakeDetokenizer:
    """Holds the last letter back, as a real one holds back half a character."""

    def __init__(self) -> None:
        self._held = ""

    def add(self, token_ids: Sequence[int]) -> str:
        text = self._held + text_of(token_ids)
        self._held = text[-1:]
        return text[:-1]

    def finish(self) -> str:
        held, self._held = self._held, ""
        return held


class FakeTokenizer:
    chat_template: str | None = "a template"

    def __init__(self, has_template: bool = True) -> None:
        self.has_template = has_template

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return ids_of(text)

    def encode_batch(self, texts: Sequence[str], add_special_tokens: bool = True) -> list[list[int]]:
        return [ids_of(text) for text in texts]

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        return text_of(ids)

    def template_source(self, with_tools: bool = False) -> str | None:
        return self.chat_template

    def special_token_id(self, text: str) -> int | None:
        return None

    added_token_id = special_token_id

    def apply_chat_template(self, messages: Any, *, tools: Any = None, **variables: Any) -> str:
        return "".join(chr(ROLES[m["role"]]) + (m["content"] or "") for m in messages) + chr(ASSISTANT)

    def encode_chat(self, messages: Any, *, tools: Any = None) -> list[int]:
        if not self.has_template:
            raise TokenizerError("the checkpoint has no chat template", "use raw prompts")
        ids: list[int] = []
        for message in messages:
            ids += [ROLES[message["role"]], *ids_of(message["content"])]
        return [*ids, ASSISTANT]

    def detokenizer(self, skip_special_tokens: bool = True, *, at_start: bool = True) -> FakeDetokenizer:
        return FakeDetokenizer()


class FakeBuilt:
    """``answer(prompt text)`` is what the model says; by default it repeats the prompt in capitals."""

    eos_token_ids = frozenset({EOS})
    vocab_size = VOCAB_SIZE
    kv_identity = "fake"
    draft_executor = None
    draft_vocab_size = None
    pooler = PoolerConfig(hidden_size=4)

    def __init__(
        self,
        answer: Callable[[str], str] = str.upper,
        *,
        tokenizer: FakeTokenizer | None = None,
        without_tokenizer: bool = False,
        peak_bandwidth: float | None = None,
        **executor: Any,
    ) -> None:
        self.tokenizer = None if without_tokenizer else tokenizer or FakeTokenizer()
        self.bandwidth = peak_bandwidth
        self.prompts: list[list[int]] = []  # of every request, in the order of their first tokens
        self.specs: list[SampleSpec] = []
        self.read_adapters: list[str] = []
        self.closed = False

        def next_id(spec: SampleSpec) -> int:
            if not spec.output_token_ids:
                self.prompts.append(list(spec.prompt_token_ids))
                self.specs.append(spec)
            said = ids_of(answer(text_of(spec.prompt_token_ids)))
            position = len(spec.output_token_ids)
            return said[position] if position < len(said) else EOS

        limits: dict[str, Any] = {"num_blocks": 500, "max_model_len": 512}
        self.executor = FakeExecutor(vocab_size=VOCAB_SIZE, answer=next_id, **(limits | executor))

    def peak_bandwidth(self, achieved: float = 0.0) -> float | None:
        return self.bandwidth

    def peak_flops(self) -> float | None:
        return None

    def read_adapter(self, name: str) -> SimpleNamespace:
        self.read_adapters.append(name)
        return SimpleNamespace(identity=f"identity of {name}", weights={name: None})

    def close(self) -> None:
        self.closed = True
        self.executor.close()


def prompt_text(built: FakeBuilt, index: int = -1) -> str:
    """The prompt of a request with its roles spelled out."""
    marks = {USER: "<user>", ASSISTANT: "<assistant>", SYSTEM: "<system>"}
    return "".join(marks.get(i) or text_of([i]) for i in built.prompts[index])
