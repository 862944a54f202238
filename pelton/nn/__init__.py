"""Layers for model files. See docs/add-a-model.md."""

from ..graph.builder import activation, add, gated_activation, permute_rows, scale, slice_, softcap
from ..graph.node import Node
from ..graph.rope import RopeSpec
from .layers import Attention, Embedding, LayerNorm, Linear, RMSNorm, TransposedLinear
from .module import CausalLM, Module, Parameter, Step, trace

__all__ = [
    "Attention", "CausalLM", "Embedding", "LayerNorm", "Linear", "Module", "Node", "Parameter",
    "RMSNorm", "RopeSpec", "Step", "TransposedLinear", "activation", "add", "gated_activation",
    "permute_rows", "scale", "slice_", "softcap", "trace",
]  # fmt: skip
