"""Names of calls, for people who read a program or a profile: the Hugging Face module a call belongs to."""

from __future__ import annotations

from collections.abc import Sequence


def module_of(name: str) -> str:
    """The parent: ``model.layers.3.mlp`` of ``model.layers.3.mlp.down_proj``."""
    return name.rpartition(".")[0]


def weight_module(weights: Sequence[str]) -> str:
    """The module that holds these weights, merged ones under one name; "" for none.

    ``...self_attn.q_proj.weight``, k and v become ``...self_attn.qkv_proj``, gate and up ``...mlp.gate_up_proj``.
    """
    modules = list(dict.fromkeys(module_of(w) or w for w in weights))
    if len(modules) < 2:
        return modules[0] if modules else ""
    parents = {module_of(m) for m in modules}
    leaves = [m.rpartition(".")[2] for m in modules]
    kinds = {leaf.rpartition("_")[2] for leaf in leaves}
    if len(parents) > 1 or len(kinds) > 1:
        return modules[0]
    stems = [leaf.rpartition("_")[0] for leaf in leaves]
    merged = ("" if all(len(s) == 1 for s in stems) else "_").join(stems) + f"_{kinds.pop()}"
    return f"{parents.pop()}.{merged}".lstrip(".")
