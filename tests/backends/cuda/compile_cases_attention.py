"""What the kernels of attention.py are compiled for: (kernel, signature, constexprs, options), as launched."""

from __future__ import annotations

from typing import Any

import torch

from pelton.backends.cuda.triton import attention

_Case = tuple[str, dict[str, str], dict[str, Any], dict[str, int]]
_POINTERS = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16"}
_NUMBERS = {"out_stride": "i32", "q_stride": "i32", "scale": "fp32"}


def _case(kernel: str, types: dict[str, str], constants: dict[str, Any], options: dict[str, int]) -> _Case:
    types = types | dict.fromkeys(constants, "constexpr")
    return kernel, {name: types[name] for name in getattr(attention, kernel).arg_names}, constants, options


def _cases(
    dtype: torch.dtype, heads: int, kv_heads: int, head_dim: int, splits: int, window: int = 0, softcap: float = 0.0,
    alibi: bool = False,
) -> list[_Case]:  # fmt: skip
    """Chunks, single tokens, and the merge of the latter if they are split."""
    types = dict.fromkeys(("out_ptr", "q_ptr", "cache_ptr"), _POINTERS[dtype]) | _NUMBERS
    ints = ("table_ptr", "width_ptr", "seq_lens_ptr", "starts_ptr", "tiles_ptr", "rows_ptr")
    types |= dict.fromkeys(ints, "*i32") | dict.fromkeys(("slopes_ptr", "workspace_ptr"), "*fp32")
    cache = torch.empty(1, 2, kv_heads, 16, head_dim, dtype=dtype, device="meta")
    group, cases = heads // kv_heads, []
    for kernel in ("_prefill_kernel", "_decode_kernel"):
        prefill = kernel == "_prefill_kernel"
        tile = attention._tile(head_dim, dtype, prefill, group)
        per_program = attention._prefill_heads(group, tile.rows) if prefill else -(-group // -(-group // tile.rows))
        constants = attention._constants(cache, tile, group, per_program, window, softcap)
        options = {name: constants.pop(name) for name in ("num_warps", "num_stages")}
        constants |= {} if alibi else {"slopes_ptr": None}
        constants |= {} if prefill else {"SPLIT": splits > 1}
        cases.append(_case(kernel, types, constants, options))
    if splits > 1:
        merge = {"SPLITS": splits, "HEAD_DIM": head_dim, "BLOCK_D": constants["BLOCK_D"]}
        cases.append(_case("_merge_kernel", types, merge, {}))
    return cases


CASES: list[_Case] = [
    *_cases(torch.bfloat16, 32, 8, 128, splits=1),  # Llama-3.1-8B
    *_cases(torch.bfloat16, 32, 8, 128, splits=8)[1:],
    *_cases(torch.float16, 32, 32, 80, splits=64),  # Phi-2
    *_cases(torch.float32, 15, 5, 64, splits=2),  # SmolLM2-360M
    *_cases(torch.bfloat16, 8, 4, 256, splits=1, window=4096, softcap=50.0),  # Gemma-2-2B
    *_cases(torch.bfloat16, 71, 1, 64, splits=4, alibi=True),  # as many heads as Falcon-7B's
]
