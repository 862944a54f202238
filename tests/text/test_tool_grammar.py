"""Answers that a grammar makes tool calls: read by the parser of the same format, with arguments of the schema."""

from __future__ import annotations

import contextlib
import json
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from tokenizers import AddedToken
from tokenizers import Tokenizer as Inner

from pelton.config import StructuredOutputsParams
from pelton.engine.structured import Grammar, GrammarCompiler
from pelton.errors import RequestError
from pelton.text import Tokenizer
from pelton.text.reasoning import REASONING_FORMATS, ReasoningSplitter
from pelton.text.tool_calls import Call, ToolCallParser, collect
from pelton.text.tool_formats import TOOL_FORMATS, Tool, ToolFormat, check_tools
from pelton.text.tool_grammar import thinking_then_json, tool_choice_grammar
from tests.helpers.reasoning import join_pieces

from .tool_answers import TOOLS, function

NAMED_IDS = replace(TOOL_FORMATS["mistral_named"], call_id=True)
FORMS = {**TOOL_FORMATS, "mistral_ids": NAMED_IDS}
MARKERS = {marker for form in (*FORMS.values(), *REASONING_FORMATS) for marker in form.marker_texts} - {"<function="}


@dataclass
class Vocabulary:
    tokenizer: Tokenizer
    compiler: GrammarCompiler

    def compile(self, grammar: str | None) -> Grammar:
        assert grammar is not None
        return self.compiler.compile(StructuredOutputsParams(grammar=grammar))

    def accepts(self, grammar: Grammar, text: str) -> bool:
        """Whether the text is a whole answer."""
        ids = self.tokenizer.encode(text, add_special_tokens=False)
        grammar = grammar.copy()
        if grammar.allowed(ids) < len(ids):
            return False
        for token_id in ids:
            grammar.accept(token_id)
        return bool(self.allowed(grammar) & self.tokenizer.stop_token_ids)

    def begins(self, grammar: Grammar, text: str) -> bool:
        ids = self.tokenizer.encode(text, add_special_tokens=False)
        return grammar.copy().allowed(ids) == len(ids)

    def allowed(self, grammar: Grammar) -> set[int]:
        mask = grammar.mask()
        assert mask is not None, grammar.error
        return set(np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little")).tolist())

    def answer(self, grammar: Grammar, rng: random.Random, longest: int = 600) -> str | None:
        """A random answer; None if it does not end in time."""
        grammar, ids, stops = grammar.copy(), [], self.tokenizer.stop_token_ids
        for _ in range(longest):
            allowed = self.allowed(grammar)
            if not allowed - stops or (allowed & stops and rng.random() < 0.3):
                return self.tokenizer.decode(ids, skip_special_tokens=False)
            ids.append(rng.choice(sorted(allowed - stops)))
            grammar.accept(ids[-1])
        return None


def vocabulary(inner: Inner) -> Iterator[Vocabulary]:
    tokenizer = Tokenizer(inner, bos_token_id=1, eos_token_id=2)
    compiler = GrammarCompiler(tokenizer.to_json, tokenizer.vocab_size, tokenizer.stop_token_ids)
    yield Vocabulary(tokenizer, compiler)
    compiler.close()


@pytest.fixture(scope="module", params=["text", "tokens", "special tokens"])
def words(smollm: Tokenizer, request: pytest.FixtureRequest) -> Iterator[Vocabulary]:
    """SmolLM2's vocabulary, where every marker is text, or with markers as tokens of their own."""
    inner = Inner.from_str(smollm.to_json())
    if request.param != "text":
        inner.add_tokens([AddedToken(m, special=request.param != "tokens", normalized=False) for m in sorted(MARKERS)])
    yield from vocabulary(inner)


@pytest.fixture(scope="module")
def plain(smollm: Tokenizer) -> Iterator[Vocabulary]:
    yield from vocabulary(smollm.inner)


def follows_its_schema(call: Call) -> bool:
    arguments = json.loads(call.arguments)
    keys = set(arguments)
    if call.name == "get":
        return (
            {"city", "unit", "flags"} <= keys <= {"city", "days", "unit", "flags"}
            and isinstance(arguments["city"], str) and len(arguments["city"]) <= 12
            and arguments["unit"] in ("C", "F") and arguments.get("days", 1) in range(1, 10)
            and len(arguments["flags"]) <= 2 and all(isinstance(flag, bool) for flag in arguments["flags"])
        )  # fmt: skip
    if call.name == "get_more":
        return keys == {"q"} and (arguments["q"] is None or isinstance(arguments["q"], str))
    return call.name == "now" and not keys


def read(form: ToolFormat, tools: Sequence[Tool], text: str) -> tuple[str, list[Call]]:
    return collect(ToolCallParser(form, tools).push(text, final=True))


@pytest.mark.parametrize("name", FORMS)
def test_every_required_answer_is_calls_that_follow_their_schema(words, name) -> None:
    form = FORMS[name]
    rng, finished, counts = random.Random(5), 0, set()
    for parallel in (True, False):
        grammar = words.compile(
            tool_choice_grammar(form, TOOLS, "required", parallel=parallel, token_id=words.tokenizer.added_token_id)
        )
        for _ in range(8):
            text = words.answer(grammar, rng)
            if text is None:
                continue
            finished += 1
            said, calls = read(form, TOOLS, text)
            assert said == "" and calls, text
            assert all(follows_its_schema(call) for call in calls), text
            assert parallel or len(calls) == 1, text
            counts.add(len(calls))
    assert finished >= 8 and counts > {1}


CITY = {"city": "Bonn", "unit": "C", "flags": [True]}
CALL = '<tool_call>\n{"name": "get", "arguments": ' + json.dumps(CITY) + "}\n</tool_call>"
NOW = '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
HERMES = TOOL_FORMATS["hermes"]


def test_a_named_function_is_the_only_one(plain) -> None:
    choice = {"type": "function", "function": {"name": "get"}}
    grammar = plain.compile(tool_choice_grammar(HERMES, TOOLS, choice))
    assert plain.accepts(grammar, CALL) and plain.accepts(grammar, f"{CALL}\n{CALL}")
    assert not plain.begins(grammar, NOW) and not plain.begins(grammar, "Well") and not plain.accepts(grammar, "")
    assert not plain.begins(grammar, CALL.replace("Bonn", "Bonn am schönen Rhein"))
    grammar = plain.compile(tool_choice_grammar(HERMES, TOOLS, "required", parallel=False))
    assert plain.accepts(grammar, NOW) and not plain.begins(grammar, f"{NOW}\n{NOW}")


def strict_tools() -> list[Tool]:
    return [replace(TOOLS[0], strict=True), *TOOLS[1:]]


@pytest.mark.parametrize("name", FORMS)
def test_strict_functions_leave_the_text_free_and_bind_the_calls(words, name) -> None:
    from pelton.text.tool_messages import write_calls

    form, tools = FORMS[name], strict_tools()
    marker = words.tokenizer.added_token_id
    for parallel in (True, False):
        grammar = words.compile(tool_choice_grammar(form, tools, "auto", parallel=parallel, token_id=marker))
        good = {"name": "get", "arguments": {**CITY}}
        loose = {"name": "get_more", "arguments": {"q": "more than four", "x": "1"}}
        for text in ("", "Hello.", "1 < 2", "<tool", "[TOOL", "Grüße\n\n"):
            assert words.accepts(grammar, text), (text, parallel)
        before = "" if form.at_start else "Let me see.\n"
        assert words.accepts(grammar, before + write_calls(form, [good]))
        assert words.accepts(grammar, before + write_calls(form, [loose])), "not strict: any object"
        assert words.accepts(grammar, write_calls(form, [good, loose])) == parallel
        for wrong in ({"unit": "K"}, {"days": 10}, {"flags": [1]}, {"city": "x" * 13}):
            text = before + write_calls(form, [{"name": "get", "arguments": {**CITY, **wrong}}])
            assert not words.begins(grammar, text), (text, parallel)
        assert not words.begins(grammar, before + write_calls(form, [{"name": "unknown", "arguments": {}}]))


def test_nothing_is_restricted_without_need() -> None:
    assert tool_choice_grammar(HERMES, TOOLS) is None
    assert tool_choice_grammar(HERMES, TOOLS, "auto") is None
    assert tool_choice_grammar(HERMES, strict_tools(), "none") is None
    assert tool_choice_grammar(HERMES, []) is None


@pytest.mark.parametrize("form", REASONING_FORMATS[:2], ids=lambda form: form.name)
def test_thinking_comes_first_and_is_free(words, form) -> None:
    inside = replace(form, inside=True)
    marker: Callable[[str], int | None] = words.tokenizer.added_token_id
    thought = f"Maybe <tool_ is it?\n{form.closing}\n\n"
    for reasoning, text in ((form, form.opening + "\n" + thought), (inside, thought)):
        grammar = words.compile(tool_choice_grammar(HERMES, TOOLS, "required", token_id=marker, reasoning=reasoning))
        assert words.accepts(grammar, text + CALL)
        assert not words.begins(grammar, text + "Well")
        assert words.accepts(grammar, CALL) == (not reasoning.inside)
        said = join_pieces(ReasoningSplitter(reasoning).push(text + CALL, final=True))
        assert said == ("Maybe <tool_ is it?", CALL)
    grammar = words.compile(tool_choice_grammar(HERMES, strict_tools(), "auto", token_id=marker, reasoning=inside))
    assert words.accepts(grammar, thought + "Fine. " + CALL) and words.accepts(grammar, thought + "Fine.")
    assert not words.begins(grammar, thought + CALL.replace('"C"', '"K"'))
    grammar = words.compile(tool_choice_grammar(HERMES, strict_tools(), "auto", token_id=marker, reasoning=form))
    for text in ("Fine.", CALL, form.opening + thought + "Fine.", form.opening + thought + CALL):
        assert words.accepts(grammar, text), text


@pytest.mark.parametrize("form", REASONING_FORMATS, ids=lambda form: form.name)
def test_an_answer_in_json_may_be_thought_about(words, form) -> None:
    marker, inside = words.tokenizer.added_token_id, replace(form, inside=True)
    thought = f"Hm.\n{form.closing}\n"
    for reasoning, text in ((form, form.opening + thought), (inside, thought)):
        grammar = words.compile(thinking_then_json({"type": "boolean"}, reasoning, marker))
        assert words.accepts(grammar, text + "true") and not words.begins(grammar, text + "maybe")
        assert words.accepts(grammar, "true") == (not reasoning.inside)
    with pytest.raises(RequestError, match=r"the JSON schema cannot be followed \(.*objekt"):
        thinking_then_json({"type": "objekt"}, form, marker)


def tool(schema: dict[str, Any], **options: Any) -> list[Tool]:
    return check_tools([function("now"), function("f", schema, **options)])


PROPERTY = "tools[1].function.parameters"


@pytest.mark.parametrize("name", ["hermes", "qwen3_coder"])
def test_a_schema_that_cannot_be_followed_is_named(name) -> None:
    form = TOOL_FORMATS[name]
    with pytest.raises(RequestError) as caught:
        tool_choice_grammar(form, tool({"properties": {"x": {"type": "objekt"}}}, strict=True))
    assert str(caught.value).startswith("tools[1].function.parameters") and "objekt" in str(caught.value)
    for schema in ({"x": {"$ref": "#/$defs/none"}}, {"x": {"type": "integer", "minimum": "a"}}):
        with pytest.raises(RequestError, match=r"^tools\[1\].function.parameters.* cannot be followed"):
            tool_choice_grammar(form, tool({"properties": schema}, strict=True))


def test_keywords_that_are_unknown_bind_only_strict_functions(plain) -> None:
    schema = {"properties": {"x": {"type": "string", "format": "unheard-of"}}, "required": ["x"]}
    grammar = plain.compile(tool_choice_grammar(HERMES, tool(schema), "required"))
    assert plain.accepts(grammar, '<tool_call>\n{"name": "f", "arguments": {"x": "y"}}\n</tool_call>')
    with pytest.raises(RequestError, match="unheard-of"):
        tool_choice_grammar(HERMES, tool(schema, strict=True), "required")
    coder = TOOL_FORMATS["qwen3_coder"]
    pattern = {"properties": {"x": {"type": "string", "pattern": "^a+$"}}}
    assert tool_choice_grammar(coder, tool(pattern), "required")
    with pytest.raises(RequestError, match=r"properties\['x'\]\.pattern cannot be followed"):
        tool_choice_grammar(coder, tool(pattern, strict=True), "required")
    with pytest.raises(RequestError, match="a name that this model's format cannot hold"):
        tool_choice_grammar(coder, tool({"properties": {"a>b": {}}}), "required")


def test_values_in_tags_follow_the_schema(plain) -> None:
    schema = {
        "properties": {
            "s": {"type": "string", "minLength": 2, "maxLength": 3}, "i": {"$ref": "#/definitions/i"},
            "e": {"enum": ["a", 1]}, "maybe": {"type": ["string", "null"]}, "never": False,
        },
        "required": ["s", "extra"],
        "definitions": {"i": {"type": "integer", "maximum": 5}},
    }  # fmt: skip
    tools = tool(schema)
    grammar = plain.compile(tool_choice_grammar(TOOL_FORMATS["qwen3_coder"], tools, "required"))

    def text(**parameters: str) -> str:
        inner = "".join(f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in parameters.items())
        return f"<tool_call>\n<function=f>\n{inner}</function>\n</tool_call>"

    good = text(s="abc", i="5", e="1", maybe="null", extra="any\nthing")
    assert plain.accepts(grammar, good)
    _, [call] = read(TOOL_FORMATS["qwen3_coder"], tools, good)
    assert json.loads(call.arguments) == {"s": "abc", "i": 5, "e": 1, "maybe": None, "extra": "any\nthing"}
    assert plain.accepts(grammar, text(s="ab", extra=""))
    for wrong in ({"s": "abcd"}, {"s": "a", "extra": ""}, {"s": "ab", "i": "6"}, {"s": "ab", "e": "b"}, {"i": "1"}):
        assert not plain.begins(grammar, text(**wrong)), wrong
    optional = {"properties": {"q": {"anyOf": [{"type": "string", "maxLength": 2}, {"type": "null"}]}}}
    grammar = plain.compile(tool_choice_grammar(TOOL_FORMATS["qwen3_coder"], tool(optional, strict=True), "required"))
    assert plain.accepts(grammar, text(q="ab")) and plain.accepts(grammar, text(q="null"))
    assert not plain.begins(grammar, text(q="abc"))
    anything = plain.compile(tool_choice_grammar(TOOL_FORMATS["qwen3_coder"], tool({"type": "object"}), "required"))
    assert plain.accepts(anything, text(a="1", b="x<y")) and plain.accepts(anything, text())


def test_hundred_functions_compile_in_time(plain) -> None:
    import time

    tools = check_tools(
        [function(f"f{i}", {"properties": {f"p{j}": {"type": "string"} for j in range(10)}}) for i in range(128)]
    )
    start = time.perf_counter()
    grammar = plain.compile(tool_choice_grammar(HERMES, tools, "required"))
    assert time.perf_counter() - start < 5
    assert plain.accepts(grammar, '<tool_call>\n{"name": "f127", "arguments": {"p3": "x"}}\n</tool_call>')


def test_hostile_schemas_take_bounded_time() -> None:
    import time

    wide = {f"x{i}": {"anyOf": [{"$ref": f"#/$defs/x{i + 1}"}] * 20} for i in range(20)}
    around = {"$defs": {"a": {"anyOf": [{"$ref": "#/$defs/a"}] * 20}}, "properties": {"p": {"$ref": "#/$defs/a"}}}
    schemas = [
        {"$defs": {**wide, "x20": {"type": "string"}}, "properties": {"p": {"$ref": "#/$defs/x0"}}},
        around,
        {"$defs": {"long": {"const": "y" * 20_000}},
         "properties": {f"p{i}": {"type": "array", "items": {"$ref": "#/$defs/long"}} for i in range(200)}},
    ]  # fmt: skip
    for schema in schemas:
        for name in ("hermes", "qwen3_coder"):
            start = time.perf_counter()
            with contextlib.suppress(RequestError):
                tool_choice_grammar(TOOL_FORMATS[name], tool(schema), "required")
            text = "<function=f>\n<parameter=p>\n1\n</parameter>\n</function>"
            read(TOOL_FORMATS[name], tool(schema), text)
            assert time.perf_counter() - start < 10
    with pytest.raises(RequestError, match="more than 1,000,000 characters; give fewer functions"):
        tool_choice_grammar(TOOL_FORMATS["qwen3_coder"], tool(schemas[2]), "required")
