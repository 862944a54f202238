"""Sampling on the device against the definition, token for token."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.backends.cuda.device import DEVICE

# isort: split
from pelton.backends.base import SampleSpec
from pelton.backends.cuda.philox import random_bits_of
from pelton.backends.cuda.triton.sampling import NUM_WORDS, request_words, sample, sampling_words, scratch_words
from pelton.config import SamplingParams
from pelton.engine.sampling import HostSampler, uniform, weights

ON_GPU = DEVICE.type == "cuda"
EACH = 200 if ON_GPU else 2  # rows per case; the interpreter takes a fifth of a second for each
BLOCK = 128


def words_of(params, seeds, steps):
    bits = random_bits_of(np.array(seeds, np.uint64), np.array(steps, np.uint64))
    return sampling_words([request_words(p) for p in params], bits)


def run(logits, words, block=BLOCK):
    """Tokens, the rows' maxima, and the scratch."""
    rows, vocab = logits.shape
    tokens = torch.full((rows, 2), -1, dtype=torch.int32, device=DEVICE)
    scratch = torch.full((scratch_words(rows, vocab, block),), -7, device=DEVICE)
    sample(tokens, torch.from_numpy(logits).to(DEVICE), torch.from_numpy(words).to(DEVICE), scratch, block=block)
    result = tokens.cpu().numpy()
    return result[:, 0].tolist(), np.ascontiguousarray(result[:, 1]).view(np.float32), scratch.cpu().numpy()


def expected(logits, params, seeds, steps):
    specs = [SampleSpec(p, (), [0] * n, s) for p, s, n in zip(params, seeds, steps, strict=True)]
    return [token.token_id for token in HostSampler()(logits, specs)]


def check(logits, params, seeds, steps=None, block=BLOCK):
    steps = [0] * len(seeds) if steps is None else steps
    tokens, maxima, _ = run(logits, words_of(params, seeds, steps), block)
    assert tokens == expected(logits, params, seeds, steps)
    assert maxima.tolist() == logits.max(axis=1).tolist()


def normal(seed, rows, vocab, spread=1.0):
    return (np.random.default_rng(seed).standard_normal((rows, vocab)) * spread).astype(np.float32)


@pytest.mark.parametrize(
    ("block", "spread", "params"),  # with a spread of 0.3, lists are longer than a small block
    [
        (128, 3.0, SamplingParams()),
        (128, 3.0, SamplingParams(temperature=0.5)),
        (128, 0.3, SamplingParams(top_k=30)),
        (512, 2.0, SamplingParams(top_k=1)),
        (128, 0.3, SamplingParams(top_p=0.9)),
        (512, 3.0, SamplingParams(top_p=0.5)),
        (128, 1.0, SamplingParams(min_p=0.05)),
        (128, 0.3, SamplingParams(typical_p=0.7)),
        (512, 3.0, SamplingParams(typical_p=0.7)),
        (128, 9.0, SamplingParams(temperature=0.3, top_k=200, top_p=0.9999, min_p=1e-5, typical_p=0.95)),
        (128, 0.3, SamplingParams(temperature=1.7, top_k=250, top_p=0.95, min_p=0.01, typical_p=0.5)),
    ],
)
def test_filters_leave_what_the_definition_leaves(block, spread, params):
    check(normal(1, EACH, 300, spread), [params] * EACH, range(EACH), range(EACH), block)


def test_what_top_p_shares_is_what_top_k_left():
    """Also if there are no more tokens that reach a level than top-k leaves, and whatever min-p thinks of them."""
    rows = np.full((4, 200), -3 * math.log(2), np.float32)
    rows[:, [150, 70]] = 0, -1.5 * math.log(2)
    seeds = [seed for seed in range(100) if uniform(seed, 0) < 0.2][:4]  # draw 70 if it is left
    params = [SamplingParams(top_k=2, top_p=0.7), SamplingParams(top_k=50, top_p=0.15, min_p=0.2)] * 2
    check(rows, params, seeds, block=256)


logit = st.integers(-20, 20) | st.sampled_from([0.0, -0.0, -math.inf, 3e38, -3e38, 1e-40, -1e-40])


@st.composite
def rows_of_ties(draw):
    row = np.resize(np.array(draw(st.lists(logit, min_size=1, max_size=40)), np.float32), draw(st.integers(1, 150)))
    row[draw(st.integers(0, len(row) - 1))] = draw(st.integers(0, 5))
    params = SamplingParams(
        temperature=draw(st.sampled_from([0.0, 0.2, 1.0, 30.0])),
        top_k=draw(st.sampled_from([-1, 0, 1, 3, 30, 10**12])),
        top_p=draw(st.sampled_from([1.0, 0.313, 0.9, 1 - 1e-12, 1e-9])),
        min_p=draw(st.sampled_from([0.0, 0.0, 0.123, 1e-12, 1.0])),
        typical_p=draw(st.sampled_from([1.0, 1.0, 0.213, 0.913])),
    )
    return row[None] / np.float32(4), params, draw(st.integers(0, 2**64 - 1))


@settings(deadline=None, max_examples=1000 if ON_GPU else 10, derandomize=True)
@given(rows_of_ties())
def test_equal_logits_rank_by_id(case):
    row, params, seed = case
    check(row, [params], [seed], block=64)


def test_zeros_of_either_sign_are_equal():
    row = np.array([[-1, -0.0, 0.0, -2] * 20, [-1, 0.0, -0.0, -2] * 20], np.float32)
    check(row, [SamplingParams(top_k=1)] * 2, [0, 1])
    check(row, [SamplingParams(temperature=0)] * 2, [0, 1])


