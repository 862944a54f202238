"""Graph -> program: one call per node; slices and items become views, weight expressions constants."""

from __future__ import annotations

from collections.abc import Mapping

from ..graph import CacheType, Graph, Node, TensorType
from ..graph.rope import RopeSpec
from .memory import plan_memory
from .program import Buffer, CacheRef, Call, Constant, ConstantRef, InputRef, Operand, Program, View

#: How each constant operand is packed: op -> packing per operand index; all others are vectors.
_PACKINGS = {"embedding": {1: "rows"}, "linear": {1: "panels"}, "gated_linear": {1: "panels"}}
_ROPE = ("rope", "rope_kv_write")


def lower(graph: Graph, limits: Mapping[str, int], max_positions: int) -> Program:
    """Flatten ``graph`` for steps of at most ``limits`` rows per dimension.

    max_positions: rows of the rope tables, the longest context that will be run.

    Raises:
        ValueError: a matrix that is only known at run time feeds an op that needs a constant.
    """
    lowering = _Lowering(max_positions)
    for node in graph.nodes:
        lowering.node(node)
    output = lowering.values[graph.outputs[0]]
    assert isinstance(output, View)
    program = Program(
        graph.name,
        dict(limits),
        tuple(lowering.inputs),
        tuple(lowering.caches),
        tuple(lowering.constants),
        tuple(lowering.buffers),
        tuple(lowering.calls),
        output,
        graph.flops,
        graph.bytes,
    )
    return plan_memory(program)


class _Lowering:
    def __init__(self, max_positions: int) -> None:
        self.max_positions = max_positions
        self.values: dict[Node, Operand | tuple[Operand, ...]] = {}
        self.inputs: list[str] = []
        self.caches: list[CacheType] = []
        self.constants: dict[Constant, int] = {}
        self.buffers: list[Buffer] = []
        self.calls: list[Call] = []

    def node(self, node: Node) -> None:
        if node.op == "input":
            self.values[node] = self._input(node)
        elif node.is_constant:
            pass  # packed where it is used, in the form its user needs
        elif node.op == "slice":
            whole = self.values[node.inputs[0]]
            assert isinstance(whole, View)
            width = node.attrs["stop"] - node.attrs["start"]
            self.values[node] = View(whole.buffer, whole.start + node.attrs["start"], width)
        elif node.op == "item":
            parts = self.values[node.inputs[0]]
            assert isinstance(parts, tuple)
            self.values[node] = parts[node.attrs["index"]]
        else:
            self._call(node)

    def _input(self, node: Node) -> Operand:
        if isinstance(node.type, CacheType):
            self.caches.append(node.type)
            return CacheRef(len(self.caches) - 1)
        self.inputs.append(node.name)
        return InputRef(len(self.inputs) - 1)

    def _call(self, node: Node) -> None:
        operands = [self._operand(node, i, x) for i, x in enumerate(node.inputs)]
        if node.op in _ROPE:
            spec = RopeSpec.of(node.attrs)
            attrs = (*sorted(spec.attrs().items()), ("positions", self.max_positions))
            operands.append(self._constant(Constant("rope", attrs=attrs)))
        if node.attrs.get("alibi"):
            operands.append(self._constant(Constant("alibi", attrs=(("num_heads", node.attrs["num_heads"]),))))
        types = getattr(node.type, "items", (node.type,))
        cache = next((o for o in operands if isinstance(o, CacheRef)), None)
        results: list[Operand] = []
        for type in types:
            if isinstance(type, TensorType):
                self.buffers.append(Buffer(str(type.shape[0]), int(type.shape[-1])))
                results.append(View(len(self.buffers) - 1, 0, int(type.shape[-1])))
            else:
                assert cache is not None
                results.append(cache)
        outputs = tuple(r for r in results if isinstance(r, View))
        self.calls.append(Call(node.op, outputs, tuple(operands), dict(node.attrs)))
        self.values[node] = tuple(results) if len(results) > 1 else results[0]

    def _operand(self, node: Node, index: int, x: Node) -> Operand:
        if x.is_constant:
            packing = _PACKINGS.get(node.op, {}).get(index, "vector")
            return self._constant(Constant(packing, x))
        value = self.values[x]
        if isinstance(value, tuple) or index in _PACKINGS.get(node.op, {}):
            raise ValueError(f"operand {index} of {node.op} must be a weight")
        return value

    def _constant(self, constant: Constant) -> ConstantRef:
        return ConstantRef(self.constants.setdefault(constant, len(self.constants)))
