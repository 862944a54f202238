"""Codes of rows on the device, bit for bit those that the op table gives to keys and values."""

from __future__ import annotations

import math
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
import torch

from pelton.graph import OPS
from pelton.graph.ops import scaled_token
from pelton.graph.types import E4M3, I8
from tests.backends.cuda.device import DEVICE

from pelton.backends.cuda.triton.quantize import Codes, quantize_rows, supports_groups  # isort: skip  behind device

Array = npt.NDArray[Any]
KINDS = [torch.int8, torch.float8_e4m3fn]
_HOST: dict[torch.dtype, Any] = {torch.int8: np.int8, torch.float8_e4m3fn: ml_dtypes.float8_e4m3fn}
_GAP = 85


def empty_codes(rows: int, columns: int, groups: int, kind: torch.dtype) -> Codes:
    """Views of wider tensors."""
    codes = torch.full((rows, columns + 3), _GAP, dtype=torch.uint8, device=DEVICE).view(kind)[:, :columns]
    return Codes(codes, torch.full((groups, rows + 5), float(_GAP), device=DEVICE)[:, :rows])


def host(codes: torch.Tensor) -> Array:
    array: Array = codes.view(torch.uint8).cpu().contiguous().numpy().view(_HOST[codes.dtype])
    return array


def rule(x: Array, groups: int, kind: torch.dtype) -> tuple[Array, Array]:
    """Codes and scales, of shapes as in :class:`Codes`, of float32 [T, columns]: what the op table writes as keys."""
    rows, columns = x.shape
    cache = np.zeros((2, rows, 1, groups), scaled_token(I8 if kind == torch.int8 else E4M3, columns // groups))
    with np.errstate(invalid="ignore"):
        keys = OPS["kv_write"].reference({}, cache, x, x, np.arange(rows))[0, :, 0]
    return keys["codes"].reshape(x.shape), keys["scale"].T


def assert_codes(out: Codes, values: torch.Tensor, slack: Any = 0.0) -> None:
    """Codes and scales follow the rule, and nothing else is written.

    values: float32, what is encoded. slack, broadcast to it: by how much that may be something else where a GPU sums in
    another order. Then a scale may be off by as much, and a code be that of any value between.
    """
    x, (groups, rows) = values.cpu().numpy(), out.scales.shape
    codes, scales = host(out.codes), out.scales.cpu().numpy()
    want_codes, want_scales = rule(x, groups, out.codes.dtype)
    if DEVICE.type == "cpu" or np.all(np.equal(slack, 0)):
        np.testing.assert_array_equal(scales, want_scales)
        np.testing.assert_array_equal(codes.view(np.uint8), want_codes.view(np.uint8))
    else:
        most = 127 if out.codes.dtype == torch.int8 else 448
        slack = np.broadcast_to(slack, x.shape).astype(np.float64)
        moves = slack.reshape(rows, groups, -1).max(axis=2).T / most
        finite = np.isfinite(want_scales)
        assert (np.isinf(scales) == ~finite).all()
        assert (np.abs(scales - want_scales)[finite] <= (moves + 2.0**-23 * want_scales)[finite]).all()
        by_column = np.repeat(np.where(finite & (scales > 0), scales, 1), x.shape[1] // groups, axis=0).T
        keep = np.repeat(finite, x.shape[1] // groups, axis=0).T
        for edge, sign in ((x - slack, 1), (x + slack, -1)):
            units = np.clip(np.where(keep, edge / by_column, 0), -most, most)
            limit = (np.rint(units) if most == 127 else units.astype(np.float32)).astype(codes.dtype)
            assert (sign * (codes.astype(np.float32) - limit.astype(np.float32)) >= 0).all()
    for tensor, width in ((out.codes.view(torch.uint8), x.shape[1]), (out.scales, rows)):
        padded = torch.as_strided(tensor, (len(tensor), tensor.stride(0)), tensor.stride())
        assert bool((padded[:, width:] == _GAP).all())


def awkward(columns: int, dtype: torch.dtype) -> torch.Tensor:
    """Rows of all sizes, ties, zeros of both signs, and what is not finite; a view of a wider tensor."""
    x = np.random.default_rng(columns).normal(size=(10, columns)).astype(np.float32)
    x[1] *= 2.0**-20
    x[2] *= 2.0**-140 if dtype != torch.float16 else 2.0**-20  # subnormal, and so is the scale
    x[3] *= 2.0**120 if dtype != torch.float16 else 2.0**12
    x[4] = np.arange(columns) % 253 * 0.5 - 63
    x[4, ::7] = 127  # int8 ties
    x[5] = np.where(np.arange(columns) % 2, 0.0, -0.0)
    x[6, columns // 2] = np.nan
    x[7, -1] = np.inf
    x[8, 0] = -np.inf
    base = torch.full((10, columns + 11), 1e4)
    base[:, 3 : 3 + columns] = torch.from_numpy(x)
    return base.to(dtype).to(DEVICE)[:, 3 : 3 + columns]


@pytest.mark.filterwarnings("ignore:overflow encountered", "ignore:invalid value encountered")
@pytest.mark.parametrize(
    ("columns", "groups", "dtype"),
    [
        (37, 1, torch.float32), (37, 1, torch.float16), (1, 1, torch.float32), (48, 3, torch.bfloat16),
        (288, 3, torch.float32), (1200, 1, torch.bfloat16), (2048, 8, torch.float16), (16500, 1, torch.float32),
        (33000, 2, torch.bfloat16),
    ],
)  # fmt: skip
@pytest.mark.parametrize("kind", KINDS)
def test_rows_have_the_codes_of_the_rule(kind: torch.dtype, columns: int, groups: int, dtype: torch.dtype) -> None:
    x = awkward(columns, dtype)
    out = empty_codes(len(x), columns, groups, kind)
    quantize_rows(out, x)
    assert_codes(out, x.float())
    assert math.isinf(out.scales[-1, 7]) and not out.codes.float()[7, -columns // groups :].any()


@pytest.mark.parametrize("kind", KINDS)
def test_no_rows(kind: torch.dtype) -> None:
    quantize_rows(empty_codes(0, 37, 1, kind), torch.ones(0, 37, device=DEVICE))


def test_which_groups_other_kernels_can_write() -> None:
    assert all(supports_groups(columns, 1) for columns in (1, 37, 14336))
    assert supports_groups(14336, 112) and supports_groups(48, 3)
    assert not supports_groups(288, 3) and not supports_groups(37, 2)
