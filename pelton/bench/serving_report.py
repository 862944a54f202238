"""One page of HTML about loads that were served, of one server or several: nothing is loaded from elsewhere."""

from __future__ import annotations

import html
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import PeltonError
from . import serving_plots as plots
from .units import number

#: Lines of the pictures at most; timelines of a page.
_MOST_SERIES, _MOST_TIMELINES = 12, 8
_CSS = """
:root { color-scheme: light dark; --ink: #1c2430; --dim: #667085; --grid: #e4e7ec; --page: #ffffff; --soft: #f6f7f9;
  --bad: #b42318; --warn: #93370d; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ef; --dim: #98a2b3; --grid: #333b4a; --page: #14181f;
  --soft: #1c222c; --bad: #f97066; --warn: #fdb022; } }
body { margin: 0 auto; max-width: 76rem; padding: 2rem 1.5rem 4rem; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; margin: 0 0 .25rem; } h2 { font-size: 1.1rem; margin: 2.2rem 0 .6rem; }
p { margin: .3rem 0; } .dim { color: var(--dim); } .bad { color: var(--bad); font-weight: 600; }
.warn { color: var(--warn); } .scroll { overflow-x: auto; } svg { width: 100%; height: auto; }
svg text { font-family: system-ui, sans-serif !important; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; white-space: nowrap; font-size: 13px; }
th { color: var(--dim); font-weight: 500; }
th, td { text-align: right; padding: .25rem .5rem; border-bottom: 1px solid var(--grid); }
th.left, td.left { text-align: left; padding-left: 0; }
summary { cursor: pointer; color: var(--dim); } details { margin: .4rem 0; }
"""
_DEFINITIONS = """TTFT: from sending a request, connecting included, to its first token. TPOT: from the first token to
the last, over the number of tokens after the first; one per request. ITL: gaps between chunks, those of all requests
pooled; a chunk of several tokens is one gap. E2E: from sending to the last token. All latencies are of the requests
that were answered to their end; a request that failed meets no SLO."""

Document = Mapping[str, Any]


def read_document(path: str) -> dict[str, Any]:
    """What ``--json`` wrote. Raises PeltonError if the file is something else."""
    try:
        found = json.loads(Path(path).read_bytes())
    except OSError as error:
        raise PeltonError(f"cannot read {path} ({error.strerror})", "give files of pelton bench serve --json") from None
    except ValueError:
        found = None
    if not isinstance(found, dict) or found.get("benchmark") != "serve" or not isinstance(found.get("runs"), list):
        raise PeltonError(f"{path} is no result of a served load", "give files of pelton bench serve --json")
    return found


