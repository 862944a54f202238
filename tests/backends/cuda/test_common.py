"""Conversions of FP8 and FP4 codes, against ``ml_dtypes``: every code, and floats around every one."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import torch
import triton
import triton.language as tl

from pelton.backends.cuda.triton.common import from_e2m1, from_e4m3, to_e4m3
from pelton.graph.quantized import CODE_VALUES
from tests.backends.cuda.device import DEVICE


@triton.jit
def _decode_kernel(out_ptr, codes_ptr, WIDE: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    codes = tl.load(codes_ptr + at)
    values = from_e4m3(codes) if WIDE else from_e2m1(codes)
    tl.store(out_ptr + at, values.to(tl.float32))


@triton.jit
def _encode_kernel(codes_ptr, x_ptr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(codes_ptr + at, to_e4m3(tl.load(x_ptr + at)))


def test_codes_have_their_values() -> None:
    for bits, values in CODE_VALUES.items():
        out = torch.empty(1 << bits, device=DEVICE)
        _decode_kernel[(1,)](out, torch.arange(1 << bits, dtype=torch.uint8, device=DEVICE), bits == 8, 1 << bits)
        finite = np.isfinite(values)
        assert finite.sum() >= len(values) - 2
        np.testing.assert_array_equal(out.cpu().numpy()[finite], values[finite])


def test_floats_become_the_nearest_code_with_ties_to_even() -> None:
    values = CODE_VALUES[8][np.isfinite(CODE_VALUES[8])]
    ties = (np.sort(values)[1:] + np.sort(values)[:-1]) / 2
    points = np.concatenate([values, ties]).astype(np.float32)
    x = np.concatenate([points, np.nextafter(points, np.float32(500)), np.nextafter(points, np.float32(-500))])
    x = x[np.abs(x) <= 448]
    x = np.pad(x, (0, -len(x) % 128))
    codes = torch.empty(len(x), dtype=torch.uint8, device=DEVICE)
    _encode_kernel[(len(x) // 128,)](codes, torch.from_numpy(x).to(DEVICE), 128)
    want = x.astype(ml_dtypes.float8_e4m3fn)
    np.testing.assert_array_equal(codes.cpu().numpy(), want.view(np.uint8))
