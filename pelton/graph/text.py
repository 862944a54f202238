"""The graph as text and back. ``parse(print_graph(g))`` yields the very same nodes."""

from __future__ import annotations

import ast
import re
from typing import Any

from .node import Graph, Node, make
from .types import DTYPES, SCALE_DTYPES, AdapterType, CacheType, Dim, ElementType, GroupQuant, TensorType, ValueType

_NODE = re.compile(r"%(?P<id>\w+) = (?P<op>\w+)\((?P<args>.*)\) : (?P<type>.+)")
_QUANT = re.compile(r"(int|fp)(\d)g(\d+)([mz]?):(\w+)(?:/(\d+))?")


def print_graph(graph: Graph) -> str:
    """One line per node, operands first: ``%7 = linear(%5, %6) : f32[T, 960]``."""
    ids = {node: f"%{i}" for i, node in enumerate(graph.nodes)}
    lines = [f"graph {graph.name} {{"]
    for node in graph.nodes:
        attrs = ", ".join(f"{k}={v!r}" for k, v in sorted(node.attrs.items()))
        args = "; ".join(part for part in (", ".join(ids[i] for i in node.inputs), attrs) if part)
        lines.append(f"  {ids[node]} = {node.op}({args}) : {node.type}")
    lines.append(f"  return {', '.join(ids[o] for o in graph.outputs)}")
    return "\n".join([*lines, "}"]) + "\n"


def parse_graph(text: str) -> Graph:
    """The graph that ``text`` describes, verified.

    Raises:
        ValueError: names the line that is no node, or whose type does not follow from its op.
    """
    nodes: dict[str, Node] = {}
    outputs: tuple[Node, ...] = ()
    name = ""
    for number, line in enumerate(text.splitlines(), 1):
        line = line.split("#")[0].strip()
        try:
            if not line or line == "}":
                continue
            if line.startswith("graph "):
                name = line.split()[1]
            elif line.startswith("return "):
                outputs = tuple(nodes[r.strip()[1:]] for r in line.removeprefix("return ").split(","))
            elif match := _NODE.fullmatch(line):
                nodes[match["id"]] = _parse_node(match["op"], match["args"], match["type"], nodes)
            else:
                raise ValueError("not a node")
        except (KeyError, ValueError, SyntaxError) as error:
            raise ValueError(f"line {number}: {error}: {line}") from None
    return Graph(name, outputs).verify()


def _parse_node(op: str, args: str, type_text: str, nodes: dict[str, Node]) -> Node:
    names = re.sub(r"%(\w+)", r"_\1", args).replace(";", ",")
    call = ast.parse(f"f({names})", mode="eval").body
    assert isinstance(call, ast.Call)
    inputs = tuple(nodes[a.id[1:]] for a in call.args if isinstance(a, ast.Name))
    attrs: dict[str, Any] = {str(k.arg): ast.literal_eval(k.value) for k in call.keywords}
    if op in ("input", "weight"):
        return make(op, type=parse_type(type_text), **attrs)
    node = make(op, *inputs, **attrs)
    if str(node.type) != type_text:
        raise ValueError(f"the type of {op} is {node.type}")
    return node


def parse_type(text: str) -> ValueType:
    """A tensor, cache or adapter type from its text, e.g. ``int4g32m:f16[49152, 576]``."""
    kind, _, dims = text.rstrip("]").partition("[")
    if kind.startswith("lora<"):
        slots, rank, cols, widths = dims.split(", ")
        parts = tuple(map(int, widths.split("+")))
        return AdapterType(int(slots), int(rank), int(cols), parts, DTYPES[kind[5:-1]])
    shape: tuple[Dim, ...] = tuple(int(d) if d.isdigit() else d for d in dims.split(", ") if d)
    if kind.startswith("cache<"):
        return CacheType(int(shape[0]), int(shape[1]), DTYPES[kind[6:-1]])
    return TensorType(shape, parse_dtype(kind))


def parse_dtype(text: str) -> ElementType:
    match = _QUANT.fullmatch(text)
    if match is None:
        return DTYPES[text]
    kind, bits, group, zero, scale, outer = match.groups()
    outer_size = int(outer) if outer else None
    return GroupQuant(int(bits), int(group), zero == "m", SCALE_DTYPES[scale], zero == "z", kind == "fp", outer_size)
