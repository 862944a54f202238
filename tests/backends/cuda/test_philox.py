"""All random numbers of a step at once, against NumPy's generator."""

import numpy as np

from pelton.backends.cuda.philox import random_bits_of
from pelton.engine.sampling import random_bits


def test_the_bits_are_those_of_the_definition():
    rng = np.random.default_rng(0)
    seeds, steps = rng.integers(0, 2**64, (2, 200), np.uint64)
    edges = [0, 1, 2**31, 2**32 - 1, 2**32, 2**63, 2**64 - 1]
    seeds[:49], steps[:49] = np.repeat(np.array(edges, np.uint64), 7), np.tile(np.array(edges, np.uint64), 7)
    bits = random_bits_of(seeds, steps)
    assert bits.dtype == np.uint64
    assert bits.tolist() == [random_bits(int(seed), int(step)) for seed, step in zip(seeds, steps, strict=True)]


def test_a_row_does_not_depend_on_the_others():
    seeds, steps = np.arange(5, dtype=np.uint64), np.arange(3, 8, dtype=np.uint64)
    together = random_bits_of(seeds, steps)
    for i in range(5):
        assert random_bits_of(seeds[i : i + 1], steps[i : i + 1]).tolist() == [together[i]]
    assert random_bits_of(seeds[:0], steps[:0]).shape == (0,)
    assert seeds.tolist() == [0, 1, 2, 3, 4]
    assert steps.tolist() == [3, 4, 5, 6, 7]
