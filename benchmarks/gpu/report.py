"""Results for people: what was aimed at, and a table per part."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]
Results = Mapping[str, Any]


def markdown(results: Results) -> str:
    parts: Mapping[str, Any] = results["parts"]
    machine = results["environment"]
    versions = ", ".join(f"{k} {machine[k]}" for k in ("driver", "cuda", "torch", "triton", "python") if machine.get(k))
    lines = [
        "### Pelton on CUDA",
        "",
        f"{machine.get('device', 'unknown device')}; {versions}; {results.get('model', '')}, random weights; "
        f"commit {results.get('commit') or 'unknown'}",
        "",
        *_table(("aim", "wanted", "measured"), aims(parts)),
        "",
        *_table(("part", "", "seconds", "date"), [
            (name, _outcome(part), _number(part.get("seconds")), part.get("date", "")) for name, part in parts.items()
        ]),
    ]  # fmt: skip
    for name, part in parts.items():
        writer = _WRITERS.get(name)
        if writer is not None and part.get("rows"):
            lines += ["", f"#### {name}", "", *writer(part)]
        for peak in part.get("peaks", ())[-1:]:
            lines += ["", "Peaks: " + ", ".join(_peak(k, [p[k] for p in part["peaks"]]) for k in peak)]
        if part.get("error"):
            lines += ["", f"{name}:", "", "```", part["error"][-2000:].strip(), "```"]
    return "\n".join(lines) + "\n"


def aims(parts: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """(what, how much is wanted, what was measured)."""
    one = next((r for r in _rows(parts, "decode") if r["graphs"] and r["async_scheduling"]), None)
    ratios = against_transformers(parts)
    best = max(ratios.values(), default=None)
    checked = [p for p in (parts.get("kernels"), parts.get("checks")) if p and "passed" in p]
    return [
        ("tests and checks", "all pass", ", ".join(
            f"{sum(p[key] for p in checked)} {key}" for key in ("passed", "failed") if checked)),
        ("MBU of decode, one sequence (device seconds)", "≥ 75 %", _percent(one and one["mbu_device"])),
        ("MFU of prefill, one sequence (device seconds)", "≥ 60 %", _percent(one and one["mfu_prefill"])),
        ("device busy in steady decode (kernels, of the time from the first to the last)", "≥ 95 %", ", ".join(
            f"{_percent(row['busy'])} ({row['step']})"
            for row in _rows(parts, "profile") if row["step"].startswith("decode"))),
        ("output tokens/s to transformers, batched", "≥ 5 ×", "" if best is None else ", ".join(
            f"{ratio:.1f} × ({name})" for name, ratio in ratios.items())),
    ]  # fmt: skip


def against_transformers(parts: Mapping[str, Any]) -> dict[str, float]:
    """Ratios of output tokens per second, by batch and for ShareGPT's lengths."""
    ours = {r["batch"]: r for r in _rows(parts, "sweep")}
    inflight = next((r for r in _rows(parts, "inflight") if r["batching"] == "inflight"), None)
    found = {}
    for row in _rows(parts, "transformers"):
        if row["what"] == "sharegpt" and inflight is not None:
            found["ShareGPT"] = inflight["output_tokens_per_s"] / row["output_tokens_per_s"]
        same = ours.get(row.get("batch"))
        if same and "output_tokens_per_s" in row and (same["prompt"], same["output"]) == (row["prompt"], row["output"]):
            found[f"batch {row['batch']}"] = same["output_tokens_per_s"] / row["output_tokens_per_s"]
    return found


def _rows(parts: Mapping[str, Any], name: str) -> Sequence[Row]:
    rows: Sequence[Row] = parts.get(name, {}).get("rows", ())
    return rows


def _outcome(part: Row) -> str:
    counts = f"{part['passed']} passed, {part['failed']} failed; " if "passed" in part else ""
    return counts + str(part.get("status", "")) + (f": {part['problem']}" if part.get("problem") else "")


def _peak(name: str, values: Sequence[float]) -> str:
    scale, unit = (1e9, "GB/s read and written") if name == "bandwidth" else (1e12, f"TFLOP/s {name}")
    return " and ".join(f"{v / scale:,.4g}" for v in values) + f" {unit}"


