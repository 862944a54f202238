"""Round to nearest with a search for each group's scale that minimizes the squared error.

A handful of scales are tried per group. For integer codes each try is followed by the scale (and minimum)
that fits its codes best, in closed form (least squares). What is stored is never worse than the plain rule,
which makes the largest magnitude the largest code. Packed weights are kept by type: whoever changes what comes
out here raises the version of the packing.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import CheckpointError
from ..graph.quantized import SCALE_ARRAYS, Array, QuantizedArray
from ..graph.types import E4M3, E8M0, I8, U8, GroupQuant

F = npt.NDArray[np.float32]

#: Elements worked on at a time: a few temporaries of them fit a second-level cache.
_CHUNK = 1 << 16
#: Plain scale over scale to try, by bits; 1 comes first. Few bits gain by clipping outliers, 8 bits hardly.
_SHRINK = {2: (1.0, 1.15, 1.3, 1.5), 3: (1.0, 1.1, 1.2, 1.35), 4: (1.0, 0.875, 0.94, 1.07, 1.14, 1.22)}
_SHRINK_MANY_BITS = (1.0, 0.9922, 1.1)
#: Scale over plain scale to try for FP4 and FP8 codes. 6/4 makes the largest magnitude the code 4, whose neighbours
#: are nearer. FP8 has the same relative precision wherever its scale is, and gains little: the largest magnitude
#: becomes another code with few digits, so that rounding twice changes nothing.
_FACTORS = {4: (6 / 4, 0.84, 0.92, 1.12, 1.25), 8: (448 / 384, 448 / 320, 448 / 256)}
_LARGEST = {4: 6.0, 8: 448.0}
#: Code by twice the magnitude of an E2M1 number.
_E2M1 = np.array([0, 1, 2, 3, 4, 0, 5, 0, 6, 0, 0, 0, 7], np.uint8)


@dataclass(frozen=True, slots=True)
class _Rounded:
    """Codes [rows, groups, size], scales and minima as they are stored, and their squared error [rows, groups]."""

    codes: Array
    scale: Array
    minimum: Array | None
    error: F


def quantize(weight: Array, type: GroupQuant, name: str = "a weight", threads: int | None = None) -> QuantizedArray:
    """The value of ``type`` nearest to ``weight`` [rows, cols], of any float type, as far as the search finds it.

    name: for messages. threads: None for the cores this process may use. The result does not depend on them.

    Raises:
        CheckpointError: the weight holds NaN or infinity, or numbers too large for the type's scales.
        ValueError: no rounding to the type is implemented, or the rows are no whole groups.
    """
    rows, cols = weight.shape
    if (
        type.zero_point
        or type.scale in (U8, I8, E8M0)
        or (type.outer is not None and (type.outer or not type.floating))
    ):
        raise ValueError(f"rounding to {type} is not implemented")
    groups = type.groups(cols)
    real: Any = SCALE_ARRAYS[type.scale]
    codes = np.empty((rows, cols), np.uint8)
    scale = np.empty((rows, groups), real)
    minimum = np.empty((rows, groups), real) if type.minimum else None
    outer = np.empty((rows, 1), np.float32) if type.outer is not None else None
    step = max(1, _CHUNK // max(cols, 1))

    def work(start: int) -> None:
        part = slice(start, min(start + step, rows))
        values: F = np.asarray(weight[part], dtype=np.float32)
        if not np.isfinite(values).all():
            raise CheckpointError(f"{name} holds NaN or infinity", "it cannot be quantized: the file may be damaged")
        values = values.reshape(len(values), groups, -1)
        with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
            if outer is not None:
                outer[part] = _row_factor(values)
                best = _floating(values, type, outer[part])
            elif type.floating:
                best = _floating(values, type, None)
            else:
                best = _integers(values, type)
        if not np.isfinite(best.error).all():
            raise CheckpointError(f"{name} holds numbers too large for {type}", "leave out the quantization")
        codes[part] = best.codes.reshape(-1, cols)
        scale[part] = best.scale
        if minimum is not None:
            minimum[part] = best.minimum

    starts = range(0, rows, step)
    workers = threads or (len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    if workers == 1 or len(starts) == 1:
        for start in starts:
            work(start)
    else:
        with ThreadPoolExecutor(workers) as pool:  # NumPy releases the interpreter's lock
            for _ in pool.map(work, starts):
                pass
    return QuantizedArray(codes, scale, minimum, type, outer)


def _sum(a: F, b: F) -> F:
    """The dot product of each group: [rows, groups]."""
    products: F = np.einsum("rgk,rgk->rg", a, b)
    return products


def _better(best: _Rounded, other: _Rounded) -> _Rounded:
    """Group by group, the one with the smaller error; NaN is never smaller."""
    take = other.error < best.error
    if not take.any():
        return best
    return _Rounded(
        np.where(take[:, :, None], other.codes, best.codes),
        np.where(take, other.scale, best.scale),
        None if best.minimum is None or other.minimum is None else np.where(take, other.minimum, best.minimum),
        np.where(take, other.error, best.error),
    )


# ------------------------------------------------------------------ integers


def _integers(values: F, type: GroupQuant) -> _Rounded:
    tries = _SHRINK.get(type.bits, _SHRINK_MANY_BITS)
    fits = _minimum_fits(values, type.bits, tries) if type.minimum else _symmetric_fits(values, type.bits, tries)
    plain = next(fits)
    scale, minimum, gain = next(fits)
    for other_scale, other_minimum, other_gain in fits:
        take = other_gain > gain
        scale = np.where(take, other_scale, scale)
        gain = np.where(take, other_gain, gain)
        if minimum is not None and other_minimum is not None:
            minimum = np.where(take, other_minimum, minimum)
    return _better(_round(values, type, plain[0], plain[1]), _round(values, type, scale, minimum))


def _round(values: F, type: GroupQuant, scale: F, minimum: F | None) -> _Rounded:
    """Nearest codes for scales and minima as they will be stored."""
    real: Any = SCALE_ARRAYS[type.scale]
    kept = scale.astype(real)
    exact = kept.astype(np.float32)[:, :, None]
    kept_minimum = None if minimum is None else minimum.astype(real)
    base: F | np.float32 = -exact * np.float32(type.offset)
    if kept_minimum is not None:
        base = kept_minimum.astype(np.float32)[:, :, None]
    inverse = _inverse(exact)
    codes = np.clip(np.rint((values - base) * inverse), 0, (1 << type.bits) - 1)
    rest = values - (codes * exact + base)
    return _Rounded(codes.astype(np.uint8), kept, kept_minimum, _sum(rest, rest))


def _inverse(scale: F) -> F:
    """1 / scale; 0 for 0 and for subnormal numbers, whose inverse is infinite: such groups become zeros."""
    usable = np.abs(scale) >= np.finfo(np.float32).tiny
    out: F = np.divide(np.float32(1), scale, out=np.zeros_like(scale), where=usable)
    return out


def _symmetric_fits(values: F, bits: int, tries: tuple[float, ...]) -> Iterator[tuple[F, F | None, F]]:
    """The plain scale, then for each try the scale that fits its codes best and what it takes off the error."""
    top = 1 << (bits - 1)
    high, low = values.max(axis=2), values.min(axis=2)
    plain = np.where(high > -low, high, low) / np.float32(-top)  # the extreme value has the code -top
    yield plain, None, plain
    inverse = _inverse(plain)[:, :, None]
    for factor in tries:
        codes = values * (inverse * np.float32(factor))
        np.clip(np.rint(codes, out=codes), -top, top - 1, out=codes)
        norm, product = _sum(codes, codes), _sum(values, codes)
        scale = product * _inverse(norm)
        yield scale, None, scale * product


def _minimum_fits(values: F, bits: int, tries: tuple[float, ...]) -> Iterator[tuple[F, F | None, F]]:
    top, count = np.float32((1 << bits) - 1), np.float32(values.shape[2])
    high, low = values.max(axis=2), values.min(axis=2)
    plain = high / top - low / top
    yield plain, low, plain
    inverse = _inverse(plain)[:, :, None]
    # Around the middle of the group: sums of squares would else lose their digits.
    middle = (low / 2 + high / 2)[:, :, None]
    centred = values - middle
    total = centred.sum(axis=2)
    for factor in tries:
        codes = centred * (inverse * np.float32(factor))
        codes += top / 2
        np.clip(np.rint(codes, out=codes), 0, top, out=codes)
        sums, norm, product = codes.sum(axis=2), _sum(codes, codes), _sum(centred, codes)
        scale = (count * product - sums * total) * _inverse(count * norm - sums * sums)
        minimum = (total - scale * sums) / count
        yield scale, minimum + middle[:, :, 0], minimum * total + scale * product


# ------------------------------------------------------------------ floating codes


def _row_factor(values: F) -> F:
    """[rows, 1]: the factor that makes the largest scale of a row the largest E4M3 number."""
    peak = np.abs(values).max(axis=(1, 2))[:, None] / np.float32(6 * 448)
    return np.where(peak > 0, peak, np.float32(1))


def _floating(values: F, type: GroupQuant, outer: F | None) -> _Rounded:
    plain = np.abs(values).max(axis=2) / np.float32(_LARGEST[type.bits])
    if outer is not None:
        plain = plain / outer

    def tried(kept: Array) -> tuple[F, F, F]:
        """Stored scales -> values over scales, what they round to, the squared error."""
        exact = kept.astype(np.float32)[:, :, None]
        if outer is not None:
            exact = exact * outer[:, :, None]
        rounded = _rounded(values * _inverse(exact), type.bits)
        rest = values - rounded * exact
        return exact, rounded, _sum(rest, rest)

    best = _kept(plain, type)
    error = tried(best)[2]
    for factor in _FACTORS[type.bits]:
        other = _kept(plain * np.float32(factor), type)
        other_error = tried(other)[2]
        take = other_error < error
        best, error = np.where(take, other, best), np.where(take, other_error, error)
    _, rounded, error = tried(best)
    return _Rounded(_codes(rounded, type.bits), best, None, error)


def _kept(scale: F, type: GroupQuant) -> Array:
    """Scales as they are stored."""
    if type.scale == E4M3:
        scale = np.minimum(scale, np.float32(448))  # beyond, the conversion would give NaN
    real: Any = SCALE_ARRAYS[type.scale]
    kept: Array = scale.astype(real)
    return kept


def _rounded(values: F, bits: int) -> F:
    """The nearest FP8 E4M3 or FP4 E2M1 numbers, as float32; what is too large becomes the largest.

    Far quicker than a conversion: Veltkamp's splitting rounds to 4 or 2 digits, the addition of a large number to
    multiples of the smallest subnormal.
    """
    digits, normal = (4, 2.0**-6) if bits == 8 else (2, 1.0)
    out = np.clip(values, -_LARGEST[bits], _LARGEST[bits])
    large = out * np.float32(2 ** (24 - digits) + 1)
    normals = large - (large - out)
    shift = np.float32(1.5 * 2**23 * normal * 2 ** (1 - digits))
    small = np.abs(out) < np.float32(normal)
    out += shift
    out -= shift
    result: F = np.where(small, out, normals)
    return result


def _codes(values: F, bits: int) -> Array:
    """uint8: the codes of numbers that :func:`_rounded` gave."""
    if bits == 8:
        codes: Array = values.astype(SCALE_ARRAYS[E4M3]).view(np.uint8)
        return codes
    doubled = np.abs(values * np.float32(2)).astype(np.uint8)
    fp4: Array = _E2M1[doubled] | (np.signbit(values).astype(np.uint8) << np.uint8(3))
    return fp4
