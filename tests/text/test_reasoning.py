"""What a model thinks aloud, apart from what it says."""

from __future__ import annotations

import time
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pelton.text import Tokenizer
from pelton.text.chat import ChatTemplate
from pelton.text.reasoning import REASONING_FORMATS, ReasoningFormat, ReasoningSplitter, reasoning_format
from tests.helpers.reasoning import join_pieces

THINK = REASONING_FORMATS[0]
INSIDE = ReasoningFormat("think", "<think>", "</think>", inside=True)

# As Qwen3 does: the prompt closes the thinking if it is turned off.
QWEN3 = """
{%- for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}
{%- if enable_thinking is defined and enable_thinking is false %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}
{%- endif %}
"""
# As DeepSeek-R1 and its distills do: the prompt opens it.
DEEPSEEK_R1 = """
{%- for m in messages %}{{ '<｜User｜>' + m.content.split('</think>')[-1] }}{% endfor %}
{%- if add_generation_prompt %}{{ '<｜Assistant｜><think>\\n' }}{% endif %}"""
MAGISTRAL = "[SYSTEM_PROMPT]First [THINK]your thoughts[/THINK][/SYSTEM_PROMPT][INST]{{ messages[-1].content }}[/INST]"
GEMMA4 = """{{ '<|turn>user\\n' + messages[-1].content + '<turn|>\\n<|turn>model\\n' }}
{%- if not enable_thinking | default(false) %}{{ '<|channel>thought\\n<channel|>' }}{% endif %}"""
USER = [{"role": "user", "content": "Why <think>?</think>"}]


def split(form: ReasoningFormat, *pieces: str) -> tuple[str | None, str]:
    splitter = ReasoningSplitter(form)
    return join_pieces([p for text in pieces for p in splitter.push(text)] + splitter.push("", final=True))


@pytest.mark.parametrize(
    ("template", "variables", "expected"),
    [
        (QWEN3, {}, ("think", False)),
        (QWEN3, {"enable_thinking": False}, None),
        (DEEPSEEK_R1, {}, ("think", True)),
        (MAGISTRAL, {}, ("mistral", False)),
        (GEMMA4, {}, None),
        (GEMMA4, {"enable_thinking": True}, ("gemma4", False)),
        ("{{ messages[-1].content }}", {}, None),
    ],
)
def test_formats_are_read_off_the_template_and_the_prompt(template, variables, expected) -> None:
    prompt = ChatTemplate(template).render(USER, **variables)
    found = reasoning_format(template, prompt)
    assert (found and (found.name, found.inside)) == expected


def test_the_demo_model_does_not_think(smollm: Tokenizer) -> None:
    assert reasoning_format(smollm.chat_template, smollm.apply_chat_template(USER)) is None
    assert reasoning_format(None, "<think>") is None


@pytest.mark.parametrize(
    ("form", "text", "expected"),
    [
        (THINK, "<think>\nWell.\n\nYes\n</think>\n\nNo\n", ("Well.\n\nYes", "No\n")),
        (THINK, " \n<think>a</think>b", ("a", "b")),
        (THINK, "<think>\n\n</think>\n\nb", (None, "b")),
        (THINK, "b", (None, "b")),
        (THINK, " \n b", (None, " \n b")),
        (THINK, "  ", (None, "  ")),
        (THINK, "", (None, "")),
        (THINK, "Say <think>x</think>", (None, "Say <think>x</think>")),
        (THINK, "<thin", (None, "<thin")),
        (THINK, "<think>a</think>b<think>c</think>", ("a", "b<think>c</think>")),
        (THINK, "<think>a</thin b\n", ("a</thin b", "")),
        (THINK, "<think>a</thin", ("a</thin", "")),
        (INSIDE, "\na\n</think>\nb", ("a", "b")),
        (INSIDE, "a", ("a", "")),
        (INSIDE, "</think>b", (None, "b")),
        (INSIDE, "a <think> b</think>", ("a <think> b", "")),
        (REASONING_FORMATS[1], "[THINK]a[/THINK]b", ("a", "b")),
        (REASONING_FORMATS[3], "<|channel>thought\na\n<channel|>b", ("a", "b")),
        (REASONING_FORMATS[3], "<|channel>x", (None, "<|channel>x")),
    ],
)
def test_thinking_is_set_apart(form, text, expected) -> None:
    assert split(form, text) == expected
    assert split(form, *text) == expected
    splitter = ReasoningSplitter(form)
    assert join_pieces(splitter.push(text, final=True)) == expected


PARTS = st.lists(st.sampled_from(["<think>", "</think>", "<", "/", "th", "ink>", "\n", " ", "a", "é"]), max_size=12)


@settings(max_examples=300, deadline=None)
@given(PARTS, st.booleans(), st.lists(st.integers(0, 40), max_size=5))
def test_how_the_text_is_cut_makes_no_difference(parts, inside, cuts) -> None:
    text = "".join(parts)
    form = INSIDE if inside else THINK
    places = [0, *sorted(cut for cut in cuts if cut < len(text)), len(text)]
    pieces = [text[a:b] for a, b in pairwise(places)]
    whole = ReasoningSplitter(form).push(text, final=True)
    assert split(form, *pieces) == join_pieces(whole)
    # Nothing but markers and newlines around them is lost.
    thought, said = join_pieces(whole)
    assert text.endswith(said)
    assert all(piece for _, piece in whole)
    if thought is not None:
        assert thought in text and thought == thought.strip("\n")


def test_text_is_given_out_as_soon_as_it_is_certain() -> None:
    splitter = ReasoningSplitter(THINK)
    assert splitter.push("<think>\nab") == [("reasoning", "ab")]
    assert splitter.push("c\n<") == [("reasoning", "c")]
    assert splitter.push("b") == [("reasoning", "\n<b")]
    assert splitter.push("</thi") == []
    assert splitter.push("nk>\n") == []
    assert splitter.push("x\n") == [("content", "x\n")]


@pytest.mark.parametrize("body", ["ab\n", "\n", "</thin", " "])
def test_long_thinking_takes_linear_time(body: str) -> None:
    def seconds(n: int) -> float:
        splitter = ReasoningSplitter(INSIDE)
        start = time.process_time()
        for _ in range(n):
            splitter.push(body)
        splitter.push("", final=True)
        return time.process_time() - start

    assert min(seconds(40_000) for _ in range(3)) < 20 * min(seconds(5_000) for _ in range(3))


def test_markers_that_are_special_tokens_are_named(smollm: Tokenizer) -> None:
    assert THINK.marker_texts == ("<think>", "</think>")
    assert REASONING_FORMATS[3].marker_texts == ("<|channel>", "<channel|>")
    assert smollm.special_token_id("<|im_start|>") == 1
    assert smollm.special_token_id("<think>") is None and smollm.special_token_id("the") is None
