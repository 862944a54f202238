"""Graph -> program: one call per node; slices and items become views, weight expressions constants."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ..graph import F32, OPS, AdapterType, CacheType, DType, Graph, Node, TensorType
from ..graph.cost import total
from ..graph.rope import RopeSpec
from .memory import plan_memory
from .names import module_of, weight_module
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

#: How each constant operand is packed: op -> packing per operand index; all others are vectors.
_PACKINGS = {"embedding": {1: "rows"}, "linear": {1: "panels"}, "gated_linear": {1: "panels"}}
_ROPE = ("rope", "rope_kv_write")
#: What products and attention read or write. All else, the sums between layers above all, stays float32.
_NARROW = frozenset({
    "linear", "gated_linear", "rms_norm", "layer_norm", "add_rms_norm", "add_layer_norm", "activation",
    "gated_activation", "mul", "rope", "rope_kv_write", "attention",
})  # fmt: skip


def lower(graph: Graph, limits: Mapping[str, int], max_positions: int, activations: DType = F32) -> Program:
    """Flatten ``graph`` for steps of at most ``limits`` rows per dimension.

    limits: of "L", that of "N" unless it is given. max_positions: rows of the rope tables, the longest context that
    will be run. activations: the type of what goes into products and attention and comes out of them; sums between
    layers and logits are float32 in any case.

    Raises:
        ValueError: a matrix that is only known at run time feeds an op that needs a constant.
    """
    lowering = _Lowering(graph, max_positions, activations)
    for node in graph.nodes:
        lowering.node(node)
    output, hidden = lowering.values[graph.outputs[0]], lowering.values[graph.outputs[-1]]
    assert isinstance(output, View) and isinstance(hidden, View)
    program = Program(
        graph.name,
        {**limits, "L": limits.get("L", limits["N"])},
        tuple(lowering.inputs),
        tuple(lowering.caches),
        tuple(lowering.constants),
        tuple(lowering.buffers),
        tuple(lowering.calls),
        output,
        hidden,
        total([call.flops for call in lowering.calls]),
        total([call.bytes for call in lowering.calls]),
        adapters=tuple(lowering.adapters),
    )
    return plan_memory(program)


class _Lowering:
    def __init__(self, graph: Graph, max_positions: int, activations: DType) -> None:
        self.tables = {name for n in graph.nodes if n.op == "embedding" for name in _weights(n.inputs[1])}
        self.max_positions = max_positions
        self.activations = activations
        self.head = graph.outputs[0]  # the product that makes the logits, if there is one
        while self.head.op in ("softcap", "scale", "first_rows", "take_rows"):
            self.head = self.head.inputs[0]
        self.values: dict[Node, Operand | tuple[Operand, ...]] = {}
        self.inputs: list[str] = []
        self.caches: list[CacheType] = []
        self.adapters: list[AdapterTable] = []
        self.constants: dict[Constant, int] = {}
        self.buffers: list[Buffer] = []
        self.calls: list[Call] = []
        self.names: dict[Node, tuple[int, str]] = {}  # number and name of the call that computes a node

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
            self.names[node] = self.names[node.inputs[0]]
        elif node.op == "first_rows":  # the rows of a buffer that a call does not count are not there for it
            self.values[node] = self.values[node.inputs[0]]
            self.names[node] = self.names[node.inputs[0]]
        elif node.op == "item":
            parts = self.values[node.inputs[0]]
            assert isinstance(parts, tuple)
            self.values[node] = parts[node.attrs["index"]]
            self.names[node] = self.names[node.inputs[0]]
        else:
            self._call(node)

    def _input(self, node: Node) -> Operand:
        if isinstance(node.type, CacheType):
            self.caches.append(node.type)
            return CacheRef(len(self.caches) - 1)
        if isinstance(node.type, AdapterType):
            self.adapters.append(AdapterTable(node.type, node.attrs["modules"], node.attrs["row_orders"]))
            return AdapterRef(len(self.adapters) - 1)
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
        written = OPS[node.op].writes
        for type in types:
            if written is not None and isinstance(operands[written], View):
                results.append(operands[written])
            elif isinstance(type, TensorType):
                dtype = self._dtype(node, operands, len(results))
                self.buffers.append(Buffer(str(type.shape[0]), int(type.shape[-1]), dtype=dtype))
                results.append(View(len(self.buffers) - 1, 0, int(type.shape[-1])))
            else:
                assert cache is not None
                results.append(cache)
        outputs = tuple(r for r in results if isinstance(r, View))
        row, input_types = OPS[node.op], [x.type for x in node.inputs]
        flops, moved = (cost(node.attrs, node.type, *input_types) for cost in (row.flops, row.bytes))
        name = self._name(node)
        self.names[node] = (len(self.calls), name)
        self.calls.append(Call(node.op, outputs, tuple(operands), dict(node.attrs), name, flops, moved))
        self.values[node] = tuple(results) if len(results) > 1 else results[0]

    def _dtype(self, node: Node, operands: Sequence[Operand], index: int) -> DType:
        """The element type of a node's result number ``index``."""
        if node.op == "take_rows":
            assert isinstance(operands[0], View)
            return self.buffers[operands[0].buffer].dtype
        is_sum = node.op in ("add_rms_norm", "add_layer_norm") and index == 0
        return self.activations if node.op in _NARROW and node is not self.head and not is_sum else F32

    def _name(self, node: Node) -> str:
        """Its weight's module; without a weight, the op in the module of the operand that was computed last."""
        if node.op == "linear" and self.tables.intersection(_weights(node.inputs[1])):
            return "lm_head"  # tied: the weight has the table's name, perhaps in another type
        if node.op == "lora":
            return f"{self.names[node.inputs[0]][1]}.lora"
        if own := weight_module([name for x in node.inputs for name in _weights(x)]):
            return own
        _, before = max((self.names[x] for x in node.inputs if x in self.names), default=(0, ""))
        parent = module_of(before)
        return f"{parent}.{node.op}" if parent else node.op

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


def _weights(expr: Node) -> list[str]:
    """Names of the weights that a constant is made of; none if it is no constant."""
    if expr.op == "weight":
        return [expr.name]
    return [name for x in expr.inputs for name in _weights(x)] if expr.is_constant else []
