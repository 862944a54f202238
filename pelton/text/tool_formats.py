"""How models write tool calls: a table of formats, and what a request may say about tools.

A format is found in the chat template, which tells the model how to call, or chosen by a name that vLLM's users know.
In some vocabularies a format's markers are special tokens, which vanish when special tokens are skipped in
detokenization: look ``marker_texts`` up in ``Tokenizer.special_token_id``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from ..errors import RequestError

MAX_TOOLS = 128
#: Characters of all tool definitions together, as JSON; a grammar of them may have twice as many.
MAX_TOOLS_CHARS = 1 << 19
MAX_DEPTH = 100
NAME = re.compile(r"[a-zA-Z0-9_.-]{1,64}")

#: json: an object with name and arguments, or an array of such, between the markers. named: a name, [ARGS], the
#: arguments. xml: a tag for the function and one for each parameter. deepseek: begin, name, separator, arguments, end.
#: fenced: the same with the arguments in a fenced block.
Kind: TypeAlias = Literal["json", "named", "xml", "deepseek", "fenced"]


@dataclass(frozen=True)
class ToolFormat:
    """One way to write tool calls.

    name: that of ``--tool-call-parser``. openings: the texts that begin a call; the first is the usual one. closing:
    what ends it, or "". arguments: the key of an object's arguments. array: calls are elements of one array.
    at_start: an object that begins the answer is a call without any marker, if it names a tool of the request.
    separator: between two calls. call_id: each call brings an id.
    """

    name: str
    kind: Kind
    openings: tuple[str, ...]
    closing: str = ""
    arguments: str = "arguments"
    array: bool = False
    at_start: bool = False
    separator: str = ""
    call_id: bool = False

    @property
    def marker_texts(self) -> tuple[str, ...]:
        """All texts that may be special tokens, and that must survive detokenization."""
        inner = {"named": (ARGS, CALL_ID), "deepseek": _DEEPSEEK_INNER, "fenced": _DEEPSEEK_INNER}.get(self.kind, ())
        return tuple(marker for marker in (*self.openings, *inner, self.closing) if marker)


ARGS, CALL_ID = "[ARGS]", "[CALL_ID]"
DEEPSEEK_BEGIN, DEEPSEEK_SEPARATOR, DEEPSEEK_END = "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>"
_DEEPSEEK_INNER = (DEEPSEEK_BEGIN, DEEPSEEK_SEPARATOR, DEEPSEEK_END)
_DEEPSEEK = (("<｜tool▁calls▁begin｜>",), "<｜tool▁calls▁end｜>")

HERMES = ToolFormat("hermes", "json", ("<tool_call>",), "</tool_call>", separator="\n")
_MISTRAL = ToolFormat("mistral", "json", ("[TOOL_CALLS]",), array=True)
_MISTRAL_NAMED = ToolFormat("mistral", "named", ("[TOOL_CALLS]",))
_MISTRAL_IDS = ToolFormat("mistral", "named", ("[TOOL_CALLS]",), call_id=True)
_LLAMA = ToolFormat("llama3_json", "json", ("<|python_tag|>",), arguments="parameters", at_start=True, separator="; ")
_GRANITE = ToolFormat("granite", "json", ("<|tool_call|>", "<tool_call>"), array=True)
_PHI4 = ToolFormat("phi4_mini_json", "json", ("<|tool_call|>",), "<|/tool_call|>", array=True)
_QWEN3_CODER = ToolFormat("qwen3_coder", "xml", ("<tool_call>", "<function="), "</tool_call>", separator="\n")
_DEEPSEEK_V3 = ToolFormat("deepseek_v3", "fenced", *_DEEPSEEK)
_DEEPSEEK_V31 = ToolFormat("deepseek_v31", "deepseek", *_DEEPSEEK)

#: By the names of --tool-call-parser.
TOOL_FORMATS: dict[str, ToolFormat] = {
    "hermes": HERMES,
    "mistral": _MISTRAL,  # the parser reads all three kinds
    "mistral_named": _MISTRAL_NAMED,
    "llama3_json": _LLAMA,
    "granite": _GRANITE,
    "phi4_mini_json": _PHI4,
    "qwen3_coder": _QWEN3_CODER,
    "qwen3_xml": _QWEN3_CODER,
    "deepseek_v3": _DEEPSEEK_V3,
    "deepseek_v31": _DEEPSEEK_V31,
}

#: What a template must contain, and what not, in this order: the special cases come first.
_DETECTED: tuple[tuple[tuple[str, ...], tuple[str, ...], ToolFormat], ...] = (
    (("[TOOL_CALLS]", "[CALL_ID]", "[ARGS]"), (), _MISTRAL_IDS),
    (("[TOOL_CALLS]", "[ARGS]"), (), _MISTRAL_NAMED),
    (("[TOOL_CALLS]",), (), _MISTRAL),
    (("<｜tool▁calls▁begin｜>", "```json"), (), _DEEPSEEK_V3),
    (("<｜tool▁calls▁begin｜>",), (), _DEEPSEEK_V31),
    (("<function=", "<parameter="), (), _QWEN3_CODER),
    (("<|/tool_call|>",), (), _PHI4),
    (("<|tool_call|>",), (), _GRANITE),
    (("<tool_call>",), ("<arg_key>",), HERMES),  # GLM writes something else between the same markers
    (("<|python_tag|>",), ("<|python_start|>",), _LLAMA),
    (('"parameters": dictionary',), ("<|python_start|>",), _LLAMA),
)


def tool_format(chat_template: str | None, name: str = "auto") -> ToolFormat | None:
    """The format in which a model calls tools; None if its template shows none that is known here.

    Args:
        chat_template: the source of the template.
        name: a key of TOOL_FORMATS, or "auto". "mistral" still looks which of its kinds the template has.

    Raises:
        RequestError: no such name.
    """
    if name not in ("auto", *TOOL_FORMATS):
        raise RequestError(f"there is no tool call parser {name!r}", f"choose auto or {', '.join(TOOL_FORMATS)}")
    text = chat_template or ""
    found = next(
        (
            row
            for needed, absent, row in _DETECTED
            if all(part in text for part in needed) and not any(part in text for part in absent)
        ),
        None,
    )
    if name == "auto" or (found is not None and found.name == name):
        return found
    return TOOL_FORMATS[name]


@dataclass(frozen=True)
class Tool:
    """One function of a request: checked. ``parameters`` is a JSON schema of an object."""

    name: str
    description: str
    parameters: dict[str, Any]
    strict: bool = False

    def as_dict(self) -> dict[str, Any]:
        """As templates want it. ``strict`` is left out: no model was trained with it."""
        function: dict[str, Any] = {"name": self.name}
        if self.description:
            function["description"] = self.description
        return {"type": "function", "function": function | {"parameters": self.parameters}}


def check_tools(tools: object) -> list[Tool]:
    """The tools of a request.

    Raises:
        RequestError: naming the field, as in ``tools[3].function.name``.
    """
    if not isinstance(tools, Sequence) or isinstance(tools, (str, bytes)):
        raise RequestError(f"tools is a {type(tools).__name__}", "give a list of functions")
    if len(tools) > MAX_TOOLS:
        raise RequestError(f"tools has {len(tools)} functions", f"give at most {MAX_TOOLS}")
    checked: dict[str, Tool] = {}
    chars = 0
    for i, given in enumerate(tools):
        where = f"tools[{i}]"
        if not isinstance(given, Mapping):
            raise RequestError(f"{where} is a {type(given).__name__}", 'give {"type": "function", "function": {...}}')
        if given.get("type", "function") != "function":
            raise RequestError(f"{where}.type is {given['type']!r:.80}", 'only "function" is supported')
        function = given.get("function")
        if not isinstance(function, Mapping):
            raise RequestError(f"{where}.function is missing", 'give {"name": ..., "parameters": {...}}')
        name = function.get("name")
        if not isinstance(name, str) or not NAME.fullmatch(name):
            why = "is missing" if name is None else f"is {name!r:.80}"
            raise RequestError(f"{where}.function.name {why}", "give 1 to 64 of a-z, A-Z, 0-9, '_', '-' and '.'")
        if name in checked:
            raise RequestError(f"{where}.function.name is {name!r} again", "give every function a name of its own")
        description = function.get("description")
        if not isinstance(description, str | None):
            raise RequestError(f"{where}.function.description is a {type(description).__name__}", "give a text")
        strict = function.get("strict")
        if not isinstance(strict, bool | None):
            raise RequestError(f"{where}.function.strict is {strict!r:.80}", "give true or false")
        parameters = _checked_schema(function.get("parameters"), f"{where}.function.parameters")
        chars += len(description or "") + len(json.dumps(parameters))
        if chars > MAX_TOOLS_CHARS:
            raise RequestError(f"{where} makes tools longer than {MAX_TOOLS_CHARS:,} characters", "describe less")
        checked[name] = Tool(name, description or "", parameters, bool(strict))
    return list(checked.values())


def _checked_schema(schema: object, where: str) -> dict[str, Any]:
    """A schema of an object. What else is in it is for the grammar's compiler to judge, where one is used."""
    if schema is None:
        return {"type": "object", "properties": {}}  # a function without parameters, as the API defines it
    if not isinstance(schema, Mapping):
        raise RequestError(f"{where} is a {type(schema).__name__}", "give a JSON schema of type object")
    if too_deep(schema):
        raise RequestError(f"{where} is nested more than {MAX_DEPTH} levels deep", "simplify it, or use $ref")
    try:
        json.dumps(schema, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise RequestError(f"{where} is no JSON ({type(error).__name__}: {error})", "correct it") from None
    if schema.get("type", "object") != "object":
        raise RequestError(f"{where}.type is {schema['type']!r:.80}", 'arguments are an object: give "object"')
    properties = schema.get("properties", {})
    if not isinstance(properties, Mapping):
        raise RequestError(f"{where}.properties is a {type(properties).__name__}", "give {name: schema}")
    for key, value in properties.items():
        if not isinstance(value, Mapping | bool):
            raise RequestError(f"{where}.properties[{key!r:.80}] is a {type(value).__name__}", "give a JSON schema")
    required = schema.get("required", [])
    if not isinstance(required, list) or not all(isinstance(key, str) for key in required):
        raise RequestError(f"{where}.required is no list of names", "give a list of texts")
    return {"type": "object", **schema}


def too_deep(value: object) -> bool:
    """Whether containers are nested more than MAX_DEPTH levels deep."""
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [
            child
            for item in level
            for child in (item.values() if isinstance(item, Mapping) else item if isinstance(item, list) else ())
        ]
        if not level:
            return False
    return True


Choice: TypeAlias = Literal["none", "auto", "required"]


def checked_choice(tool_choice: object, tools: Sequence[Tool]) -> tuple[Choice, list[Tool]]:
    """What ``tool_choice`` asks for, and the functions that may be called.

    A named function is "required" with that one. None is "auto" if there are tools, else "none".

    Raises:
        RequestError: naming the field.
    """
    if tool_choice is None:
        return ("auto" if tools else "none"), list(tools)
    remedy = 'give "none", "auto", "required" or {"type": "function", "function": {"name": ...}}'
    if isinstance(tool_choice, str):
        if tool_choice == "none":
            return "none", []
        if tool_choice not in ("auto", "required"):
            raise RequestError(f"tool_choice is {tool_choice!r:.80}", remedy)
        if not tools:
            raise RequestError(f"tool_choice is {tool_choice!r}, but there are no tools", "give tools, or leave it out")
        return ("auto" if tool_choice == "auto" else "required"), list(tools)
    function = tool_choice.get("function") if isinstance(tool_choice, Mapping) else None
    if not isinstance(function, Mapping) or tool_choice.get("type") != "function":  # type: ignore[attr-defined]
        raise RequestError(f"tool_choice is {tool_choice!r:.80}", remedy)
    name = function.get("name")
    chosen = [tool for tool in tools if tool.name == name]
    if not chosen:
        named = ", ".join(tool.name for tool in tools) or "none"
        raise RequestError(f"tool_choice.function.name is {name!r:.80}", f"name one of the tools: {named:.300}")
    return "required", chosen


#: The id of a text that is a token of some kind; None for others.
TokenId: TypeAlias = Callable[[str], int | None]
