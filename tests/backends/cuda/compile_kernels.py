"""Compiles every kernel for GPUs, without one: ``python -m tests.backends.cuda.compile_kernels [--some] [sm ...]``.

The launchers are called as for a step of Llama 3.1 8B (and of other types and head sizes) on tensors without data; what
they would launch is compiled instead. Prints a line of JSON per kernel: its name, the target, bytes of shared memory,
bytes that registers spill. The interpreter, which the tests use, lets much pass that the compiler refuses. --some: of
what each kernel is compiled for, a quarter.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from pelton.backends.cuda.triton import lora, norms, pointwise, quantize, rescale, rope, sampling
from tests.backends.cuda.compile_caches import launch_caches
from tests.backends.cuda.compile_fp8 import launch_fp8_products
from tests.backends.cuda.compile_products import launch_products

_TYPES = {
    torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.int32: "*i32", torch.int64: "*i64",
    torch.int16: "*i16", torch.int8: "*i8", torch.uint8: "*u8",
}  # fmt: skip
#: What older devices have no instructions for.
_LEAST_CAPABILITY = {"_fp8_product_kernel": 89}
#: What is launched: kernel, and how it is specialised.
_launched: dict[str, tuple[JITFunction, ASTSource, dict[str, Any]]] = {}


def _record(kernel: JITFunction, *args: Any, grid: Any, warmup: bool, **named: Any) -> None:
    """In place of a launch. Integers of 1 are constants to Triton; of others, and pointers, it knows if 16 divides."""
    values = dict(zip(kernel.arg_names, args, strict=False)) | {n: v for n, v in named.items() if n in kernel.arg_names}
    signature, constants, attrs = {}, {}, {}
    for index, (param, name) in enumerate(zip(kernel.params, kernel.arg_names, strict=True)):
        value = values[name]
        special = not param.do_not_specialize
        if param.is_constexpr or value is None or (isinstance(value, int) and value == 1 and special):
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[name] = _TYPES[value.dtype]
            attrs[(index,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "fp32" if isinstance(value, float) else "i32"
            if isinstance(value, int) and value % 16 == 0 and special:
                attrs[(index,)] = [["tt.divisibility", 16]]
    options = {n: v for n, v in named.items() if n not in kernel.arg_names}
    key = repr((kernel.fn.__name__, signature, {n: str(v) for n, v in constants.items()}, attrs, options))
    _launched[key] = kernel, ASTSource(kernel, signature, constants, attrs), options


JITFunction.run = _record


def _t(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _ints(*shape: int) -> torch.Tensor:
    return _t(*shape, dtype=torch.int32)


def _floats(*shape: int) -> torch.Tensor:
    return _t(*shape, dtype=torch.float32)


def _quantized_activations() -> None:
    """Codes as each kernel writes them, in the widths of Llama 3 8B, 70B and 405B."""
    for dtype in (torch.int8, torch.float8_e4m3fn):
        for columns, groups in ((4096, 1), (4096, 32), (8192, 1), (14336, 1), (14336, 112), (16384, 1), (53248, 1)):
            out = quantize.Codes(_t(32, columns, dtype=dtype), _floats(groups, 32))
            x, total, weight = _t(32, columns), _floats(32, columns), _floats(columns)
            quantize.quantize_rows(out, x)
            pointwise.gated_activation(out, x, x, "silu")
            pointwise.gated_blocks(out, _t(32, 2 * columns), "silu")
            pointwise.activation(out, x, "gelu")
            if columns <= quantize.ROW_COLUMNS:
                norms.rms_norm(out, total, weight, 1e-5, 0.0)
                norms.add_rms_norm(total, out, total, x, weight, 1e-5, 0.0)
                norms.add_layer_norm(total, out, total, x, weight, weight, 1e-5)


def launch_everything() -> None:
    """One of each launch, at the shapes of real models."""
    x, total, weight = _t(32, 4096), _floats(32, 4096), _floats(4096)
    norms.rms_norm(x, total, weight, 1e-5, 0.0)
    norms.rms_norm(x, x, _floats(128), 1e-6, 1.0)  # by heads
    norms.layer_norm(x, total, weight, weight, 1e-5)
    norms.add_rms_norm(total, x, total, x, weight, 1e-5, 0.0)
    norms.add_layer_norm(total, x, total, x, weight, weight, 1e-5)
    pointwise.gather_rows(total, _t(128256, 4096), _ints(32))
    pointwise.fill_pending(_ints(32), _ints(32), _ints(64))
    pointwise.add(total, total, x)
    pointwise.mul(x, x, x)
    pointwise.scale(total, total, 2.0)
    pointwise.softcap(_floats(32, 128256), _floats(32, 128256), 30.0)
    both = _t(32, 2 * 14336)
    for kind in ("silu", "gelu", "gelu_tanh", "relu"):
        pointwise.activation(x, x, kind)
        pointwise.gated_activation(_t(32, 14336), both[:, :14336], both[:, 14336:], kind)
    pointwise.gated_blocks(_t(32, 14336), both, "silu")
    q, table = _t(32, 4096), _floats(8192, 128)
    rope.rope(x, q, _ints(32), table, 128, 128, False)
    rope.rope(_t(32, 2560), _t(32, 2560), _ints(32), _floats(2048, 32), 80, 32, True)
    launch_caches()
    for vocab in (128256, 4000):
        logits, words = _floats(32, vocab), _ints(32, sampling.NUM_WORDS)
        scratch = _t(sampling.scratch_words(32, vocab), dtype=torch.int64)
        sampling.sample(_ints(32, 2), logits, words, scratch)
    widths, qkv = (4096, 1024, 1024), _t(32, 6144)
    parts = lora.lora_parts(widths, torch.device("meta"))
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        tables = _t(4, 3 * 16, 4096, dtype=dtype), _t(4, sum(widths), 16, dtype=dtype)
        lora.lora(qkv, qkv, x, *tables, _ints(32), parts, _floats(32, 3 * 16))
    _quantized_activations()
    rescale.rescale(x, _t(32, 4096, dtype=torch.int32), _floats(32), weight, None)
    launch_products()
    launch_fp8_products()


def _resources(cubin: bytes) -> tuple[int, int]:
    """Registers of a thread, and the bytes of its stack: what did not fit into registers."""
    cuobjdump = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(cuobjdump), "-res-usage", file.name]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", said)
    assert found is not None, said
    return int(found[1]), int(found[2])


def _some() -> list[tuple[JITFunction, ASTSource, dict[str, Any]]]:
    """A quarter of the launches of each kernel, the first one among them."""
    by_kernel: dict[str, list[tuple[JITFunction, ASTSource, dict[str, Any]]]] = {}
    for launch in _launched.values():
        by_kernel.setdefault(launch[0].fn.__name__, []).append(launch)
    return [launch for launches in by_kernel.values() for launch in launches[::4]]


def main(capabilities: list[int], some: bool) -> None:
    launch_everything()
    for kernel, source, options in _some() if some else _launched.values():
        for capability in capabilities:
            if capability < _LEAST_CAPABILITY.get(kernel.fn.__name__, 0):
                continue
            compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
            # Where the 512 columns of Blackwell's tensor memory are too few, Triton 3.6 compiles a trap, silently.
            tensor_memory = getattr(compiled.metadata, "tmem_size", 0) or 0
            if tensor_memory > 512 or "trap;" in compiled.asm["ptx"]:
                raise RuntimeError(f"{source.name} on sm_{capability}: {tensor_memory} columns, or a trap: {options}")
            registers, stack = _resources(compiled.asm["cubin"])
            row = {
                "kernel": kernel.fn.__name__, "sm": capability, "shared": compiled.metadata.shared,
                "registers": registers, "stack": stack,
            }  # fmt: skip
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main([int(arg) for arg in sys.argv[1:] if arg != "--some"] or [90], "--some" in sys.argv)
