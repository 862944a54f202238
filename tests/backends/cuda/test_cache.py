"""KV caches in memory, and all of their codes as numbers of each type that they are multiplied as."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from tests.backends.cuda.device import DEVICE

# isort: split
from pelton.backends.cuda.triton.cache import Cache, decode
from pelton.graph import BF16, E4M3, I8, CacheType
from pelton.graph.quantized import CODE_VALUES


@triton.jit
def _decode_kernel(out_ptr, codes_ptr, FEW_ROWS: tl.constexpr):
    at = tl.arange(0, 4)[:, None] * 64 + tl.arange(0, 64)[None, :]
    tl.store(out_ptr + at, decode(tl.load(codes_ptr + at), out_ptr.dtype.element_ty, FEW_ROWS))


@pytest.mark.parametrize("few_rows", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_all_codes_have_their_values(dtype: torch.dtype, few_rows: bool) -> None:
    codes = torch.randperm(256, generator=torch.Generator().manual_seed(0)).to(torch.uint8)  # in all places of a word
    for kind, values in (
        (torch.int8, np.arange(256).astype(np.int8).astype(np.float32)),
        (torch.uint8, CODE_VALUES[8]),
    ):
        out = torch.empty(256, dtype=dtype, device=DEVICE)
        _decode_kernel[(1,)](out, codes.view(kind).to(DEVICE), few_rows)
        want = np.where(np.isnan(values), np.copysign(np.float32(480), values), values)[codes.numpy()]
        np.testing.assert_array_equal(out.cpu().float().numpy(), want)


def test_a_block_is_one_piece_of_memory() -> None:
    for type, dtype in ((BF16, torch.bfloat16), (I8, torch.int8), (E4M3, torch.uint8)):
        cache = Cache.zeros(dtype, 5, 3, 16, 12, DEVICE)
        assert cache.memory.shape == (5, CacheType(3, 12, type).token_bytes * 16)
        cache.codes[2] = 1
        if cache.scales is not None:
            assert cache.scales.shape == (5, 2, 3, 16)
            cache.scales[2] = 1.0
        rows = cache.memory.cpu().numpy()
        ones = np.ones(2 * 3 * 16 * 12, np.float32)
        kept = torch.from_numpy(ones).to(dtype).view(torch.uint8).numpy()
        scales = np.ones(0 if cache.scales is None else 2 * 3 * 16, np.float32).view(np.uint8)
        np.testing.assert_array_equal(rows[2], np.concatenate([kept, scales]))
        assert not rows[[0, 1, 3, 4]].any()
