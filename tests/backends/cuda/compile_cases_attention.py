"""What the kernels of attention.py are compiled for: (kernel, signature, constexprs, options), as launched."""

from __future__ import annotations

from typing import Any

import torch

from pelton.backends.cuda.triton import attention

_POINTER = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16"}
_POINTERS = ("cache", "table", "width", "seq_lens", "starts")
_Case = tuple[str, dict[str, str], dict[str, Any], dict[str, int]]


def _cases(
    dtype: torch.dtype, heads: int, kv_heads: int, head_dim: int, window: int = 0, softcap: float = 0.0,
    alibi: bool = False, splits: int = 8,
) -> list[_Case]:  # fmt: skip
    """Prefill, decode with one split and with more, merge: what is launched for a model."""
    group, pointer = heads // kv_heads, _POINTER[dtype]
    signature = {"out_ptr": pointer, "q_ptr": pointer, "cache_ptr": pointer}
    signature |= {f"{name}_ptr": "*i32" for name in ("table", "width", "seq_lens", "starts")}
    slopes = {"slopes_ptr": "*fp32" if alibi else "constexpr"}
    numbers = {"out_stride": "i32", "q_stride": "i32", "scale": "fp32"}
    cases = []
    for prefill in (True, False):
        tile = attention._tile(head_dim, dtype, prefill, group)
        parts = -(-group // tile.rows)
        per_program = attention._prefill_heads(group, tile.rows) if prefill else -(-group // parts)
        cache = torch.empty(1, 2, kv_heads, 16, head_dim, dtype=dtype, device="meta")
        constants = attention._constants(cache, tile, group, per_program, window, softcap)
        options = {name: constants.pop(name) for name in ("num_warps", "num_stages")}
        constants |= {} if alibi else {"slopes_ptr": None}
        if prefill:
            types = signature | {"tiles_ptr": "*i32"} | slopes | numbers
            cases.append(("_prefill_kernel", types | dict.fromkeys(constants, "constexpr"), constants, options))
            continue
        types = signature | {"rows_ptr": "*i32"} | slopes | {"workspace_ptr": "*fp32"} | numbers
        for split in (False, True):
            more = {"SPLIT": split} | constants
            cases.append(("_decode_kernel", types | dict.fromkeys(more, "constexpr"), more, options))
    merge = {"SPLITS": splits, "HEAD_DIM": head_dim, "BLOCK_D": constants["BLOCK_D"]}
    types = {
        "out_ptr": pointer,
        "workspace_ptr": "*fp32",
        "starts_ptr": "*i32",
        "rows_ptr": "*i32",
        "out_stride": "i32",
    }
    return [*cases, ("_merge_kernel", types | dict.fromkeys(merge, "constexpr"), merge, {})]


CASES: list[_Case] = [
    *_cases(torch.bfloat16, 32, 8, 128),  # Llama-3.1-8B
    *_cases(torch.float16, 32, 32, 80, splits=64),  # Phi-2
    *_cases(torch.float32, 15, 5, 64),  # SmolLM2-360M
    *_cases(torch.bfloat16, 8, 4, 256, window=4096, softcap=50.0),  # Gemma-2-2B
    *_cases(torch.bfloat16, 71, 1, 64, alibi=True),  # as many heads as Falcon-7B's
]
