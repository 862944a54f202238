"""What the kernels of norms.py, pointwise.py, rope.py and lora.py are compiled for, as their launchers ask for it.

CASES: ("module.kernel", signature, constexprs, options), modules of pelton.backends.cuda.triton.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from pelton.backends.cuda.triton import lora, norms, pointwise, rope

F32, F16, BF16, I32 = torch.float32, torch.float16, torch.bfloat16, torch.int32
_POINTER = {F32: "*fp32", F16: "*fp16", BF16: "*bf16", I32: "*i32"}
Case = tuple[str, dict[str, str], dict[str, Any], dict[str, int]]


class _Recorder:
    """In the place of a kernel: keeps what it is launched with."""

    def __init__(self, name: str, kernel: Any, cases: list[Case]) -> None:
        self.name, self.kernel, self.cases = name, kernel, cases

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return self.launch

    def launch(self, *args: Any, **named: Any) -> None:
        names = self.kernel.arg_names
        values = dict(zip(names, args, strict=False)) | {n: v for n, v in named.items() if n in names}
        signature, constants = {}, {}
        for name in names:
            value = values[name]
            if name in named or value is None:
                signature[name], constants[name] = "constexpr", value
            elif isinstance(value, torch.Tensor):
                signature[name] = _POINTER[value.dtype]
            else:
                signature[name] = "fp32" if isinstance(value, float) else "i32"
        options = {n: v for n, v in named.items() if n not in names}
        self.cases.append((self.name, signature, constants, options))


def _launched(launcher: Callable[..., None], *args: Any) -> list[Case]:
    """What a launcher launches for these arguments."""
    cases: list[Case] = []
    space = launcher.__globals__
    kernels = {n: k for n, k in space.items() if n.startswith("_") and n.endswith("_kernel")}
    module = launcher.__module__.rpartition(".")[2]
    space.update({n: _Recorder(f"{module}.{n}", k, cases) for n, k in kernels.items()})
    try:
        launcher(*args)
    finally:
        space.update(kernels)
    return cases


def _t(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _model(
    dtype: torch.dtype, hidden: int, heads: int, kv_heads: int, head_dim: int, rotary_dim: int, inter: int, vocab: int,
    kind: str = "silu", interleaved: bool = False,
) -> list[Case]:  # fmt: skip
    """A step of 64 tokens."""
    x, stream, weight = _t(64, hidden, dtype=dtype), _t(64, hidden, dtype=F32), _t(hidden, dtype=F32)
    q, k = (_t(64, n * head_dim, dtype=dtype) for n in (heads, kv_heads))
    gates, wide, ints = _t(64, inter, dtype=dtype), _t(64, 2 * inter, dtype=dtype), _t(64, dtype=I32)
    cache, table = _t(99, 2, kv_heads, 16, head_dim, dtype=dtype), _t(4096, rotary_dim, dtype=F32)
    turn = (head_dim, rotary_dim, interleaved)
    return [
        *_launched(norms.rms_norm, x, stream, weight, 1e-5, 0.0),
        *_launched(norms.rms_norm, q, q, _t(head_dim, dtype=F32), 1e-5, 0.0),
        *_launched(norms.layer_norm, x, stream, weight, weight, 1e-5),
        *_launched(norms.add_rms_norm, stream, x, stream, x, weight, 1e-5, 0.0),
        *_launched(norms.add_layer_norm, stream, x, stream, x, weight, None, 1e-5),
        *_launched(pointwise.gather_rows, stream, _t(vocab, hidden, dtype=dtype), ints),
        *_launched(pointwise.gated_activation, gates, gates, gates, kind),
        *_launched(pointwise.gated_blocks, gates, wide, kind),
        *_launched(rope.rope, q, q, ints, table, *turn),
        *_launched(rope.kv_write, cache, k, k, ints),
        *_launched(rope.rope_kv_write, q, cache, q, k, k, ints, ints, table, *turn),
    ]


def _lora(x_type: torch.dtype, dtype: torch.dtype, features: int, widths: tuple[int, ...], rank: int) -> list[Case]:
    y, x = _t(64, sum(widths), dtype=x_type), _t(64, features, dtype=x_type)
    a, b = _t(8, len(widths) * rank, features, dtype=dtype), _t(8, sum(widths), rank, dtype=dtype)
    parts, scratch = lora.lora_parts(widths, torch.device("meta")), _t(64, len(widths) * rank, dtype=F32)
    return _launched(lora.lora, y, y, x, a, b, _t(64, dtype=I32), parts, scratch)


def _elementwise() -> list[Case]:
    x, logits = _t(64, 4096, dtype=BF16), _t(64, 128256, dtype=F32)
    ints = _t(64, dtype=I32)
    return [
        *_launched(pointwise.add, x, x, x),
        *_launched(pointwise.mul, x, x, x),
        *_launched(pointwise.scale, x, x, 1.5),
        *_launched(pointwise.softcap, logits, logits, 30.0),
        *_launched(pointwise.activation, x, x, "relu"),
        *_launched(pointwise.activation, x, x, "gelu"),
        *_launched(pointwise.fill_pending, ints, ints, ints),
        *_launched(norms.add_rms_norm, _t(8, 16384, dtype=F32), _t(8, 16384, dtype=BF16), _t(8, 16384, dtype=F32),
                   _t(8, 16384, dtype=BF16), _t(16384, dtype=F32), 1e-5, 1.0),
    ]  # fmt: skip


CASES: list[Case] = [
    *_model(BF16, 4096, 32, 8, 128, 128, 14336, 128256),  # Llama-3.1-8B
    *_model(F16, 2560, 32, 32, 80, 32, 10240, 51200, "gelu_tanh"),  # as large as Phi-2
    *_model(F32, 960, 15, 5, 64, 64, 2560, 49152, "gelu", interleaved=True),  # as large as SmolLM2-360M
    *_elementwise(),
    *_lora(BF16, BF16, 4096, (4096, 1024, 1024), 16),
    *_lora(BF16, BF16, 4096, (14336, 14336), 64),
    *_lora(F32, BF16, 14336, (4096,), 8),
    *_lora(F16, F16, 2560, (2560, 2560, 2560), 32),
    *_lora(F32, F32, 960, (960, 320, 320), 16),
    *_lora(F32, F32, 960, (2560, 2560), 128),
]
