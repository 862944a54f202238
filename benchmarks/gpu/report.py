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
    estimated = all("estimate" in part for part in parts.values())
    lines = [
        "### Pelton on CUDA" + ", an estimate" * estimated,
        "",
        f"{'; '.join(filter(None, (machine.get('device', 'unknown device'), versions)))}; "
        f"{results.get('model', '')}{'' if estimated else ', random weights'}; "
        f"commit {results.get('commit') or 'unknown'}",
        "",
        *([] if estimated else [*_table(("aim", "wanted", "measured"), aims(parts)), ""]),
        *_table(("part", "", "seconds", "date"), [
            (name, _outcome(part), _number(part.get("seconds")), part.get("date", "")) for name, part in parts.items()
        ]),
    ]  # fmt: skip
    for name, part in parts.items():
        writer = _WRITERS.get(name)
        if writer is not None and part.get("rows"):
            lines += ["", f"#### {name}", "", *writer(part, parts)]
        if part.get("no_time_for"):
            lines += ["", f"No time for all or some of: {', '.join(part['no_time_for'])}"]
        if part.get("cut_short"):
            cut = (f"{precision} from {size}" for precision, size in part["cut_short"].items())
            lines += ["", f"Sizes that there was no time for: {', '.join(cut)}"]
        if part.get("earlier"):
            lines += ["", "Of earlier runs: " + ", ".join(f"{p} ({d})" for p, d in part["earlier"].items())]
        for product, why in part.get("no_peaks", {}).items():
            lines += ["", f"No peak of {product}: {why}"]
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
    why = part.get("problem") or part.get("skipped")
    return counts + str(part.get("status", "")) + (f": {why}" if why else "")


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


def _times(value: Any) -> str:
    return "" if value is None else f"{value:.2f} ×"


def _giga(value: Any) -> str:
    return "" if value is None else _number(value / 1e9)


def _tera(value: Any) -> str:
    return "" if value is None else _number(value / 1e12)


def _nats(value: Any) -> str:
    return "" if value is None else f"{value:.3g}"


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


#: Writes the rows of a part; the other parts are there for those that stand beside them.
_Writer = Callable[[Row, Mapping[str, Any]], list[str]]


def _shown(rows: Sequence[Row], columns: _Columns) -> list[str]:
    return _table([head for head, _, _ in columns], [[show(row.get(key)) for _, key, show in columns] for row in rows])


def _columns(*columns: tuple[str, str, Callable[[Any], str]]) -> _Writer:
    return lambda part, parts: _shown(part["rows"], columns)


def _peaks(part: Row, parts: Mapping[str, Any]) -> list[str]:
    def shown(row: Row, key: str) -> str:
        scale, unit = (1e9, "GB/s") if row["unit"] == "bytes/s" else (1e12, "TFLOP/s")
        return f"{row[key] / scale:,.4g} {unit}"

    def weights(row: Row) -> str:
        rate = row.get("weight_bytes_per_s")
        return "" if rate is None else f"{rate / 1e9:,.4g} GB/s"

    rows = [(row["what"], shown(row, "best"), shown(row, "median"), weights(row)) for row in part["rows"]]
    return _table(("what", "best", "median", "weights read"), rows)


def _kernel_times(part: Row, parts: Mapping[str, Any]) -> list[str]:
    lines = []
    for row in part["rows"]:
        lines += [f"{row['step']}: {_number(row['wall_us'])} µs, {_number(row['kernels_us'])} µs in kernels, "
                  f"{_percent(row['busy'])} busy from the first to the last", ""]  # fmt: skip
        lines += _table(("kernel", "calls", "µs", "share"), [
            (f"`{k['kernel']}`", _number(k["calls"]), _number(k["us"]), _percent(k["share"])) for k in row["kernels"]
        ])  # fmt: skip
        lines.append("")
    return lines[:-1]


def _failures(part: Row) -> list[str]:
    return [line for r in part["rows"] if "failure" in r for line in ("", f"{r['precision']}: {r['failure']}")]


def _precisions(part: Row, parts: Mapping[str, Any]) -> list[str]:
    one = [r for r in part["rows"] if r.get("what") == "one"]
    lines = []
    if one:
        lines = [f"One sequence, {one[0]['prompt']} tokens in, {one[0]['output']} out; MBU and MFU of device seconds, "
                 "MFU of the peak of *products*.", ""]  # fmt: skip
        lines += _shown(one, (
            ("precision", "precision", _number), ("products", "product", _number),
            ("GB of weights", "weights", _giga), ("GB per decode step", "step_bytes", _giga), *_LATENCIES,
            ("decode tokens/s", "decode_tokens_per_s", _number), ("to bf16", "decode_tokens_per_s_to_bf16", _times),
            ("MBU decode", "mbu_device", _percent), ("prefill tokens/s", "prefill_tokens_per_s", _number),
            ("to bf16", "prefill_tokens_per_s_to_bf16", _times), ("MFU prefill", "mfu_prefill", _percent),
        ))  # fmt: skip
    batches = [r for r in part["rows"] if r.get("what") == "batch"]
    if batches:
        lines += ["", f"Batches, {batches[0]['prompt']} tokens in, {batches[0]['output']} out: decode tokens/s (to "
                  "bf16), MBU of device seconds", ""]  # fmt: skip
        lines += _grid(batches, "precision", "batch", lambda r: (
            f"{_number(r['decode_tokens_per_s'])} ({_times(r.get('decode_tokens_per_s_to_bf16'))}), "
            f"{_percent(r['mbu_device'])}"
        ))  # fmt: skip
    return [*lines, *_failures(part)]