def check_plots() -> None:
    """Raises PeltonError if pages could not be made."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise PeltonError("reports need matplotlib", "pip install matplotlib (or 'pelton[bench]')") from None


def load_label(load: Mapping[str, Any]) -> str:
    """load: its row in a document."""
    if load["kind"] == "mlperf":
        return f"MLPerf {load['scenario']}"
    if load["kind"] == "closed":
        return f"{load['max_concurrency']} at a time"
    return "all at once" if load["request_rate"] is None else f"{load['request_rate']:.4g}/s"


def problems(document: Document) -> list[str]:
    """What is wrong with the results, the worst first: failures, an early end, a client that was too slow."""
    said = []
    for run in document["runs"]:
        where = f"{load_label(run['load'])}: " if len(document["runs"]) > 1 else ""
        if not run["complete"]:
            said.append(f"{where}the run ended early: {run['stopped']}")
        count = sum(run["failed"].values())
        if count:
            kinds = ", ".join(f"{n} {kind}" for kind, n in run["failed"].items())
            said.append(f"{where}{count} of {run['num_requests']} requests failed ({kinds}); latencies leave them out")
        if run["client"]["is_bottleneck"]:
            why = "; ".join(run["client"]["bottleneck"])
            said.append(f"{where}the client could not keep time, so figures are doubtful: {why}")
    return said


def page(documents: Sequence[Document]) -> str:
    """The whole report. documents: as :func:`read_document` returns them, or as they are to be written."""
    names = labels(documents)
    title = names[0] if len(documents) == 1 else " vs ".join(names)
    first = documents[0]
    parts = [f"<h1>{_text(title)}</h1>", f'<p class="dim">{_text(_about(first))}</p>']
    for name, document in zip(names, documents, strict=True):
        prefix = f"{name}: " if len(documents) > 1 else ""
        parts += [f'<p class="bad">{_text(prefix + said)}</p>' for said in problems(document)]
        parts += [f'<p class="warn">{_text(prefix + note)}</p>' for note in document["notes"]]
    parts.append(_found(names, documents))
    parts.append(_table(names, documents))
    parts += _pictures(names, documents)
    parts.append(_server_table(names, documents))
    parts.append(f'<h2>Definitions</h2><p class="dim">{_text(_DEFINITIONS)}</p>')
    for name, document in zip(names, documents, strict=True):
        about = {k: v for k, v in document.items() if k not in ("runs", "notes", "find_rate", "mlperf")}
        pretty = json.dumps(about, indent=1)
        parts.append(f"<details><summary>Settings of {_text(name)}</summary><pre>{_text(pretty)}</pre></details>")
    body = "\n".join(part for part in parts if part)
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport" '
        f'content="width=device-width, initial-scale=1"><title>{_text(title)}</title><style>{_CSS}</style></head>'
        f"<body>\n{body}\n</body></html>\n"
    )


def labels(documents: Sequence[Document]) -> list[str]:
    """What the servers are called; of equal names the later ones get numbers."""
    given = [str(document["label"]) for document in documents]
    return [
        name if given.index(name) == i else f"{name} ({given[: i + 1].count(name)})" for i, name in enumerate(given)
    ]


def _about(document: Document) -> str:
    target = document["target"]
    where = f"{target['model']} at {target['base_url']}, {target['endpoint']}"
    return f"{where}; {document['description']}; {document['date']}"


def _text(text: str) -> str:
    return html.escape(text)


def _cell(value: float | None, percent: bool = False) -> str:
    if value is None:
        return "–"
    return f"{value:.1%}" if percent else number(value)


def _table(names: Sequence[str], documents: Sequence[Document]) -> str:
    heads = ["requests/s", "output tok/s", "TTFT p50", "p95", "p99", "TPOT p50", "p95", "p99", "ITL p99", "E2E p50",
             "p99"]  # fmt: skip
    judged = any(run["goodput"] for d in documents for run in d["runs"])
    heads += ["goodput/s", "meet the SLO"] if judged else []
    lines = []
    for name, document in zip(names, documents, strict=True):
        for run in document["runs"]:
            cells = [_cell(run["requests_per_s"]), _cell(run["output_tokens_per_s"])]
            for key, points in (("ttft_ms", ("p50", "p95", "p99")), ("tpot_ms", ("p50", "p95", "p99")),
                                ("itl_ms", ("p99",)), ("e2e_ms", ("p50", "p99"))):  # fmt: skip
                cells += [_cell(run[key][p]) for p in points]
            if judged:
                good = run["goodput"] or {}
                cells += [_cell(good.get("requests_per_s")), _cell(good.get("attainment"), percent=True)]
            left = ([name] if len(documents) > 1 else []) + [load_label(run["load"])]
            lines.append((left, [f"{run['num_ok']} of {run['num_requests']}", *cells]))
    left_heads = (["server"] if len(documents) > 1 else []) + ["load"]
    return f"<h2>Figures</h2>{_rows(left_heads, ['answered', *heads], lines)}<p class='dim'>Latencies in ms.</p>"


def _rows(left: Sequence[str], right: Sequence[str], lines: Iterable[tuple[Sequence[str], Sequence[str]]]) -> str:
    head = "".join(f'<th class="left">{_text(h)}</th>' for h in left) + "".join(f"<th>{_text(h)}</th>" for h in right)
    body = "".join(
        "<tr>" + "".join(f'<td class="left">{_text(c)}</td>' for c in lefts)
        + "".join(f"<td>{_text(c)}</td>" for c in rights) + "</tr>" for lefts, rights in lines
    )  # fmt: skip
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _found(names: Sequence[str], documents: Sequence[Document]) -> str:
    said = []
    for name, document in zip(names, documents, strict=True):
        if document.get("find_rate"):
            said.append(f"<p><b>{_text(name)}</b>: {_text(found_text(document['find_rate']))}</p>")
        if document.get("mlperf"):
            result = document["mlperf"]
            said.append(f"<p><b>{_text(name)}</b>: MLPerf LoadGen says {_text(str(result['result']))}</p>")
    return "".join(said)


def found_text(found: Mapping[str, Any]) -> str:
    """The answer of --find-rate in a sentence, with how sure it is."""
    highest, failed = found["highest_rate"], found["lowest_failed_rate"]
    if highest is None:
        return f"no rate met the SLO down to {failed:.4g} requests/s" if failed else "no run was complete"
    text = f"the SLO is met at up to {highest:.4g} requests/s"
    text += f" and missed at {failed:.4g}" if failed is not None else ", the highest that was tried: there may be more"
    best = next(t for t in found["trials"] if t["rate"] == highest and t["passes"])
    low, high = best["interval_95"]
    text += f"; there {best['met']} of {best['total']} requests met it, 95 % interval {low:.1%} to {high:.1%}"
    if best["verdict"] != "sure":
        text += f", which includes less than {found['needed_attainment']:.1%}: more --num-prompts would make it sure"
    return text


def _pictures(names: Sequence[str], documents: Sequence[Document]) -> list[str]:
    shown = [(name, [run for run in d["runs"] if run["num_ok"]]) for name, d in zip(names, documents, strict=True)]
    parts = []
    if sum(len(runs) for _, runs in shown) > 1:
        ordered = [(name, sorted(runs, key=_intensity)) for name, runs in shown if runs]
        series = [(name, runs, [_mark(run) for run in runs]) for name, runs in ordered]
        parts.append(f"<h2>Latency against throughput</h2>{plots.curves(series)}")
    judged = [(name, [r for r in runs if r["goodput"] and r["load"].get("request_rate")]) for name, runs in shown]
    if any(len(runs) > 1 for _, runs in judged):
        needed = next(runs[0]["goodput"]["needed_attainment"] for _, runs in judged if runs)
        parts.append(f"<h2>Goodput</h2>{plots.attainment([each for each in judged if each[1]], needed)}")
    every = [(f"{name}, {load_label(run['load'])}" if len(documents) > 1 else load_label(run["load"]), run)
             for name, runs in shown for run in runs]  # fmt: skip
    if every:
        parts.append(f"<h2>Distributions</h2>{plots.distributions(every[:_MOST_SERIES])}")
        parts.append("<h2>Requests over time</h2>")
    for index, (name, run) in enumerate(every[:_MOST_TIMELINES]):
        is_open = " open" if index == 0 else ""
        parts.append(f"<details{is_open}><summary>{_text(name)}</summary>{plots.timeline(run)}</details>")
    return parts


def _intensity(run: Mapping[str, Any]) -> float:
    load = run["load"]
    return float(load.get("max_concurrency") or load.get("request_rate") or "inf")


def _mark(run: Mapping[str, Any]) -> str:
    load = run["load"]
    return str(load["max_concurrency"]) if load["kind"] == "closed" else load_label(load)


def _server_table(names: Sequence[str], documents: Sequence[Document]) -> str:
    lines = []
    for name, document in zip(names, documents, strict=True):
        for run in document["runs"]:
            lines += [([name, load_label(run["load"]), key.replace("_", " ")], [number(value)])
                      for key, value in (run["server"] or {}).items()]  # fmt: skip
    if not lines:
        return ""
    table = _rows(["server", "load", "figure"], [""], lines)
    return f"<h2>What the servers say of themselves</h2><details><summary>/metrics</summary>{table}</details>"
