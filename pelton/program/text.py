"""The program as text and back: ``call %3[0:576] = linear(%1[0:576], const 2) {} # model.layers.0.mlp.down_proj``."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable
from typing import Any

from ..graph import AdapterType, CacheType, DType, Node, TensorType, make
from ..graph.text import parse_type
from .program import (
    AdapterRef,
    AdapterTable,
    Buffer,
    CacheRef,
    Call,
    Constant,
    ConstantRef,
    InputRef,
    Operand,
    Program,
    View,
)

_CALL = re.compile(r"(?P<out>.*?) ?= (?P<kernel>\w+)\((?P<args>.*?)\) (?P<params>\{.*?\})(?: # (?P<name>\S+))?")
_KINDS: dict[Any, str] = {ConstantRef: "const", CacheRef: "cache", AdapterRef: "adapter", InputRef: "input"}


def print_program(program: Program) -> str:
    """All of a program but its costs, which follow from the graph."""
    lines = [f"program {program.name} (arena {program.arena_bytes} bytes)"]
    lines += [f"limit {dim} = {rows}" for dim, rows in program.limits.items()]
    lines += [f"input {i} = {name}" for i, name in enumerate(program.inputs)]
    lines += [f"cache {i} = {cache}" for i, cache in enumerate(program.caches)]
    for i, table in enumerate(program.adapters):
        lines.append(f"adapter {i} = {table.type} {(table.modules, table.row_orders)!r}")
    for i, constant in enumerate(program.constants):
        lines.append(f"const {i} = {constant_text(constant)}")
    lines += [f"buffer {i} = {b.dtype}[{b.rows}, {b.cols}] @ {b.offset}" for i, b in enumerate(program.buffers)]
    for call in program.calls:
        outputs = ", ".join(_operand(v) for v in call.outputs)
        operands = ", ".join(_operand(o) for o in call.operands)
        lines.append(f"call {outputs} = {call.kernel}({operands}) {dict(call.params)!r} # {call.name}".rstrip(" #"))
    returned = dict.fromkeys((program.output, program.hidden))
    lines.append(f"return {', '.join(map(_operand, returned))}")
    return "\n".join(lines) + "\n"


def constant_text(constant: Constant) -> str:
    """What a constant holds and how it is packed."""
    source = _expression(constant.expr) if constant.expr is not None else repr(dict(constant.attrs))
    return f"{constant.packing} {source}"


def _operand(operand: Operand | None) -> str:
    if isinstance(operand, View):
        return f"%{operand.buffer}[{operand.start}:{operand.start + operand.cols}]"
    return "none" if operand is None else f"{_KINDS[type(operand)]} {operand.index}"


def _expression(node: Node) -> str:
    if node.op == "weight":
        transposed = ", transposed=True" if node.attrs.get("transposed") else ""
        return f"weight({node.name!r}, {str(node.type)!r}{transposed})"
    args = [_expression(i) for i in node.inputs] + [f"{k}={v!r}" for k, v in sorted(node.attrs.items())]
    return f"{node.op}({', '.join(args)})"


def parse_program(text: str) -> Program:
    """The program that ``text`` describes.

    Raises:
        ValueError: a line is not understood.
    """
    kinds = ("limit", "input", "cache", "adapter", "const", "buffer", "call", "return")
    parts: dict[str, list[Any]] = {k: [] for k in kinds}
    name, arena = "", 0
    for number, line in enumerate(text.splitlines(), 1):
        kind, _, rest = line.strip().partition(" ")
        try:
            if kind == "program":
                match = re.fullmatch(r"(\S+) \(arena (\d+) bytes\)", rest)
                assert match is not None
                name, arena = match[1], int(match[2])
            elif kind:
                parts[kind].append(_PARSERS[kind](rest.partition(" = ")[2], rest))
        except (KeyError, ValueError, AssertionError, SyntaxError, TypeError, IndexError) as error:
            raise ValueError(f"line {number}: {error!r}: {line}") from None
    outputs = parts["return"][0]
    return Program(
        name, dict(parts["limit"]), tuple(parts["input"]), tuple(parts["cache"]), tuple(parts["const"]),
        tuple(parts["buffer"]), tuple(parts["call"]), outputs[0], outputs[-1], arena_bytes=arena,
        adapters=tuple(parts["adapter"]),
    )  # fmt: skip


def _parse_operand(text: str) -> Operand | None:
    if text == "none":
        return None
    if match := re.fullmatch(r"%(\d+)\[(\d+):(\d+)\]", text):
        return View(int(match[1]), int(match[2]), int(match[3]) - int(match[2]))
    kind, index = text.split()
    refs: dict[str, Callable[[int], Operand]] = {kind: ref for ref, kind in _KINDS.items()}
    return refs[kind](int(index))


def _parse_list(text: str) -> tuple[Any, ...]:
    return tuple(_parse_operand(t) for t in text.split(", ") if t)


def _parse_call(_: str, line: str) -> Call:
    match = _CALL.fullmatch(line)
    assert match is not None
    params = ast.literal_eval(match["params"])
    return Call(match["kernel"], _parse_list(match["out"]), _parse_list(match["args"]), params, match["name"] or "")


def _parse_constant(value: str, _: str) -> Constant:
    packing, _, source = value.partition(" ")
    if source.startswith("{"):
        return Constant(packing, None, tuple(ast.literal_eval(source).items()))
    return Constant(packing, _parse_expression(ast.parse(source, mode="eval").body))


def _parse_expression(tree: ast.expr) -> Node:
    assert isinstance(tree, ast.Call) and isinstance(tree.func, ast.Name)
    attrs = {str(k.arg): ast.literal_eval(k.value) for k in tree.keywords}
    if tree.func.id == "weight":
        name, type_text = (ast.literal_eval(a) for a in tree.args)
        return make("weight", type=parse_type(type_text), name=name, **attrs)
    return make(tree.func.id, *map(_parse_expression, tree.args), **attrs)


def _parse_buffer(value: str, _: str) -> Buffer:
    type_text, _, offset = value.partition(" @ ")
    type = parse_type(type_text)
    assert isinstance(type, TensorType) and isinstance(type.dtype, DType)
    return Buffer(str(type.shape[0]), int(type.shape[1]), int(offset), type.dtype)


def _parse_cache(value: str, _: str) -> CacheType:
    type = parse_type(value)
    assert isinstance(type, CacheType)
    return type


def _parse_adapter(value: str, _: str) -> AdapterTable:
    type_text, _, names = value.partition(" (")
    type = parse_type(type_text)
    assert isinstance(type, AdapterType)
    return AdapterTable(type, *ast.literal_eval("(" + names))


_PARSERS: dict[str, Callable[[str, str], Any]] = {
    "limit": lambda value, line: (line.partition(" = ")[0], int(value)),
    "input": lambda value, line: value,
    "cache": _parse_cache,
    "adapter": _parse_adapter,
    "const": _parse_constant,
    "buffer": _parse_buffer,
    "call": _parse_call,
    "return": lambda value, line: _parse_list(line),
}