def _grid(rows: Sequence[Row], down: str, across: str, show: Callable[[Row], str]) -> list[str]:
    names, sizes = (list(dict.fromkeys(r[key] for r in rows)) for key in (down, across))
    cells = {(r[down], r[across]): show(r) for r in rows}
    return _table([down, *map(str, sizes)], [[n, *(cells.get((n, size), "") for size in sizes)] for n in names])


def _budget(part: Row, parts: Mapping[str, Any]) -> list[str]:
    def cell(row: Row) -> str:
        if not row["n"]:
            return "none" if row["missed"] == 1 else "not found"
        n, missed = row["n"], row["missed"]
        sure = missed and missed - n <= max(1, n // 8)  # as far as the search goes
        end = ", full" if row["full"] else "" if sure else f" or more, below {missed}" if missed else " or more"
        ratio = _times(row.get("output_tokens_per_s_to_bf16"))
        return f"{_number(row['output_tokens_per_s'])} ({n}{end}{', ' if ratio else ''}{ratio})"

    lines = [
        "Output tokens/s (requests in flight, to bf16) within so many seconds per response, p99 or, of less than 100, "
        "the longest. Full: no more seats, or no more KV cache.", "",
    ]  # fmt: skip
    rows = [row | {"budget": f"{row['budget']:g} s"} for row in part.get("table", ())]
    return [*lines, *_grid(rows, "precision", "budget", cell), *_failures(part)] if rows else _failures(part)


def _quality(part: Row, parts: Mapping[str, Any]) -> list[str]:
    speeds = {r["precision"]: r for r in _rows(parts, "precisions") if r.get("what") == "one"}
    rows = [
        {"ppl": f"{r['perplexity']:.2f}", "precision": r["precision"],
         **{f"{key}_{name}": of[name] for key in ("kl", "kl_to_bf16") if (of := r.get(key)) for name in of},
         **{key: speeds.get(r["precision"], {}).get(f"{key}_to_bf16") for key in ("decode_tokens_per_s",
                                                                                   "prefill_tokens_per_s")}}
        for r in part["rows"] if "perplexity" in r
    ]  # fmt: skip
    lines = [f"{part.get('model', '')}, {part.get('tokens', '')} tokens of text; KL in nats. Speeds are those of "
             "*precisions*, to bf16, of another model.", ""]  # fmt: skip
    return [*lines, *_shown(rows, (
        ("precision", "precision", _number), ("KL to f32", "kl_mean", _nats), ("±", "kl_error", _nats),
        ("99 %", "kl_p99", _nats), ("same top", "kl_same_top", _percent), ("KL to bf16", "kl_to_bf16_mean", _nats),
        ("perplexity", "ppl", _number), ("decode", "decode_tokens_per_s", _times),
        ("prefill", "prefill_tokens_per_s", _times),
    )), *_failures(part)]  # fmt: skip


def _roofline(part: Row, parts: Mapping[str, Any]) -> list[str]:
    sheet = part.get("estimate")
    if sheet:
        rates = ", ".join(f"{sheet[name] / 1e12:,.0f} TFLOP/s {name}" for name in ("bf16", "fp8", "int8", "f32"))
        lines = [f"**An estimate: nothing was measured, nothing ran.** Times are what the rates of {sheet['device']} "
                 f"allow at most: {sheet['bandwidth'] / 1e12:.2f} TB/s, {rates} "
                 f"({sheet['source']}). Bytes and FLOPs are those that the backend counts; activations count as if "
                 "they came from memory, though a cache may hold them."]  # fmt: skip
    else:
        lines = [f"Between two marks in the stream with nothing between them lie {_number(part.get('mark_us'))} µs, "
                 "which are in every call's time."]  # fmt: skip
    measured: _Columns = () if sheet else (("µs", "us", _number), ("share of roof", "share", _percent))
    for step in dict.fromkeys(row["step"] for row in part.get("steps", ())):
        totals = [row for row in part["steps"] if row["step"] == step]
        rows = [row for row in part["rows"] if row.get("step") == step]
        lines += ["", f"**{step}**", "", *_shown(totals, (
            ("precision", "precision", _number), ("GB", "bytes", _giga), ("TFLOP", "flops", _tera),
            ("µs at the roof", "roof_us", _number), ("tokens/s at the roof", "tokens_per_s", _number),
            ("to bf16", "roof_to_bf16", _times),
            *(() if sheet else (("µs of the step", "step_us", _number), ("sum of calls", "us", _number),
                                ("share of roof", "share", _percent))),
        )), ""]  # fmt: skip
        if sheet:  # all precisions beside each other: MB, µs and what bounds them
            lines += ["Per kernel: MB / µs at the roof, m: of memory, c: of computing", ""]
            lines += _grid(rows, "kernel", "precision", lambda r: (
                f"{_number(r['bytes'] / 1e6)} / {_number(r['roof_us'])} {r['by'][0]}"))  # fmt: skip
        else:
            lines += _shown(rows, (
                ("precision", "precision", _number), ("kernel", "kernel", _number), ("calls", "calls", _number),
                ("products", "precision_of_products", _number), ("GB", "bytes", _giga), ("TFLOP", "flops", _tera),
                ("µs of memory", "memory_us", _number), ("µs of products", "compute_us", _number), *measured,
            ))  # fmt: skip
    return [*lines, *_failures(part)]


_LATENCIES: _Columns = (("TTFT ms", "ttft_ms", _number), ("TPOT ms", "tpot_ms", _number))
_RATE: _Columns = (("output tokens/s", "output_tokens_per_s", _number),)
_WRITERS: Mapping[str, _Writer] = {
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
    "precisions": _precisions,
    "budget": _budget,
    "quality": _quality,
    "roofline": _roofline,
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
