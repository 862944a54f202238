"""HostSampler against an oracle that sorts the whole vocabulary and is slow and plain."""

import math
from array import array
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pelton.backends.base import SampleSpec, SamplingError
from pelton.config import SamplingParams
from pelton.engine.sampling import HostSampler, uniform, weights

sampler = HostSampler()


def spec_of(params, prompt=(), output=(), seed=0, stop=frozenset(), mask=None):
    return SampleSpec(params, tuple(prompt), list(output), seed, frozenset(stop), mask)


def words_of(allowed, vocab):
    """A mask that allows these tokens."""
    bits = np.zeros(-(-vocab // 32) * 32, bool)
    bits[list(allowed)] = True
    return np.packbits(bits, bitorder="little").view(np.int32)


def oracle_probabilities(row, spec):
    """{token: probability} after everything that changes or filters logits."""
    p = spec.params
    z = [float(v) for v in row]
    output = list(spec.output_token_ids)
    if spec.mask is not None:
        z = [v if (int(spec.mask(())[t // 32]) >> t % 32) & 1 else -math.inf for t, v in enumerate(z)]
    if p.allowed_token_ids is not None:
        z = [v if t in p.allowed_token_ids else -math.inf for t, v in enumerate(z)]
    bad = {w[-1] for w in p.bad_words if list(w[:-1]) == output[len(output) - len(w) + 1 :]}
    early = spec.stop_token_ids if len(output) < p.min_tokens else set()
    for forbidden in (bad, early):
        if any(v > -math.inf for t, v in enumerate(z) if t not in forbidden):
            z = [-math.inf if t in forbidden else v for t, v in enumerate(z)]
    for t, bias in (p.logit_bias or {}).items():
        z[t] += bias
    for t in {*spec.prompt_token_ids, *output}:
        z[t] = z[t] / p.repetition_penalty if z[t] > 0 else z[t] * p.repetition_penalty
    for t in set(output):
        z[t] -= p.frequency_penalty * output.count(t) + p.presence_penalty
    ranked = sorted(range(len(z)), key=lambda t: (-z[t], t))
    if p.temperature == 0:
        return {ranked[0]: 1.0}
    weights = {t: math.exp((z[t] - z[ranked[0]]) / p.temperature) for t in ranked}

    def share(order, least):
        total, mass, prefix = sum(weights[t] for t in order), 0.0, []
        for t in order:
            prefix.append(t)
            mass += weights[t]
            if least < 1.0 and mass >= least * total:
                break
        return prefix

    kept = share(ranked[: p.top_k] if p.top_k > 0 else ranked, p.top_p)
    kept = [t for t in kept if weights[t] >= p.min_p and weights[t] > 0]
    if p.typical_p < 1.0:
        total = sum(weights[t] for t in kept)
        surprise = {t: math.log(total / weights[t]) for t in kept}
        entropy = sum(weights[t] / total * surprise[t] for t in kept)
        # Equal but for rounding is equal.
        kept = share(sorted(kept, key=lambda t: (round(abs(surprise[t] - entropy), 9), t)), p.typical_p)
    total = sum(weights[t] for t in kept)
    return {t: weights[t] / total for t in kept}


# Steps of 1/4 keep every sum exact in float32, so that ties are ties on both sides, and there are many.
logit_rows = st.lists(st.integers(-20, 20), min_size=1, max_size=12).map(lambda v: np.array(v, np.float32) / 4)


@st.composite
def cases(draw):
    row = draw(logit_rows)
    token = st.integers(0, len(row) - 1)
    params = SamplingParams(
        temperature=draw(st.sampled_from([0.0, 0.5, 1.0, 2.0])),
        top_k=draw(st.sampled_from([-1, 0, 1, 2, 3, 50])),
        top_p=draw(st.sampled_from([0.05, 0.313, 0.7, 0.951, 1.0])),
        min_p=draw(st.sampled_from([0.0, 0.0, 0.123, 1.0])),
        repetition_penalty=draw(st.sampled_from([1.0, 2.0, 0.5])),
        presence_penalty=draw(st.sampled_from([0.0, 1.0, -0.5])),
        frequency_penalty=draw(st.sampled_from([0.0, 0.25])),
        typical_p=draw(st.sampled_from([1.0, 1.0, 0.213, 0.913])),
        min_tokens=draw(st.sampled_from([0, 3])),
        logit_bias=draw(st.none() | st.dictionaries(token, st.sampled_from([-100, -0.5, 1, 3.25]), max_size=3)),
        bad_words=draw(st.lists(st.lists(token, min_size=1, max_size=3), max_size=3)),
        allowed_token_ids=draw(st.none() | st.lists(token, min_size=1, max_size=6)),
    )
    mask = draw(st.none() | st.sets(token, min_size=len(row) // 2 + 1))
    if mask is not None and params.allowed_token_ids is not None:
        mask.add(params.allowed_token_ids[0])
    return row, spec_of(
        params,
        draw(st.lists(token, max_size=4)),
        draw(st.lists(token, max_size=4)),
        draw(st.integers(0, 2**64 - 1)),
        draw(st.sets(token, max_size=2)),
        None if mask is None else lambda draft: words_of(mask, len(row)),
    )


@settings(deadline=None, max_examples=600)
@given(cases())
def test_the_sampled_token_is_the_one_that_the_oracle_allows(case):
    row, spec = case
    allowed = oracle_probabilities(row, spec)
    for seed in range(6):
        drawn = replace(spec, seed=seed)
        (token,) = sampler(row[None], [drawn])
        assert token.token_id in allowed
        if len(allowed) == 1:
            assert token.token_id == next(iter(allowed))


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(),
        SamplingParams(temperature=0.6),
        SamplingParams(top_k=5),
        SamplingParams(top_p=0.8),
        SamplingParams(min_p=0.1),
        SamplingParams(temperature=1.7, top_k=9, top_p=0.9, min_p=0.05),
        SamplingParams(repetition_penalty=1.3, presence_penalty=0.7, frequency_penalty=0.4, top_p=0.95),
        SamplingParams(min_tokens=9),
        SamplingParams(typical_p=0.5),
        SamplingParams(temperature=1.4, top_k=12, top_p=0.97, min_p=0.02, typical_p=0.8),
        SamplingParams(logit_bias={1: 2.5, 8: -1.5}, bad_words=[[3, 5, 2], [4], [5, 6]]),
        SamplingParams(allowed_token_ids=[1, 3, 4, 11, 15], top_p=0.9),
    ],
)
def test_the_tokens_are_distributed_as_the_oracle_says(params):
    row = np.random.default_rng(1).standard_normal(16).astype(np.float32) * 2
    output = [3, 3, 5]
    expected = oracle_probabilities(row, spec_of(params, [1, 2], output, 0, {0, 7}))
    draws = 3000
    specs = [spec_of(params, [1, 2], output, seed, {0, 7}) for seed in range(draws)]
    counts = np.zeros(16)
    for token in sampler(np.tile(row, (draws, 1)), specs):
        counts[token.token_id] += 1
    assert set(np.flatnonzero(counts)) <= set(expected)
    chi_square = sum((counts[t] - draws * p) ** 2 / (draws * p) for t, p in expected.items())
    freedom = len(expected) - 1
    # Wilson-Hilferty: the 99.99th percentile (z = 3.72). The seeds are fixed, so this passes or fails for ever.
    bound = freedom * (1 - 2 / (9 * freedom) + 3.72 * math.sqrt(2 / (9 * freedom))) ** 3
    assert chi_square < bound


@pytest.mark.parametrize("spread", [0.0, 0.01, 1.0, 5.0])
@pytest.mark.parametrize("top_p", [0.1, 0.9, 0.999])
def test_top_p_of_a_large_vocabulary_keeps_what_a_full_sort_keeps(spread, top_p):
    row = (np.random.default_rng(2).standard_normal(40_000) * spread).astype(np.float32)
    weights = np.exp(row.astype(np.float64) - row.max())
    ranked = np.argsort(-weights, kind="stable")
    mass = np.cumsum(weights[ranked])
    kept = int(np.searchsorted(mass, top_p * mass[-1])) + 1
    for seed in range(20):
        (token,) = sampler(row[None], [spec_of(SamplingParams(top_p=top_p), seed=seed)])
        assert token.token_id in ranked[:kept]
        # The draw goes through what is kept in the order of ids. Rounding may move a border by two tokens.
        ids = np.sort(ranked[:kept])
        before = weights[ids[: np.searchsorted(ids, token.token_id)]].sum()
        there, slack = uniform(seed, 0) * mass[kept - 1], 2e-6 * mass[-1] + 2 * weights[ranked[kept - 1]]
        assert before - slack <= there <= before + weights[token.token_id] + slack


def test_a_request_draws_the_same_token_whatever_else_is_in_the_batch():
    logits = np.random.default_rng(0).standard_normal((6, 100)).astype(np.float32)
    specs = [spec_of(SamplingParams(temperature=t, top_p=0.9), seed=i) for i, t in enumerate([0, 1, 0, 2, 1, 1])]
    together = sampler(logits, specs)
    for i in range(6):
        assert sampler(logits[i : i + 1], [specs[i]]) == [together[i]]
    order = [4, 2, 5, 0]
    assert sampler(logits[order], [specs[i] for i in order]) == [together[i] for i in order]


def test_the_random_numbers_of_a_request_depend_on_seed_and_step():
    numbers = {uniform(seed, step) for seed in (0, 1, 2**64 - 1) for step in range(50)}
    assert len(numbers) == 150
    assert all(0 <= u < 1 for u in numbers)
    assert uniform(7, 3) == uniform(7, 3)


def test_the_first_of_equal_logits_wins():
    row = np.array([[0.0, 2.0, 2.0, 2.0]], np.float32)
    assert sampler(row, [spec_of(SamplingParams(temperature=0))])[0].token_id == 1
    tokens = {sampler(row, [spec_of(SamplingParams(top_k=2, temperature=5), seed=s)])[0].token_id for s in range(50)}
    assert tokens == {1, 2}


def test_logprobs_are_those_of_the_raw_logits():
    row = np.array([1.0, 3.0, 2.0, -1.0], np.float32)
    params = SamplingParams(temperature=0, logprobs=2, presence_penalty=2.0, frequency_penalty=2.0)
    (token,) = sampler(row[None], [spec_of(params, output=[1])])
    raw = row - np.log(np.exp(row).sum())
    assert token.token_id == 2
    assert token.logprobs == pytest.approx({2: raw[2], 1: raw[1]}, abs=1e-6)
    order = [int(t) for t in np.argsort(-raw)]
    assert {t: p.rank for t, p in token.logprobs.items()} == {t: order.index(t) + 1 for t in token.logprobs}


def test_logprobs_0_gives_the_sampled_token_only():
    (token,) = sampler(np.zeros((1, 4), np.float32), [spec_of(SamplingParams(temperature=0, logprobs=0))])
    assert token.logprobs == pytest.approx({0: math.log(1 / 4)})


def test_the_logits_are_not_changed():
    logits = np.random.default_rng(0).standard_normal((2, 20)).astype(np.float32)
    before = logits.copy()
    params = SamplingParams(repetition_penalty=2.0, presence_penalty=1.0, top_p=0.5, logprobs=3, min_tokens=4)
    sampler(logits, [spec_of(params, [1], [2], stop={3}), spec_of(SamplingParams(temperature=0))])
    assert np.array_equal(logits, before)


def test_forbidding_the_whole_vocabulary_forbids_nothing():
    params = SamplingParams(temperature=0, min_tokens=2)
    (token,) = sampler(np.array([[0.0, 1.0]], np.float32), [spec_of(params, stop={0, 1})])
    assert token.token_id == 1


def test_a_forbidden_logit_is_never_drawn():
    row = np.array([[-np.inf, 0.0, -np.inf]], np.float32)
    for params in (SamplingParams(), SamplingParams(top_k=3), SamplingParams(top_p=0.999999)):
        assert {sampler(row, [spec_of(params, seed=s)])[0].token_id for s in range(20)} == {1}


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_broken_logits_are_an_error_that_names_the_row(bad, temperature):
    logits = np.zeros((3, 5), np.float32)
    logits[1, 3] = bad
    with pytest.raises(RuntimeError, match="row 1 of 3"):
        sampler(logits, [spec_of(SamplingParams(temperature=temperature))] * 3)


def test_a_tiny_temperature_is_greedy_and_a_large_one_is_flat():
    row = np.array([[0.0, 1.0, 60.0]], np.float32)
    assert sampler(row, [spec_of(SamplingParams(temperature=1e-30))])[0].token_id == 2
    specs = [spec_of(SamplingParams(temperature=100.0), seed=s) for s in range(200)]
    assert {t.token_id for t in sampler(np.repeat(row, 200, axis=0), specs)} == {0, 1, 2}


def test_weights_are_powers_to_a_millionth_and_whole_numbers():
    row = np.concatenate([np.linspace(-29, 0, 10_001), [-40, -np.inf, -3e38]]).astype(np.float32)
    _, mass = weights(row, np.float32(0), 1.0)
    exact = np.exp(row[:10_001].astype(np.float64)) * 2**42
    assert np.all(np.abs(mass[:10_001] - exact) <= 1e-6 * exact + 0.5)
    assert mass[10_000] == 2**42
    assert not mass[10_001:].any()


def test_typical_p_leaves_out_the_obvious_first():
    # Entropy 1.69 bits: a surprise of 0.86 bits is nearer to it than one of 2.74. Then 1.92 bits: 2.32 is nearer
    # than 1.32.
    row = np.log(np.array([0.55, 0.15, 0.15, 0.15], np.float32))[None]
    specs = [spec_of(SamplingParams(typical_p=0.4), seed=s) for s in range(200)]
    assert {t.token_id for t in sampler(np.repeat(row, 200, axis=0), specs)} == {0}
    flat = np.log(np.array([0.4, 0.2, 0.2, 0.2], np.float32))[None]
    specs = [spec_of(SamplingParams(typical_p=0.3), seed=s) for s in range(200)]
    assert {t.token_id for t in sampler(np.repeat(flat, 200, axis=0), specs)} == {1, 2}


def test_a_bad_word_is_forbidden_where_it_would_be_completed():
    row = np.array([[0, 1, 2, 3.0]], np.float32)

    def answer(output, words):
        return sampler(row, [spec_of(SamplingParams(temperature=0, bad_words=words), [2, 1], output)])[0].token_id

    assert answer([], [[3]]) == 2
    assert answer([], [[1, 3]]) == 3  # the prompt does not count
    assert answer([1], [[1, 3]]) == 2
    assert answer([2, 1], [[2, 1, 3], [2]]) == 1
    assert answer([1, 1], [[2, 1, 3]]) == 3
    assert answer([], [[0], [1], [2], [3]]) == 3  # nothing would be left
    assert sampler(row, [spec_of(SamplingParams(temperature=0, bad_words=[[1, 3]]))], [[0, 1]])[0].token_id == 2


def test_bias_and_allowed_tokens_decide():
    row = np.array([[0, 1, 2, 3.0]], np.float32)

    def answer(**params):
        return sampler(row, [spec_of(SamplingParams(temperature=0, **params))])[0].token_id

    assert answer(logit_bias={0: 100}) == 0
    assert answer(logit_bias={3: -100, 1: 0.5}) == 2
    assert answer(allowed_token_ids=[0, 1]) == 1
    assert answer(allowed_token_ids=[0, 1], logit_bias={3: 100, 0: 1.5}) == 0  # a bias allows nothing
    # The bias comes before the penalty: (2 + 0.5) / 2 < 3 / 2 < 2 + 0.5.
    specs = [spec_of(SamplingParams(temperature=0, repetition_penalty=2.0, logit_bias={2: 0.5}), [2, 3])]
    assert sampler(row, specs)[0].token_id == 3


def test_a_mask_forbids_all_but_its_tokens_and_sees_the_draft():
    row = np.zeros((1, 40), np.float32)
    asked = []

    def mask(draft):
        asked.append(list(draft))
        return words_of({3, 33} if draft else {39}, 40).view(np.uint32 if draft else np.int32)

    assert sampler(row, [spec_of(SamplingParams(), mask=mask)])[0].token_id == 39
    specs = [spec_of(SamplingParams(), seed=s, mask=mask) for s in range(40)]
    drawn = sampler(np.repeat(row, 40, axis=0), specs, [[7, 8]] * 40)
    assert {t.token_id for t in drawn} == {3, 33}
    assert asked == [[], *[[7, 8]] * 40]
    assert sampler(row, [spec_of(SamplingParams(temperature=0), mask=lambda draft: None)])[0].token_id == 0


@pytest.mark.parametrize(
    ("params", "mask", "message"),
    [
        (SamplingParams(), (), "row 1 of 2 .* no token that its mask and allowed_token_ids leave"),
        (SamplingParams(allowed_token_ids=[2]), (1,), "no token that its mask and allowed_token_ids leave"),
        (SamplingParams(logits_processors=[lambda p, o, r: r * np.float32("nan")]), None, "maximum nan after its own"),
        (SamplingParams(logits_processors=[lambda p, o, r: r - np.float32("inf")]), None, "maximum -inf after its own"),
    ],
)
def test_a_row_without_a_token_names_itself_and_the_reason(params, mask, message):
    specs = [spec_of(SamplingParams()), spec_of(params, mask=None if mask is None else lambda d: words_of(mask, 4))]
    with pytest.raises(SamplingError, match=message) as raised:
        sampler(np.zeros((2, 4), np.float32), specs)
    assert raised.value.row == 1


def test_logits_processors_run_first_in_their_order_and_see_the_history():
    seen = []

    def double(prompt, output, row):
        seen.append((prompt, output))
        prompt.append(9)  # copies: nothing of the request changes
        row *= 2
        return row

    def third(prompt, output, row):
        return np.where(np.arange(len(row)) == 2, row + 3, row).astype(np.float32)

    logits = np.array([[1.0, 4.0, 3.0, 0.0]], np.float32)
    params = SamplingParams(temperature=0, logits_processors=[double, third], bad_words=[[1]], logprobs=0)
    spec = spec_of(params, [1, 2], [3])
    (token,) = sampler(logits, [spec], [[0]])
    assert token.token_id == 2
    assert seen == [([1, 2, 9], [3, 0])]
    assert spec.prompt_token_ids == (1, 2)
    assert logits.tolist() == [[1.0, 4.0, 3.0, 0.0]]
    assert token.logprobs[2] == pytest.approx(3 - math.log(np.exp(logits.astype(np.float64)).sum()), abs=1e-6)


@pytest.mark.parametrize("returned", [None, [1.0, 2.0], np.zeros(3, np.float32), np.zeros(2)])
def test_what_a_logits_processor_returns_is_checked(returned):
    params = SamplingParams(logits_processors=[lambda p, o, r: returned])
    with pytest.raises(TypeError, match="a logits processor returned"):
        sampler(np.zeros((1, 2), np.float32), [spec_of(params)])


@pytest.mark.parametrize(
    ("params", "name"),
    [
        (SamplingParams(logit_bias={4: 1}), "logit_bias names token 4"),
        (SamplingParams(allowed_token_ids=[0, 4]), "allowed_token_ids names token 4"),
        (SamplingParams(bad_words=[[4, 0]]), "bad_words names token 4"),
        (SamplingParams(bad_words=["text"]), "has not been tokenized"),
    ],
)
def test_a_token_that_the_row_does_not_have_is_an_error(params, name):
    with pytest.raises(ValueError, match=name):
        sampler(np.zeros((1, 4), np.float32), [spec_of(params)])


def test_a_draft_is_history():
    rng = np.random.default_rng(3)
    logits = rng.standard_normal((1, 30)).astype(np.float32)
    params = SamplingParams(repetition_penalty=1.5, frequency_penalty=0.5, presence_penalty=0.2, min_tokens=4)
    whole = sampler(logits, [spec_of(params, [1], [2, 2, 5], 7, {0})])
    assert sampler(logits, [spec_of(params, [1], [2], 7, {0})], [[2, 5]]) == whole
    assert sampler(logits, [replace(spec_of(params, [1], [], 7, {0}), output_token_ids=array("i", [2, 2, 5]))]) == whole


def test_logprobs_of_given_tokens():
    logits = np.array([[1.0, 3.0, 2.0], [0.0, 0.0, 5.0]], np.float32)
    first, second = sampler.logprobs(logits, [0, 2], 2)
    raw = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    assert first == pytest.approx({0: raw[0, 0], 1: raw[0, 1], 2: raw[0, 2]}, abs=1e-6)
    assert {t: p.rank for t, p in first.items()} == {0: 3, 1: 1, 2: 2}
    assert second == pytest.approx({2: raw[1, 2], 0: raw[1, 0]}, abs=1e-6)


def test_no_rows_give_no_tokens():
    assert sampler(np.zeros((0, 5), np.float32), []) == []