def _number(value: Any) -> str:
    if value is None:
        return ""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return str(value)
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _percent(value: Any) -> str:
    return "" if value is None else f"{100 * value:.1f} %"


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    return lines + ["| " + " | ".join(str(cell).replace("|", "\\|") for cell in row) + " |" for row in rows]


#: Columns: head, key of a row, how to show it.
_Columns = Sequence[tuple[str, str, Callable[[Any], str]]]
_USE: _Columns = (
    ("device ms/step", "device_ms", _number), ("wall ms/step", "step_ms", _number),
    ("MBU device", "mbu_device", _percent), ("MBU wall", "mbu_wall", _percent),
    ("MFU decode", "mfu_decode", _percent), ("MFU prefill", "mfu_prefill", _percent),
    ("device/wall", "device_to_wall", _percent),
)  # fmt: skip


def _columns(*columns: tuple[str, str, Callable[[Any], str]]) -> Callable[[Row], list[str]]:
    heads = [head for head, _, _ in columns]
    return lambda part: _table(heads, [[show(row.get(key)) for _, key, show in columns] for row in part["rows"]])


def _peaks(part: Row) -> list[str]:
    def shown(row: Row, key: str) -> str:
        scale, unit = (1e9, "GB/s") if row["unit"] == "bytes/s" else (1e12, "TFLOP/s")
        return f"{row[key] / scale:,.4g} {unit}"

    def weights(row: Row) -> str:
        rate = row.get("weight_bytes_per_s")
        return "" if rate is None else f"{rate / 1e9:,.4g} GB/s"

    rows = [(row["what"], shown(row, "best"), shown(row, "median"), weights(row)) for row in part["rows"]]
    return _table(("what", "best", "median", "weights read"), rows)


def _kernel_times(part: Row) -> list[str]:
    lines = []
    for row in part["rows"]:
        lines += [f"{row['step']}: {_number(row['wall_us'])} µs, {_number(row['kernels_us'])} µs in kernels, "
                  f"{_percent(row['busy'])} busy from the first to the last", ""]  # fmt: skip
        lines += _table(("kernel", "calls", "µs", "share"), [
            (f"`{k['kernel']}`", _number(k["calls"]), _number(k["us"]), _percent(k["share"])) for k in row["kernels"]
        ])  # fmt: skip
        lines.append("")
    return lines[:-1]


_LATENCIES: _Columns = (("TTFT ms", "ttft_ms", _number), ("TPOT ms", "tpot_ms", _number))
_RATE: _Columns = (("output tokens/s", "output_tokens_per_s", _number),)
_WRITERS: Mapping[str, Callable[[Row], list[str]]] = {
    "install": _columns(("what", "what", _number), ("seconds", "seconds", _number)),
    "kernels": _columns(("test", "test", _number), ("outcome", "outcome", _number)),
    "checks": _columns(
        ("family", "family", _number), ("check", "check", _number), ("passes", "ok", _number),
        ("tokens", "tokens", _number), ("ties", "ties", _number), ("same as CPU", "same_as_cpu", _number),
        ("error", "rms", _number), ("transformers' error", "transformers_rms", _number), ("largest", "max", _number),
    ),
    "peaks": _peaks,
    "decode": _columns(
        ("CUDA graphs", "graphs", _number), ("decided ahead", "async_scheduling", _number), *_LATENCIES, *_USE
    ),
    "sweep": _columns(
        ("batch", "batch", _number), ("decode tokens/s", "decode_tokens_per_s", _number), *_RATE, *_LATENCIES, *_USE
    ),
    "inflight": _columns(
        ("batching", "batching", _number), *_RATE, ("to static", "to_static", _number),
        ("running", "running_mean", _number), ("TTFT p50 ms", "ttft_p50_ms", _number),
        ("TTFT p99 ms", "ttft_p99_ms", _number), ("ITL p50 ms", "itl_p50_ms", _number),
        ("ITL p99 ms", "itl_p99_ms", _number), ("device/wall of all", "device_to_wall_of_all", _percent),
    ),
    "transformers": _columns(
        ("what", "what", _number), ("batch", "batch", _number), ("prompt", "prompt", _number),
        ("output", "output", _number), *_RATE, *_LATENCIES, ("failure", "failure", _number),
    ),
    "profile": _kernel_times,
}  # fmt: skip
