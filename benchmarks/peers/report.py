"""Results to Markdown. No I/O."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]
NOISE = 0.05  # of the CPU that others may take before figures stop meaning something


def markdown(results: Mapping[str, Any]) -> str:
    """The tables of a run, in the form that README.md shows."""
    parts = []
    for name, model in results["models"].items():
        parts.append(f"### {model.get('title', name)}\n")
        if model.get("cpu_used_by_others", 0) > NOISE:
            parts.append(
                f"**Other programs took {model['cpu_used_by_others']:.0%} of the CPU meanwhile: not to be quoted.**\n"
            )
        parts.append(_speeds(model))
        ratios = _ratios(model)
        if ratios:
            parts.append("How many times as fast Pelton is with the same weight bits (median of the rounds' ratios):\n")
            parts.append(ratios)
        parts.append(_circumstances(results, model))
        notes = [f"- {v['title']} {v['precision']}: {v['note']}" for v in model["variants"] if v.get("note")]
        if notes:
            parts.append("\n".join(notes) + "\n")
    return "\n".join(parts)


def _circumstances(results: Mapping[str, Any], model: Mapping[str, Any]) -> str:
    """Where, when, with which versions: the lines under the tables."""
    machine, rounds = results.get("machine", {}), results.get("rounds", {})
    lines = []
    if machine:
        lines.append(
            f"{machine.get('cpu', 'CPU')} ({machine.get('isa', '?')}), {results.get('threads')} threads, commit "
            f"{results.get('commit')}{' with changes' if results.get('uncommitted_changes') else ''}, "
            f"{results.get('date')}; medians ± half the range of "
            + ", ".join(f"{count} rounds of {what}" for what, count in rounds.items())
            + "."
        )
    if model.get("peaks"):
        low, high = (f(p["peaks"]["read_bandwidth"] for p in model["peaks"]) / 1e9 for f in (min, max))
        flops = max(p["peaks"].get("bf16", p["peaks"]["f32"]) for p in model["peaks"]) / 1e12
        lines.append(f"Peaks measured in between: {low:.0f} to {high:.0f} GB/s read, {flops:.2f} bf16 TFLOP/s.")
    versions = {v["title"]: v["version"] for v in model["variants"] if v["version"] and v["peer"] != "pelton"}
    if versions:
        lines.append("Versions: " + "; ".join(f"{title} {version}" for title, version in versions.items()) + ".")
    return "\n".join(lines) + "\n" if lines else ""


def columns(model: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(key in a variant's figures, heading), in the order of the workloads."""
    heads = []
    for load in model["workloads"]:
        if load["sequences"] == 1:
            heads.append((f"prefill {load['name']}", f"prefill {load['prompt']:,}"))
    for load in model["workloads"]:
        if load["sequences"] == 1:
            heads.append((f"decode {load['name']}", f"decode at {load['prompt']:,}"))
    heads += [(w["name"], w["name"]) for w in model["workloads"] if w["sequences"] > 1]
    return [*heads, ("first_token", "first token, s"), ("peak_rss", "peak RSS, GiB")]


def _speeds(model: Mapping[str, Any]) -> str:
    heads = columns(model)
    rows = [["engine", "weights", *(h for _, h in heads)]]
    for bits in sorted({v["bits"] for v in model["variants"]}, reverse=True):
        limit = model.get("limits", {}).get(str(bits), {})
        if limit:
            rows.append([f"*limit of this machine, {bits} bits*", "", *(_number(limit.get(k)) for k, _ in heads)])
        for variant in model["variants"]:
            if variant["bits"] != bits:
                continue
            name = [variant["title"], variant["precision"]]
            if "failure" in variant and not variant.get("figures"):
                rows.append([*name, f"not measured: {variant['failure']}", *([""] * (len(heads) - 1))])
                continue
            figures = variant["figures"]
            rows.append([*name, *(_cell(figures.get(k), variant) for k, _ in heads)])
    return table(rows)


def _ratios(model: Mapping[str, Any]) -> str:
    heads = [(k, h) for k, h in columns(model) if k not in ("first_token", "peak_rss")]
    rows = [["engine", "weights", *(h for _, h in heads)]]
    for variant in model["variants"]:
        ratios = variant.get("pelton_is_faster_by")
        if ratios:
            rows.append(
                [variant["title"], f"{variant['precision']} (Pelton {variant['compared_with']})"]
                + [f"{ratios[k]:.2f}×" if ratios.get(k) else "" for k, _ in heads]
            )
    return table(rows) if len(rows) > 1 else ""


def table(rows: Sequence[Sequence[str]]) -> str:
    """The first row is the heading."""
    lines = ["| " + " | ".join(str(c).replace("|", "\\|") for c in row) + " |" for row in rows]
    lines.insert(1, "|" + "---|" * len(rows[0]))
    return "\n".join(lines) + "\n"


def _cell(figure: Mapping[str, Any] | None, variant: Row) -> str:
    if figure is None:
        return f"failed: {variant['failure']}" if "failure" in variant else "–"
    text = _number(figure["median"])
    spread = (figure["max"] - figure["min"]) / 2 / figure["median"] if figure["median"] else 0
    return f"{text} ± {spread:.0%}" if len(figure.get("samples", ())) > 1 else text


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
