"""Profiles of tiny models and of the demo model, and the pictures made of them."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from itertools import pairwise

import pytest

from pelton.backends.base import CallStats, StepProfile
from pelton.bench import flame
from pelton.bench.profile import Part, Phase, as_json, calls_of, path, profile
from pelton.bench.roofline import Peaks
from pelton.build import build
from pelton.config import EngineConfig
from pelton.errors import PeltonError
from pelton.graph.cost import StepShape
from tests.helpers.tiny_models import tiny_checkpoint

PEAKS = Peaks(
    {"read_bandwidth": 50e9, "l3_bandwidth": 100e9, "l2_bandwidth": 200e9, "l1_bandwidth": 400e9, "f32": 1e12},
    (32 << 10, 1 << 20, 16 << 20), 2,
)  # fmt: skip


def built_of(family: str, **config: object):  # type: ignore[no-untyped-def]
    folder, _ = tiny_checkpoint(family)
    return build(EngineConfig(model=str(folder), threads=1, packed_cache=False, **config))  # type: ignore[arg-type]


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "gpt2", "bloom"])
def test_phases_of_a_tiny_model(family: str) -> None:
    built = built_of(family, max_num_seqs=3, max_model_len=64, max_num_batched_tokens=32)
    phases = list(
        profile(
            built, prompt_len=40, contexts=(50, 20), batch_size=3, phases=("prefill", "decode"), seconds=0.0
        )
    )  # fmt: skip
    program = built.plan.program
    built.close()
    assert [(p.kind, p.context, p.num_tokens, p.steps) for p in phases] == [
        ("prefill", 40, 120, 4), ("decode", 20, 3, 1), ("decode", 50, 3, 1),
    ]  # fmt: skip
    for phase in phases:
        assert [c.op for c in phase.calls] == [c.kernel for c in program.calls]
        assert all(c.calls == phase.steps for c in phase.calls)
        assert phase.repeats >= 3 and phase.seconds >= phase.native_seconds > 0
        assert sum(p.seconds for p in phase.by_op()) == pytest.approx(phase.call_seconds)
        assert phase.profiled_seconds == pytest.approx(phase.call_seconds + phase.outside_seconds)
    decode = phases[1]
    flops = StepShape([1] * 3, [21] * 3, 3).evaluate(program.flops)
    assert sum(c.flops for c in decode.calls) == pytest.approx(flops)
    prefill = StepShape([40] * 3, [40] * 3, 3).evaluate(program.flops)  # cut into chunks it costs the same
    assert sum(c.flops for c in phases[0].calls) == pytest.approx(prefill)


def test_calls_sum_to_about_the_step() -> None:
    """On a real model nearly all of a step is in its calls; the best of some, as the machine does other things."""
    built = build(EngineConfig(max_num_seqs=1, max_model_len=128, threads=1))
    (phase,) = profile(built, prompt_len=32, contexts=(32,), batch_size=1, phases=("decode",), seconds=0.2)
    built.close()
    assert 0.8 < phase.call_seconds / phase.profiled_seconds <= 1
    assert phase.outside_seconds >= 0
    products = [c for c in phase.calls if c.op in ("linear", "gated_linear")]
    assert len(products) == 4 * 30 + 1
    assert {p.name for p in phase.by_op() if p.op in ("linear", "gated_linear")} == {
        "qkv_proj", "o_proj", "gate_up_proj", "down_proj", "lm_head",
    }  # fmt: skip
    assert 0 < phase.bound_seconds < phase.profiled_seconds * 3


def test_a_cache_that_is_too_small_is_refused() -> None:
    built = built_of("llama", max_num_seqs=2, max_model_len=64)
    with pytest.raises(PeltonError, match="lower --batch-size"):
        list(profile(built, prompt_len=8, contexts=(4096,), batch_size=2, phases=("decode",)))
    built.close()


def test_the_reference_backend_cannot_be_profiled() -> None:
    built = built_of("llama", device="reference")
    with pytest.raises(PeltonError, match="cannot be profiled"):
        list(profile(built, prompt_len=8, contexts=(8,), batch_size=1, phases=("decode",)))
    built.close()


# What follows from given times


def step(*seconds: float) -> StepProfile:
    names = ("model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj", "lm_head")
    calls = tuple(
        CallStats(n, "linear", s, 1e9, 50e6, 0.0, "f32") for n, s in zip(names, seconds, strict=True)
    )  # fmt: skip
    return StepProfile(1.0, calls)


def example() -> Phase:
    calls = calls_of([[step(0.002, 0.004, 0.010)], [step(0.9, 0.004, 0.012)], [step(0.002, 0.9, 0.011)]], PEAKS)
    return Phase("decode", 1, 512, 1, 1, 3, 0.02, 0.0175, 0.003, calls, PEAKS)


def test_medians_are_of_each_call_by_itself() -> None:
    assert [c.seconds for c in example().calls] == [0.002, 0.004, 0.011]


def test_calls_add_up_over_the_steps_of_a_run() -> None:
    (first, _, last) = calls_of([[step(0.1, 0.2, 0.3), step(0.01, 0.02, 0.03)]], PEAKS)
    assert (first.seconds, last.seconds) == pytest.approx((0.11, 0.33))
    assert (first.calls, first.flops, first.bytes) == (2, 2e9, 100e6)
    assert first.bounds == {"memory": pytest.approx(0.002)}  # 1 ms a step, as long as the FLOPs take


def test_ops_add_up_over_layers_with_the_longest_first() -> None:
    head, down = example().by_op()
    assert (head.name, head.calls) == ("lm_head", 1)
    assert (down.name, down.calls, down.seconds) == ("down_proj", 2, pytest.approx(0.006))
    assert down.roof_fraction == pytest.approx(0.002 / 0.006)  # 1 GFLOP at 1 TFLOP/s each; 50 MB at 50 GB/s as well


def test_trees() -> None:
    single, merged = example().tree(merge=False), example().tree(merge=True)
    assert list(single.children) == ["layers.0", "layers.1", "lm_head"]
    assert [c.name for c in merged.children.values()] == ["layers × 2", "lm_head"]
    assert merged.seconds == single.seconds == pytest.approx(example().call_seconds)
    assert merged.children["layers"].children["mlp"].children["down_proj"].calls == 2


@pytest.mark.parametrize(
    ("name", "single", "merged"),
    [
        ("model.layers.3.mlp.down_proj", ["layers.3", "mlp", "down_proj"], ["layers", "mlp", "down_proj"]),
        ("transformer.h.11.ln_1", ["h.11", "ln_1"], ["h", "ln_1"]),
        ("lm_head", ["lm_head"], ["lm_head"]),
        ("model.norm", ["norm"], ["norm"]),
        ("0.up", ["layers.0", "up"], ["layers", "up"]),
    ],
)
def test_paths(name: str, single: list[str], merged: list[str]) -> None:
    assert path(name, merge=False) == single
    assert path(name, merge=True) == merged


def test_json_of_a_phase() -> None:
    value = as_json(example())
    assert value["call_seconds"] == pytest.approx(0.017) and value["profiled_seconds"] == pytest.approx(0.02)
    assert value["roofline_seconds"] == pytest.approx(0.003)
    assert [op["name"] for op in value["ops"]] == ["lm_head", "down_proj"]  # type: ignore[attr-defined]
    keys = {"name", "op", "calls", "seconds", "bytes", "flops", "gb_per_s", "tflop_per_s", "peak_fraction", "bound_by"}
    assert all(set(call) == keys for call in value["calls"])  # type: ignore[attr-defined]


# Pictures


def cells(text: str) -> list[tuple[str, float, float, float]]:
    """(title, x, y, width) of every cell."""
    root = ET.fromstring(text)
    out = []
    for group in root.iter("{http://www.w3.org/2000/svg}g"):
        rect, title = group.find("{http://www.w3.org/2000/svg}rect"), group.find("{http://www.w3.org/2000/svg}title")
        assert rect is not None and title is not None and title.text
        out.append((title.text, *(float(rect.get(key, "nan")) for key in ("x", "y", "width"))))
    return out


def test_a_picture_is_well_formed_and_to_scale() -> None:
    found = cells(flame.svg("model.gguf", [example()]))
    width = {title.partition(":")[0]: w for title, _, _, w in found}
    whole = flame.PLOT_WIDTH
    assert width["step"] == pytest.approx(whole, abs=1)
    assert width["layers × 2"] == pytest.approx(whole * 6 / 20, abs=1)
    assert width["lm_head"] == pytest.approx(whole * 11 / 20, abs=1)
    assert width["outside calls"] == pytest.approx(whole * 3 / 20, abs=1)
    assert width["layers.1"] == pytest.approx(whole * 4 / 20, abs=1)
    for title, x, _, w in found:
        assert x >= 0 and x + w <= flame.PLOT_WIDTH + 40, title


def test_cells_of_one_row_do_not_overlap() -> None:
    rows: dict[float, list[tuple[float, float]]] = {}
    for _, x, y, width in cells(flame.svg("m", [example()])):
        rows.setdefault(y, []).append((x, x + width))
    for spans in rows.values():
        spans.sort()
        assert all(a[1] <= b[0] + 0.01 for a, b in pairwise(spans))


def test_names_are_escaped() -> None:
    phase = example()
    nasty = Part("<script>&\"'", "linear", 1, 0.01, 1.0, 1.0, {"memory": 0.001})
    phase = Phase("decode", 1, 512, 1, 1, 3, 0.02, 0.0175, 0.003, (nasty,), PEAKS)
    assert any("<script>&\"'" in title for title, *_ in cells(flame.svg("<m>", [phase])))
    assert "<script>" not in flame.html("<m>", [phase])


def test_a_page_is_balanced_and_needs_nothing_from_elsewhere() -> None:
    text = flame.html("model.gguf", [example(), example()])
    void, stack = {"meta", "rect", "stop"}, []

    class Balance(HTMLParser):
        def handle_starttag(self, tag: str, attrs: object) -> None:
            if tag not in void:
                stack.append(tag)

        def handle_endtag(self, tag: str) -> None:
            if tag not in void:
                assert stack.pop() == tag

        def handle_startendtag(self, tag: str, attrs: object) -> None:
            pass

    parser = Balance()
    parser.feed(text)
    parser.close()
    assert stack == []
    assert text.count("<tr>") == 2 * 3  # a head and two ops, for each phase
    assert not re.search(r"(src|href|url)\s*=\s*['\"]?http|@import", text)


def test_colours_go_from_red_to_teal_and_stop_there() -> None:
    assert flame.colour(0) == flame.colour(-1) == "#c93a4b"
    assert flame.colour(1) == flame.colour(7) == "#2a9d8f"
    shades = [flame.colour(i / 20) for i in range(21)]
    assert len(set(shades)) == 21 and all(re.fullmatch("#[0-9a-f]{6}", shade) for shade in shades)
