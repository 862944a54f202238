"""The paged KV cache of a layer on the device, and the codes of int8 and FP8 caches.

What codes and scales mean is ``_scaled_tokens`` and ``_cached`` of :mod:`pelton.graph.ops`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .common import INTERPRETED_CONSTEXPR, from_e4m3

#: Element types of codes that have scales; uint8: FP8 E4M3.
SCALED = (torch.int8, torch.uint8)


class Cache(NamedTuple):
    """Blocks of tokens.

    memory: uint8 [blocks, bytes], contiguous; the others are views of it, first all codes of a block, then its scales.
    codes: floats, or a type of ``SCALED``, [blocks, 2 (keys, values), kv_heads, block_size, head_dim]; a block's are
    contiguous. scales: float32 [blocks, 2, kv_heads, block_size], likewise; None for floats, which mean themselves.
    """

    memory: torch.Tensor
    codes: torch.Tensor
    scales: torch.Tensor | None

    @classmethod
    def zeros(
        cls, dtype: torch.dtype, num_blocks: int, kv_heads: int, block_size: int, head_dim: int, device: torch.device
    ) -> Cache:
        tokens = 2 * kv_heads * block_size  # and heads, in a block
        split = tokens * head_dim * dtype.itemsize
        size = split + (4 * tokens if dtype in SCALED else 0)
        memory = torch.zeros(num_blocks, size, dtype=torch.uint8, device=device)
        codes = memory[:, :split].view(dtype).unflatten(1, (2, kv_heads, block_size, head_dim))
        scales = memory[:, split:].view(torch.float32).unflatten(1, (2, kv_heads, block_size)) if size > split else None
        return cls(memory, codes, scales)


#: PTX: four codes in $2 become two pairs of numbers in $0 and $1. Nothing in it needs more than Ampere.
#: A byte of int8 with 0x43 before it is bfloat16's 128 + its lower 7 bits, without the top bit. Minus 128, or 256.
_INT8_BF16: tl.constexpr = tl.constexpr("""{
    .reg .b32 a, b, c, d, one;
    mov.b32 one, 0x3F803F80;
    prmt.b32 a, $2, 0x43434343, 0x4140;
    prmt.b32 b, $2, 0x43434343, 0x4342;
    lop3.b32 c, a, 0xFF80FF80, 0x80008000, 0x6A;
    lop3.b32 d, b, 0xFF80FF80, 0x80008000, 0x6A;
    and.b32 a, a, 0xFF7FFF7F;
    and.b32 b, b, 0xFF7FFF7F;
    fma.rn.bf16x2 $0, a, one, c;
    fma.rn.bf16x2 $1, b, one, d;
}""")
#: int8 + 128, with 0x64 before it, is float16's 1024 + 128 + the code.
_INT8_F16: tl.constexpr = tl.constexpr("""{
    .reg .b32 a, b, c, offset;
    mov.b32 offset, 0xE480E480;
    xor.b32 a, $2, 0x80808080;
    prmt.b32 b, a, 0x64646464, 0x4140;
    prmt.b32 c, a, 0x64646464, 0x4342;
    add.rn.f16x2 $0, b, offset;
    add.rn.f16x2 $1, c, offset;
}""")
#: As ``from_e4m3``: bits of the exponent where those of bfloat16 are stand for 2**-120 of the value, subnormal or not.
_FP8_BF16: tl.constexpr = tl.constexpr("""{
    .reg .b32 a, b, c, d, factor, zero;
    mov.b32 factor, 0x7B807B80;
    mov.b32 zero, 0x80008000;
    prmt.b32 a, $2, 0, 0x1404;
    prmt.b32 b, $2, 0, 0x3424;
    shr.b32 c, a, 4;
    shr.b32 d, b, 4;
    and.b32 c, c, 0x07F007F0;
    and.b32 d, d, 0x07F007F0;
    lop3.b32 a, a, 0x80008000, c, 0xEA;
    lop3.b32 b, b, 0x80008000, d, 0xEA;
    fma.rn.bf16x2 $0, a, factor, zero;
    fma.rn.bf16x2 $1, b, factor, zero;
}""")
_FP8_F16: tl.constexpr = tl.constexpr("""{
    .reg .b32 a, b, c, d, factor;
    mov.b32 factor, 0x5C005C00;
    prmt.b32 a, $2, 0, 0x1404;
    prmt.b32 b, $2, 0, 0x3424;
    shr.b32 c, a, 1;
    shr.b32 d, b, 1;
    and.b32 c, c, 0x3F803F80;
    and.b32 d, d, 0x3F803F80;
    lop3.b32 a, a, 0x80008000, c, 0xEA;
    lop3.b32 b, b, 0x80008000, d, 0xEA;
    mul.rn.f16x2 $0, a, factor;
    mul.rn.f16x2 $1, b, factor;
}""")


@triton.jit
def decode(codes, TYPE: tl.constexpr, FEW_ROWS: tl.constexpr):
    """Codes [rows, columns] as numbers of this type, exact; those of NaN become 480.

    FEW_ROWS: of the product that they go into. Then a thread turns the codes that it has loaded. The compiler would
    rather exchange them for ``tl.dot`` before, byte by byte and in many registers; behind an operand that is not loaded
    it does not. With many rows there are no registers for this.
    """
    integers: tl.constexpr = codes.dtype == tl.int8
    if INTERPRETED_CONSTEXPR or TYPE.is_fp32():
        x = (codes if integers else from_e4m3(codes)).to(tl.float32).to(TYPE)
    else:  # what the compiler makes of that takes twice as many instructions
        unused = codes
        if FEW_ROWS:
            unused = tl.broadcast_to(tl.arange(0, codes.shape[1])[None, :], codes.shape).to(tl.int8)
        if TYPE.is_bf16():
            to_bf16: tl.constexpr = _INT8_BF16 if integers else _FP8_BF16
            x = tl.inline_asm_elementwise(to_bf16, "=r,=r,r,r", [codes, unused], tl.bfloat16, is_pure=True, pack=4)
        else:
            to_f16: tl.constexpr = _INT8_F16 if integers else _FP8_F16
            x = tl.inline_asm_elementwise(to_f16, "=r,=r,r,r", [codes, unused], tl.float16, is_pure=True, pack=4)
    return x
