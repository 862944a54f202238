"""The random numbers of a whole step at once: those of :func:`pelton.engine.sampling.random_bits`."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

UInt64s = npt.NDArray[np.uint64]

# Philox4x64-10 of Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011), as NumPy has it.
_ROUNDS = 10
_LOW = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)
_MULTIPLIERS = np.array([[0xD2E7470EE14C6C93], [0xCA5A826395121157]], np.uint64)
_HALVES = np.stack([_MULTIPLIERS & _LOW, _MULTIPLIERS >> _HALF])[:, None]  # [2 (low, high), 1, 2, 1]
_WEYL = np.array([[0x9E3779B97F4A7C15], [0xBB67AE8584CAA73B]], np.uint64)
_BUMPS = np.arange(_ROUNDS, dtype=np.uint64)[:, None, None] * _WEYL  # what each round adds to the key


def random_bits_of(seeds: UInt64s, steps: UInt64s) -> UInt64s:
    """53 random bits for each request's ``steps[i]``-th output token: uint64 [N], of uint64 [N] and [N].

    The four words of the counter are two pairs, of which a round multiplies the first. Products of 64 bits by
    64 are sums of products of halves.
    """
    n = len(seeds)
    keys = np.repeat(_BUMPS, n, axis=2)
    keys[:, 0] += seeds  # the key's second word is 0
    x, other = np.zeros((2, n), np.uint64), np.zeros((2, n), np.uint64)
    np.add(steps, np.uint64(1), out=x[0])  # NumPy counts before the first number
    other[0] = x[0] == 0
    halves = np.empty((2, 2, n), np.uint64)
    for key in keys:
        np.bitwise_and(x, _LOW, out=halves[0])
        np.right_shift(x, _HALF, out=halves[1])
        (low, middle), (carried, high) = _HALVES * halves  # by the multiplier's half, then by that of x
        low >>= _HALF
        middle += low
        carried += middle & _LOW
        middle >>= _HALF
        carried >>= _HALF
        high += middle
        high += carried
        product = x * _MULTIPLIERS
        x = high[::-1] ^ other
        x ^= key
        other = product[::-1]
    result: UInt64s = x[0] >> np.uint64(11)
    return result