def test_borders_are_exact():
    """Two tokens, each with half of the mass, in different chunks."""
    row = np.full((1, 200), -np.inf, np.float32)
    row[:, [3, 150]] = 0
    for params, bits, token in (
        (SamplingParams(), 2**52, 150),
        (SamplingParams(), 2**52 - 1, 3),
        (SamplingParams(min_p=0.5), 2**52, 150),
        (SamplingParams(min_p=0.5), 2**52 - 1, 3),
        (SamplingParams(top_p=0.5), 2**53 - 1, 3),
        (SamplingParams(top_p=math.nextafter(0.5, 1)), 2**53 - 1, 150),
    ):
        words = sampling_words([request_words(params)], np.array([bits], np.uint64))
        assert run(row, words)[0] == [token], (params, bits)


def test_a_batch_may_hold_anything():
    """Greedy rows, sampled ones, broken ones, padding; views with strides of their own."""
    logits = normal(2, 7, 300)
    logits[2, [7, 280]] = logits[2].max() + 1
    logits[3, 250] = np.nan
    logits[4, 3] = np.inf
    logits[5] = -np.inf
    logits[6, 9] = np.copysign(np.nan, -1)
    params = [SamplingParams(top_p=0.8), SamplingParams(), *[SamplingParams(temperature=0)] * 2,
              *[SamplingParams(top_k=3)] * 2]  # fmt: skip
    words = np.zeros((7, NUM_WORDS), np.int32)  # the last is padding
    words[:6] = words_of(params, range(6), range(6))
    wide = torch.full((7, 307), math.nan, device=DEVICE)
    wide[:, :300] = torch.from_numpy(logits)
    flat = torch.full((7 * NUM_WORDS + 3,), -1, dtype=torch.int32, device=DEVICE)
    flat[3:] = torch.from_numpy(words.ravel())
    tokens = torch.full((7, 5), -1, dtype=torch.int32, device=DEVICE)
    scratch = torch.full((scratch_words(9, 300, BLOCK),), -7, device=DEVICE)
    sample(tokens[:, 1:3], wide[:, :300], flat[3:].view(7, NUM_WORDS), scratch, block=BLOCK)
    result = tokens.cpu().numpy()
    assert result[:, 1].tolist() == [*expected(logits[:3], params[:3], range(3), range(3)), 0, 0, 0, 0]
    assert (result[:, [0, 3, 4]] == -1).all()
    maxima = np.ascontiguousarray(result[:, 2]).view(np.float32)
    np.testing.assert_array_equal(maxima, np.max(logits, axis=1))
    assert result[2, 1] == 7


def test_no_rows_are_no_work():
    sample(
        torch.empty(0, 2, dtype=torch.int32), torch.empty(0, 300), torch.empty(0, NUM_WORDS, dtype=torch.int32),
        torch.empty(0, dtype=torch.int64),
    )  # fmt: skip


def test_weights_have_the_bits_of_the_definition():
    """Their sums by chunk, which the second kernel leaves in the scratch; from weight 1 to none, in small steps."""
    vocab, block = 20_000, 1024
    row = np.linspace(-46.0, 0.0, vocab, dtype=np.float32) * np.float32(0.7)
    params = SamplingParams(temperature=0.7)
    _, _, scratch = run(row[None], words_of([params], [0], [0]), block)
    chunks = -(-vocab // block)
    mass = np.zeros(chunks * block, np.int64)
    mass[:vocab] = weights(row, row.max(), params.temperature)[1]
    assert mass.max() == 2**42
    assert (mass[:100] == 0).all()
    assert scratch[chunks : 2 * chunks].tolist() == mass.reshape(chunks, block).sum(axis=1).tolist()


def test_words_of_a_request():
    assert not request_words(SamplingParams(temperature=1e-6, top_k=3, top_p=0.5)).any()
    words = request_words(SamplingParams(temperature=2.0, top_k=10**20, top_p=0.9, min_p=0.3, typical_p=0.7))
    assert words.shape == (NUM_WORDS,)
    assert words[:1].view(np.float32) == np.float32(1.4426950408889634 / 2)
    assert words[1] == 2**31 - 1
    assert words[2:4].view(np.float64) == 0.9
    assert words[4:6].view(np.int64) == math.ceil(0.3 * 2**42)
    assert words[6:8].view(np.float64) == 0.7
    assert request_words(SamplingParams(top_k=-1))[1] == 0
    assert request_words(SamplingParams(min_p=1e-300))[4] == 1
    bits = np.array([2**53 - 1, 5], np.uint64)
    both = sampling_words([words, words], bits)
    assert both[:, 8:].copy().view(np.uint64).ravel().tolist() == bits.tolist()
    assert (both[:, :8] == words[:8]).all()
    assert not words[8:].any()


@pytest.mark.skipif(not ON_GPU, reason="too much for the interpreter")
@pytest.mark.parametrize("spread", [0.05, 1.0, 3.0, 9.0])
def test_a_large_vocabulary(spread):
    logits = normal(3, 48, 128_256, spread)
    params = [
        SamplingParams(temperature=0), SamplingParams(), SamplingParams(top_k=50), SamplingParams(top_p=0.9),
        SamplingParams(temperature=0.6, top_p=0.95, top_k=20), SamplingParams(min_p=0.05),
        SamplingParams(typical_p=0.9), SamplingParams(top_k=30_000, top_p=0.99, min_p=1e-6, typical_p=0.8),
    ] * 6  # fmt: skip
    check(logits, params, range(48), block=4096)
