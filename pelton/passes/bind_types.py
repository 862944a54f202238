"""Give weights and caches the element types they are stored in: this is all that quantization is to a graph."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

from ..errors import CheckpointError
from ..graph import (
    BF16,
    E4M3,
    F16,
    F32,
    I8,
    CacheType,
    DType,
    Graph,
    GroupQuant,
    Node,
    TensorType,
    make,
    replace,
    rewrite,
)  # fmt: skip
from ..quantize import fitting, weight_type

#: What old checkpoints keep beside their weights: masks, rope frequencies, a second copy of tied weights.
_BUFFERS = re.compile(r"(^lm_head\.weight|rotary_emb\.inv_freq|\.attn\.(masked_)?bias)$")
_TYPES = {"f32": F32, "f16": F16, "bf16": BF16}
_CACHES = {**_TYPES, "int8": I8, "fp8": E4M3}


def bind_types(
    graph: Graph,
    stored: Mapping[str, TensorType],
    dtype: str = "auto",
    kv_cache_dtype: str = "auto",
    quantization: str | None = None,
    half: str = "bf16",
) -> Graph:
    """Before: every weight and cache is f32. After: weights have their stored type, caches one type.

    dtype: "f32", "f16" or "bf16" changes the type of weights that are not quantized; "auto" keeps it, except
    that f16 runs as ``half``: bf16 is the 16-bit type that CPUs multiply. kv_cache_dtype "auto" is f32 where all
    matrices are f32, f16 where those that are not are f16, bf16 otherwise. quantization gives the weights of linear
    layers a quantized type; a table that is looked up, too, keeps its own, so a tied weight then has two leaves.

    Raises:
        CheckpointError: a weight is missing, has another shape than the model needs, or a type that
            nothing computes with; there are weights that the model does not use; or quantization is asked
            for and the checkpoint is quantized.
    """
    for node in graph.leaves("weight"):
        have = stored.get(node.name)
        if have is None:
            raise CheckpointError(
                f"the checkpoint has no tensor {node.name}", "it is incomplete or of another architecture"
            )
        if have.shape != node.tensor.shape:
            raise CheckpointError(
                f"tensor {node.name} has shape {list(have.shape)}, the config asks for {list(node.tensor.shape)}",
                "config and weights do not belong together",
            )
    unused = sorted(n for n in set(stored) - {n.name for n in graph.leaves("weight")} if not _BUFFERS.search(n))
    if unused:
        raise CheckpointError(
            f"the checkpoint has {len(unused)} tensors that the model does not use, such as {unused[0]}",
            "config and weights do not belong together, or the architecture is another one",
        )
    bound = {
        n.name: TensorType(n.tensor.shape, _bound_type(n.name, stored[n.name].dtype, dtype, half))
        for n in graph.leaves("weight")
    }
    matrices = {t.dtype for t in bound.values() if len(t.shape) > 1}
    narrow = matrices - {F32} if quantization is None else {BF16}
    cache = _CACHES.get(kv_cache_dtype, F16 if narrow == {F16} else BF16 if narrow else F32)
    already = next((d for d in sorted(matrices, key=str) if isinstance(d, GroupQuant)), None)
    if quantization is not None and already is not None:
        raise CheckpointError(
            f"the checkpoint is quantized already ({already})", f"leave out quantization={quantization!r}"
        )
    head = output_layer(graph)

    def rule(node: Node, new: Callable[[Node], Node]) -> Node | None:
        if node.op == "weight":
            return make("weight", type=bound[node.name], name=node.name)
        if isinstance(node.type, CacheType) and node.op == "input":
            return make("input", type=CacheType(node.type.num_kv_heads, node.type.head_dim, cache), name=node.name)
        if quantization is not None and node.op == "linear":
            x, w, *bias = node.inputs
            return make("linear", new(x), _quantized(w, weight_type(quantization, head=node is head)), *map(new, bias))
        return None

    return rewrite(graph, rule)


def output_layer(graph: Graph) -> Node:
    """The product that makes logits; a leaf if there is none."""
    head = graph.outputs[0]
    while head.op not in ("linear", "input", "weight"):
        head = head.inputs[0]
    return head


def _quantized(w: Node, type: GroupQuant) -> Node:
    """The weight expression of a linear layer in a quantized type. Rows are quantized as products read them."""
    if w.op == "permute_rows":
        return replace(w, (_quantized(w.inputs[0], type),))
    leaf, attrs = (w.inputs[0], {"transposed": True}) if w.op == "transpose" else (w, {})
    bound = TensorType(w.tensor.shape, fitting(type, int(w.tensor.shape[1])))
    return make("weight", type=bound, name=leaf.name, **attrs)


def _bound_type(name: str, stored: DType | GroupQuant, dtype: str, half: str) -> DType | GroupQuant:
    if isinstance(stored, GroupQuant):
        return stored
    if stored not in (F32, F16, BF16):
        # Integers and FP8 are codes: without the scales beside them, casting would give wrong numbers in silence.
        raise CheckpointError(
            f"tensor {name} is stored as {stored}, which is not supported",
            "use a checkpoint in f32, f16 or bf16, or a GGUF file",
        )
    if dtype != "auto":
        return _TYPES[dtype]
    return _TYPES[half] if stored == F16 else stored
