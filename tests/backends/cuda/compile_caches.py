"""What ``compile_kernels`` launches on KV caches: of floats, of int8 and FP8 codes."""

from __future__ import annotations

import torch

from pelton.backends.cuda.triton import attention, rope
from pelton.backends.cuda.triton.cache import Cache

META = torch.device("meta")


def _ints(*shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=torch.int32, device=META)


def _floats(*shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=torch.float32, device=META)


def _attention(
    dtype: torch.dtype, heads: int, kv_heads: int, dim: int, splits: int, window: int = 0, softcap: float = 0.0,
    alibi: bool = False, q: torch.dtype | None = None,
) -> None:  # fmt: skip
    x = torch.empty(32, heads * dim, dtype=q or dtype, device=META)
    cache = Cache.zeros(dtype, 64, kv_heads, 16, dim, META)
    step = (_ints(4096), _ints(1), _ints(32), _ints(33))
    named = {"num_heads": heads, "scale": 0.1, "window": window, "softcap": softcap}
    slopes = _floats(heads) if alibi else None
    attention.prefill_attention(x, x, cache, *step, _ints(8, 2), slopes, **named)
    attention.decode_attention(x, x, cache, *step, _ints(32), slopes, _floats(1 << 20), num_splits=splits, **named)


def launch_caches() -> None:
    bf16, f16, f32, int8, fp8 = torch.bfloat16, torch.float16, torch.float32, torch.int8, torch.uint8
    qkv, table = torch.empty(32, 6144, dtype=bf16, device=META), _floats(8192, 128)
    q, k, v = qkv[:, :4096], qkv[:, 4096:5120], qkv[:, 5120:]
    out = torch.empty(32, 4096, dtype=bf16, device=META)
    for stored in (bf16, int8, fp8):
        cache = Cache.zeros(stored, 64, 8, 16, 128, META)
        rope.rope_kv_write(out, cache, q, k, v, _ints(32), _ints(32), table, 128, 128, False)
        rope.kv_write(cache, k, v, _ints(32))
    narrow, part = Cache.zeros(int8, 64, 4, 16, 80, META), torch.empty(32, 320, device=META)
    rope.rope_kv_write(part, narrow, part, part, part, _ints(32), _ints(32), _floats(2048, 32), 80, 32, True)
    _attention(bf16, 32, 8, 128, 1)
    _attention(bf16, 32, 8, 128, 8)
    _attention(f16, 32, 32, 80, 64)
    _attention(f32, 15, 5, 64, 2)
    _attention(bf16, 8, 4, 256, 1, window=4096, softcap=50.0)
    _attention(bf16, 71, 1, 64, 4, alibi=True)
    for stored in (int8, fp8):
        _attention(stored, 32, 8, 128, 1, q=bf16)
        _attention(stored, 32, 8, 128, 8, q=f16)
        _attention(stored, 32, 32, 80, 64, q=f16)
        _attention(stored, 15, 5, 64, 2, q=f32)
        _attention(stored, 8, 4, 256, 1, window=4096, softcap=50.0, q=bf16)
        _attention(stored, 71, 1, 64, 4, alibi=True, q=bf16)
