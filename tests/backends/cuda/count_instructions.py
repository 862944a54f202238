"""Instructions of a product of one token, without a GPU: ``python -m tests.backends.cuda.count_instructions``.

Compiles the kernel of each type for sm_90, finds its inner loop in the machine code, and counts. The last column is the
time that an H100 needs to read the weights over the time that it needs to start these instructions (data sheet: 3.35
TB/s; 132 multiprocessors that start 4 instructions of 32 threads in each cycle of 1.755 GHz): below 1, instructions are
the limit. Prints a table in Markdown.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget

from pelton.backends.cuda import packing
from pelton.backends.cuda.triton import products
from tests.backends.cuda import compile_kernels, compile_products

_BYTES_PER_SECOND = 3.35e12
_LANES_PER_SECOND = 132 * 4 * 32 * 1.755e9
_LINE = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9_.]+)([^;]*);")


def inner_loop(cubin: bytes) -> int:
    """Instructions of the loop that multiplies: the shortest one with a matrix product in it."""
    cuobjdump = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([str(cuobjdump), "-sass", file.name], capture_output=True, text=True, check=True).stdout
    code = [(int(at, 16), name, rest) for at, name, rest in _LINE.findall(text)]
    loops = []
    for at, name, rest in code:
        target = re.search(r"0x([0-9a-f]+)", rest)
        if name.startswith("BRA") and target is not None and int(target[1], 16) < at:
            body = [n for a, n, _ in code if int(target[1], 16) <= a <= at and n != "NOP"]
            if any("MMA" in n for n in body):
                loops.append(len(body))
    return min(loops)


def main() -> None:
    print("| weights | activations | tile | instructions per weight | memory over instructions |")
    print("|---" * 5 + "|")
    for kind in compile_products._TYPES:
        weight = packing.empty(kind, compile_products._ROWS, compile_products._COLS, torch.device("meta"))
        types = [torch.bfloat16]
        types += [torch.int8] if not kind.floating else [torch.float8_e4m3fn] if kind.bits == 8 else []
        for dtype in types:
            compile_kernels._launched.clear()
            compile_products._launch(weight, 1, dtype, False)
            kernel, source, options = next(iter(compile_kernels._launched.values()))
            compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
            tile = products.candidate_tiles(1, weight.rows, weight.cols, kind, compile_products._SMS)[0]
            constants = {kernel.arg_names[key[0]]: value for key, value in source.constants.items()}
            weights = constants["BLOCK_N"] * constants["BLOCK_K"]
            each = inner_loop(compiled.asm["cubin"]) * 32 * tile.num_warps / weights
            memory = weight.nbytes / (weight.rows * weight.cols) / _BYTES_PER_SECOND
            share = memory / (each / _LANES_PER_SECOND)
            name = str(dtype).removeprefix("torch.").removesuffix("_e4m3fn")
            shape = f"{tile.rows} x {tile.cols}, {tile.num_warps} warps"
            print(f"| `{kind}` | {name} | {shape} | {each:.2f} | {share:.2f} |", flush=True)


if __name__ == "__main__":
    main()
