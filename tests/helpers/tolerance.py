"""Tolerances derived from the number of roundings, not tuned until tests pass."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

F32_EPS = 2.0**-24  # unit roundoff of float32
BF16_EPS = 2.0**-8  # of bfloat16 (relative error of one rounding to nearest is half of 2**-7)


def dot_tolerance(
    x: npt.NDArray[Any], w: npt.NDArray[Any], terms: int, input_eps: float = 0.0
) -> npt.NDArray[np.float64]:
    """Bound of |computed - exact| for x @ w.T, [M, N].

    A sum of ``terms`` products in any order errs by at most about terms * eps * sum |x||w|; in practice
    errors are random and grow with the square root, so 8 * sqrt(terms) is safe and still sharp.
    ``input_eps`` is the relative rounding of the inputs (bf16 activations), which adds linearly.
    """
    magnitude = np.abs(x).astype(np.float64) @ np.abs(w).astype(np.float64).T
    return (8 * np.sqrt(terms) * F32_EPS + input_eps) * magnitude + 1e-30


def assert_within(actual: npt.NDArray[Any], exact: npt.NDArray[Any], bound: Any) -> None:
    """|actual - exact| <= bound everywhere; names the worst element otherwise."""
    assert actual.shape == exact.shape
    error = np.abs(actual.astype(np.float64) - exact)
    bad = ~(error <= bound)
    if bad.any():
        ratio = np.where(bad, error / np.maximum(bound, 1e-300), 0)
        at = np.unravel_index(np.nanargmax(np.where(np.isnan(ratio), np.inf, ratio)), error.shape)
        raise AssertionError(
            f"{int(bad.sum())} of {error.size} elements off; at {tuple(map(int, at))} got {actual[at]!r}, "
            f"want {exact[at]!r}, error {error[at]:.3e}, bound {np.broadcast_to(bound, error.shape)[at]:.3e}"
        )
