"""What the device can do at best: bytes per second of a copy, FLOP per second of matrix products."""

from __future__ import annotations

from collections.abc import Iterable
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


def fp8_rate(m: int, n: int, k: int, repeats: int, *, fast: bool) -> dict[str, float]:
    """As :func:`matmul_rate`, of E4M3 numbers with a scale per matrix. fast: sums are shorter than float32."""
    import torch

    def random(rows: int) -> Any:
        return torch.randn(rows, k, device=torch_device()).to(torch.float8_e4m3fn)

    x, one = random(m), torch.ones((), dtype=torch.float32, device=torch_device())
    weights = cycle([random(n) for _ in range(max(1, min(_COPIES, _UNCACHED // (n * k))))])

    def run() -> object:
        return torch._scaled_mm(
            x, next(weights).t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16, use_fast_accum=fast
        )

    return best_and_median(seconds_of(run, repeats), 2.0 * m * n * k)


def int8_rate(m: int, n: int, k: int, repeats: int) -> dict[str, float]:
    """As :func:`matmul_rate`, of integers."""
    import torch

    def random(rows: int) -> Any:
        return torch.randint(-127, 128, (rows, k), dtype=torch.int8, device=torch_device())

    x, out = random(m), torch.empty(m, n, dtype=torch.int32, device=torch_device())
    weights = cycle([random(n) for _ in range(max(1, min(_COPIES, _UNCACHED // (n * k))))])
    return best_and_median(seconds_of(lambda: torch._int_mm(x, next(weights).t(), out=out), repeats), 2.0 * m * n * k)


def rates(m: int, n: int, k: int, dtype: str, repeats: int) -> dict[str, dict[str, float]]:
    """Rates of products by the name of what is measured; of "fp8" there are two."""
    if dtype == "fp8":
        slow, fast = (fp8_rate(m, n, k, repeats, fast=fast) for fast in (False, True))
        return {"fp8": slow, "fp8, short sums": fast}
    return {dtype: int8_rate(m, n, k, repeats) if dtype == "int8" else matmul_rate(m, n, k, dtype, repeats)}


def rates_or_why(m: int, n: int, k: int, dtype: str, repeats: int) -> tuple[dict[str, dict[str, float]], str]:
    """The same; no rates, and why, where torch or the device has no such product."""
    import torch

    try:
        return rates(m, n, k, dtype, repeats), ""
    except torch.OutOfMemoryError:
        raise
    except (AttributeError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
        if "CUDA error" in str(error):
            raise
        return {}, str(error).strip().split("\n")[0][:200]


class Meter:
    """The peaks that matter, measured before and after what they are compared with.

    products: types besides the model's, of "fp8" and "int8". One that torch or the device does not multiply has no
    peak; ``no_peaks`` in the results says why.
    """

    def __init__(self, part: Part, products: Iterable[str] = ()) -> None:
        self._part = part
        self._products = tuple(dict.fromkeys((part.scale.dtype, *products)))
        part.data["peaks"] = []
        self.measure()

    def measure(self) -> None:
        scale = self._part.scale
        n, repeats = scale.matmul_size, max(2, scale.repeats // 2)
        found = {"bandwidth": copy_bandwidth(scale.copy_bytes[0], repeats)["best"]}
        for name in self._products:
            by_name, why = ({name: matmul_rate(n, n, n, name, repeats)}, "") if name == scale.dtype else rates_or_why(
                n, n, n, name, repeats
            )  # fmt: skip
            if by_name:
                found[name] = max(rate["best"] for rate in by_name.values())
            else:
                self._part.data.setdefault("no_peaks", {})[name] = why
        empty_cache()
        self._part.data["peaks"].append(found)
        shown = ", ".join(f"{found[name] / 1e12:,.1f} TFLOP/s {name}" for name in self._products if name in found)
        self._part.say(f"{found['bandwidth'] / 1e9:,.0f} GB/s, {shown}")

    @property
    def bandwidth(self) -> float:
        """Bytes/s, read and written."""
        return max(found["bandwidth"] for found in self._part.data["peaks"])

    @property
    def flops(self) -> float:
        """FLOP/s in the type of the model."""
        return max(found[self._part.scale.dtype] for found in self._part.data["peaks"])

    def rate(self, product: str) -> float | None:
        """FLOP/s of a type; None if it has no peak."""
        return max((found[product] for found in self._part.data["peaks"] if product in found), default=None)


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
    _narrow(part, f"{n}³", n, n, n)
    for name, (rows, cols) in model_products(scale).items():
        for m in _ROWS:
            part.check()
            rate = matmul_rate(m, rows, cols, scale.dtype, scale.repeats)
            # With few rows the weights' bytes are what counts: 2 FLOPs per row and weight of 2 bytes.
            part.row(
                what=f"{name}: {m} × {cols} × {rows}", unit="FLOP/s", **rate, weight_bytes_per_s=rate["median"] / m
            )
        # Fewer rows are refused, at least of integers.
        for m in (m for m in _ROWS if m > 16):
            part.check()
            _narrow(part, f", {name}: {m} × {cols} × {rows}", m, rows, cols)
        empty_cache()


def _narrow(part: Part, what: str, m: int, n: int, k: int) -> None:
    """Rows for FP8 and int8, where there are such products."""
    for dtype in ("fp8", "int8"):
        by_name, why = rates_or_why(m, n, k, dtype, part.scale.repeats)
        for name, rate in by_name.items():
            part.row(what=f"{name}{'' if what[0] == ',' else ' '}{what}", unit="FLOP/s", **rate)
        if not by_name and dtype not in part.data.setdefault("no_peaks", {}):
            part.data["no_peaks"][dtype] = why
            part.say(f"{dtype}: {why}")
