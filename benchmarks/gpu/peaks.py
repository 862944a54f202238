"""What the device can do at best: bytes per second of a copy, FLOP per second of matrix products."""

from __future__ import annotations

from itertools import cycle
from typing import Any

from .device import best_and_median, empty_cache, seconds_of, torch_device
from .part import Part

#: Rows of an activation matrix in the products of the model: a prefill, and decode steps.
_ROWS = (2048, 256, 64, 16, 1)
#: Bytes that no cache holds, and the most matrices that they are made of.
_UNCACHED, _COPIES = 1 << 28, 16


def torch_type(name: str) -> Any:
    import torch

    return {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}[name]


def copy_bandwidth(size: int, repeats: int) -> dict[str, float]:
    """Bytes read and written per second by a copy of ``size`` bytes within the device's memory."""
    import torch

    source = torch.zeros(size, dtype=torch.uint8, device=torch_device())
    source.random_(0, 256)
    target = torch.empty_like(source)
    return best_and_median(seconds_of(lambda: target.copy_(source), repeats), 2.0 * size)


def read_bandwidth(size: int, repeats: int) -> dict[str, float]:
    """Bytes read per second by a sum: what decoding does most."""
    import torch

    source = torch.ones(size // 4, dtype=torch.float32, device=torch_device())
    return best_and_median(seconds_of(lambda: source.sum(), repeats), 1.0 * size)


def matmul_rate(m: int, n: int, k: int, dtype: str, repeats: int) -> dict[str, float]:
    """FLOP per second of x [m, k] @ w [n, k].T, on random data; float32 without TF32, which is torch's default."""
    import torch

    kind = torch_type(dtype)
    x = torch.randn(m, k, device=torch_device()).to(kind)
    # Several of a small one, in turns, so that none is found in a cache.
    count = max(1, min(_COPIES, _UNCACHED // (n * k * kind.itemsize)))
    weights = cycle([torch.randn(n, k, device=torch_device()).to(kind) for _ in range(count)])
    out = torch.empty(m, n, dtype=kind, device=x.device)
    return best_and_median(seconds_of(lambda: torch.mm(x, next(weights).T, out=out), repeats), 2.0 * m * n * k)


class Meter:
    """The two peaks that matter, measured before and after what they are compared with."""

    def __init__(self, part: Part) -> None:
        self._part = part
        part.data["peaks"] = []
        self.measure()

    def measure(self) -> None:
        scale = self._part.scale
        n, repeats = scale.matmul_size, max(2, scale.repeats // 2)
        found = {
            "bandwidth": copy_bandwidth(scale.copy_bytes[0], repeats)["best"],
            scale.dtype: matmul_rate(n, n, n, scale.dtype, repeats)["best"],
        }
        empty_cache()
        self._part.data["peaks"].append(found)
        self._part.say(f"{found['bandwidth'] / 1e9:,.0f} GB/s, {found[scale.dtype] / 1e12:,.1f} TFLOP/s {scale.dtype}")

    @property
    def bandwidth(self) -> float:
        """Bytes/s, read and written."""
        return max(found["bandwidth"] for found in self._part.data["peaks"])

    @property
    def flops(self) -> float:
        """FLOP/s in the type of the model."""
        return max(found[self._part.scale.dtype] for found in self._part.data["peaks"])


def model_products(scale: Any) -> dict[str, tuple[int, int]]:
    """(rows, columns) of the matrices of a layer, as the engine stacks them, and of the output layer."""
    c = scale.config
    hidden, inner, head = c["hidden_size"], c["intermediate_size"], c["head_dim"]
    heads, kv_heads = c["num_attention_heads"], c["num_key_value_heads"]
    return {
        "qkv": ((heads + 2 * kv_heads) * head, hidden),
        "out": (hidden, heads * head),
        "gate and up": (2 * inner, hidden),
        "down": (hidden, inner),
        "head": (c["vocab_size"], hidden),
    }


def run(part: Part) -> None:
    scale = part.scale
    for size in scale.copy_bytes:
        part.check()
        part.row(what=f"copy of {size / 2**30:.3g} GiB", unit="bytes/s", **copy_bandwidth(size, scale.repeats))
    size = scale.copy_bytes[-1]
    part.row(what=f"sum of {size / 2**30:.3g} GiB", unit="bytes/s", **read_bandwidth(size, scale.repeats))
    n = scale.matmul_size
    for dtype in ("bf16", "f16", "f32"):
        part.check()
        repeats = scale.repeats if dtype != "f32" else max(2, scale.repeats // 4)
        part.row(what=f"{dtype} {n}³", unit="FLOP/s", **matmul_rate(n, n, n, dtype, repeats))
    for name, (rows, cols) in model_products(scale).items():
        for m in _ROWS:
            part.check()
            rate = matmul_rate(m, rows, cols, scale.dtype, scale.repeats)
            # With few rows the weights' bytes are what counts: 2 FLOPs per row and weight of 2 bytes.
            part.row(
                what=f"{name}: {m} × {cols} × {rows}", unit="FLOP/s", **rate, weight_bytes_per_s=rate["median"] / m
            )
        empty_cache()
