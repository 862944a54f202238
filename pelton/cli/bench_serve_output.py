"""What ``pelton bench serve`` shows: progress, tables, JSON and the page."""

from __future__ import annotations

import asyncio
import json
import math
import os
import platform
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any

from ..errors import PeltonError

if TYPE_CHECKING:
    from rich.console import Console

    from ..bench.load_client import Record
    from ..bench.mlperf import MlperfResult
    from ..bench.serving import Bench, Load
    from ..bench.slo import FoundRate
    from ..bench.workloads import Workload
    from .bench_serve import Plan

_POINTS = ("mean", "p50", "p90", "p95", "p99")


class Output:
    """Collects what a session measures; :meth:`report` shows it, however the session ended."""

    def __init__(
        self, label: str | None, write_json: Callable[[str], object], write_html: Callable[[str], object] | None
    ) -> None:
        from .roofs import console

        self.found: FoundRate | None = None
        self.mlperf: MlperfResult | None = None
        self._label = label
        self._write_json, self._write_html = write_json, write_html
        self._out = console()
        self._bench: Bench | None = None
        self._working: Any = None
        self._sent = 0

    def begin(self, bench: Bench, workload: Workload, plan: Plan, tokenizer: str) -> None:
        """The server answered: say what is going to be sent."""
        from rich.markup import escape

        from ..bench.workloads import describe

        self._bench, self._workload, self._slo = bench, workload, plan.slo
        self._tokenizer, self._loop = tokenizer, type(asyncio.get_running_loop()).__module__.split(".")[0]
        self._date = datetime.now(timezone.utc).isoformat(timespec="seconds")
        target = bench.target
        loads = plan.loads
        arrivals = loads[0].arrivals
        if plan.scenario is not None:
            come: Any = f"as MLPerf's LoadGen sends them ({plan.scenario})"
        elif plan.find_rate:
            come = "at the rates of a search"
        elif len(loads) > 1 or arrivals is None:
            come = ", ".join(load.label for load in loads)
        else:
            come = arrivals
        self.description = describe(workload, come)
        if math.isfinite(loads[0].duration):
            self.description += f"; for {loads[0].duration:g} s"
        out = self._out
        asked = f"{target.api.model} at {target.client.base_url}, {target.api.endpoint}"
        out.print(f"[bold]serve[/bold]  [dim]{escape(asked)}[/dim]")
        out.print(f"{self.description}\n", soft_wrap=True)
        for note in target.notes:
            out.print(f"note: {note}", style="yellow", markup=False, soft_wrap=True)
        if target.notes:
            out.print()

    @contextmanager
    def working(self) -> Iterator[None]:
        from .roofs import Working

        with Working(None, calm=True) as self._working:
            self._working.at("warming up", 0, 1)
            yield

    def on_record(self, load: Load, total: int, record: Record) -> None:
        if load is not getattr(self, "_load", None):
            self._load, self._sent = load, 0
        self._sent += 1
        self._working.at(load.label, min(self._sent, total), total)

    def document(self) -> dict[str, Any]:
        """Everything, for --json and the page."""
        from .. import __version__
        from ..bench.serving_summary import row

        assert self._bench is not None
        bench, target = self._bench, self._bench.target
        document: dict[str, Any] = {
            "benchmark": "serve",
            "schema": 1,
            "label": self._label or target.api.model,
            "date": self._date,
            "pelton": __version__,
            "description": self.description,
            "target": {
                "base_url": target.client.base_url,
                "endpoint": target.api.endpoint,
                "model": target.api.model,
                "optional_fields": sorted(target.api.sent),
                "extra_body": dict(target.api.extra_body),
            },
            "client": {
                "system": f"{platform.system()} {platform.machine()}",
                "cores": os.cpu_count(),
                "python": platform.python_version(),
                "event_loop": self._loop,
                "tokenizer": self._tokenizer,
            },
            "workload": dict(self._workload.settings),
            "slo": None if self._slo is None else {**self._slo.limits_ms, "attainment": self._slo.attainment},
            "notes": [*target.notes, *bench.notes()],
            "complete": bench.control.reason is None,
            "runs": [row(measured, self._slo) for measured in bench.measured],
        }
        if self.found is not None:
            document["find_rate"] = self.found.row()
        if self.mlperf is not None:
            document["mlperf"] = self.mlperf.row()
        return document

    def report(self) -> None:
        """Print and write what there is; nothing if nothing was measured."""
        if self._bench is None or not self._bench.measured:
            return
        document = self.document()
        self._write_json(json.dumps(document) + "\n")  # without indents: it has a number for every token
        for note in self._bench.notes():
            self._out.print(f"note: {note}", style="yellow", markup=False, soft_wrap=True)
        print_document(self._out, document)
        if self._write_html is not None:
            from ..bench.serving_report import page

            self._write_html(page([document]))

    def leave(self) -> None:
        """Raises PeltonError or KeyboardInterrupt if the session was stopped."""
        control = self._bench.control if self._bench is not None else None
        if self.mlperf is not None and not self.mlperf.finished:
            # LoadGen's threads run on in C++ and would crash in Python's end.
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(130)
        if control is None or control.reason is None:
            return
        if control.interrupted:
            raise KeyboardInterrupt
        raise PeltonError(control.reason, "what was measured until then is kept")


def print_document(out: Console, document: Mapping[str, Any]) -> None:
    """What went wrong first, then figures: of one load in full, of several a line for each."""
    from ..bench.serving_report import found_text, problems

    for said in problems(document):
        out.print(said, style="red", markup=False, soft_wrap=True)
    errors = Counter[str]()
    for run in document["runs"]:
        errors.update({error["message"]: error["count"] for error in run["errors"]})
    for message, count in errors.most_common(5):
        out.print(f"  {count} × {message}", style="red", soft_wrap=True, markup=False)
    if problems(document):
        out.print()
    runs = document["runs"]
    if len(runs) == 1:
        _print_one(out, runs[0])
    else:
        print_runs(out, [document])
    if document.get("find_rate"):
        out.print(f"[bold]{found_text(document['find_rate'])}[/bold]\n", soft_wrap=True)
    if document.get("mlperf"):
        _print_mlperf(out, document["mlperf"], runs[0])


def _print_one(out: Console, run: Mapping[str, Any]) -> None:
    from ..bench.units import duration, number
    from .bench_report import print_latencies

    table = _table(["", "", ""], dim_last=True, header=False)
    for what, key, remark in (
        ("requests/s", "requests_per_s", f"{run['num_ok']:,} of {run['num_requests']:,} answered in "
         f"{duration(run['seconds'])}"),
        ("output tokens/s", "output_tokens_per_s", f"{run['output_tokens']:,}{_counted(run)}"),
        ("prompt tokens/s", "prompt_tokens_per_s", f"{run['prompt_tokens']:,}{_cached(run)}"),
        ("all tokens/s", "total_tokens_per_s", ""),
    ):  # fmt: skip
        table.add_row(what, f"[bold]{number(run[key])}[/bold]", remark)
    if run["goodput"] is not None:
        good = run["goodput"]
        table.add_row("goodput, requests/s", f"[bold]{number(good['requests_per_s'])}[/bold]", _goodput(good))
    out.print(table)
    out.print()
    print_latencies(out, run, _POINTS)
    lines = (
        [f"{_lengths('prompts', run['input_len'])}; {_lengths('answers', run['output_len'])}"] if run["num_ok"] else []
    )
    if run["short_outputs"]:
        lines.append(f"{run['short_outputs']} answers are shorter than max_tokens")
    flying = run["in_flight"]
    lines.append(f"{flying['mean']:.1f} requests on their way on average, {flying['max']} at most")
    lines += [_client(run["client"])]
    out.print("[dim]" + "\n".join(lines) + "[/dim]\n", soft_wrap=True)
    if run["server"]:
        table = _table(["the server's /metrics", ""])
        for key, value in run["server"].items():
            table.add_row(key.replace("_", " "), f"{value:.1%}" if _is_share(key) else number(value))
        out.print(table)
        out.print()


def _is_share(key: str) -> bool:
    return key.endswith("_rate") or key.rpartition("_")[0] in ("kv_use", "mbu", "mfu", "cache_hit_rate")


def _counted(run: Mapping[str, Any]) -> str:
    if set(run["counted_by"]) <= {"usage"}:
        return ""
    return ", counted by the local tokenizer" if "tokenizer" in run["counted_by"] else ", counted by chunks"


def _cached(run: Mapping[str, Any]) -> str:
    return f", {run['cached_tokens']:,} of them cached" if run["cached_tokens"] else ""


def _goodput(good: Mapping[str, Any]) -> str:
    limits = ", ".join(f"{name.upper()} ≤ {limit:g} ms" for name, limit in good["slo_ms"].items())
    if good["attainment"] is None:
        return limits
    low, high = good["interval_95"]
    verdict = "meets" if good["passes"] else "misses"
    return (f"{good['met']} of {good['judged']} meet {limits}: {good['attainment']:.1%} ({low:.1%} to {high:.1%}), "
            f"{verdict} {good['needed_attainment']:.4g}")  # fmt: skip


def _lengths(what: str, lengths: Mapping[str, Any]) -> str:
    if lengths["min"] == lengths["max"]:
        return f"{what} of {lengths['min']:,} tokens"
    return f"{what} of {lengths['min']:,} to {lengths['max']:,} tokens, p50 {lengths['p50']:,.0f}"


def _client(client: Mapping[str, Any]) -> str:
    text = f"this client: {client['cpu_share']:.0%} of a core"
    lag, loop = client["lag_ms"], client["loop_lag_ms"]
    if lag["p99"] is not None:
        text += f", sent {lag['p99']:.2f} ms late at p99 and {lag['max']:.2f} at most"
    if loop["p99"] is not None:
        text += f", event loop {loop['p99']:.2f} ms late at p99 and {loop['max']:.2f} at most"
    return text


def print_runs(out: Console, documents: Sequence[Mapping[str, Any]]) -> None:
    """A line for each load of each server."""
    from rich.markup import escape

    from ..bench.serving_report import labels, load_label
    from ..bench.units import number
    from .bench_report import milliseconds

    judged = any(run["goodput"] for d in documents for run in d["runs"])
    heads = (["server\n"] if len(documents) > 1 else []) + ["load\n"]
    table = _table([*heads, "ok\n", "req/s\n", "output\ntok/s", "TTFT\np50 ms", "\np99", "TPOT\np50 ms", "\np99",
                    "ITL\np99 ms", "E2E\np99 ms", *(["goodput\nreq/s", "\nmet"] if judged else [])],
                   left=len(heads))  # fmt: skip
    for name, document in zip(labels(documents), documents, strict=True):
        for run in document["runs"]:
            points = ("ttft_ms p50", "ttft_ms p99", "tpot_ms p50", "tpot_ms p99", "itl_ms p99", "e2e_ms p99")
            latencies = [run[key][p] for key, _, p in (point.partition(" ") for point in points)]
            answered = f"{run['num_ok']:,}"
            if run["num_ok"] != run["num_requests"]:
                answered = f"[red]{run['num_ok']:,}/{run['num_requests']:,}[/red]"
            cells = [answered, number(run["requests_per_s"]), f"[bold]{number(run['output_tokens_per_s'])}[/bold]",
                     *map(milliseconds, latencies)]  # fmt: skip
            if judged:
                good = run["goodput"] or {"requests_per_s": None, "attainment": None}
                met = "–" if good["attainment"] is None else f"{good['attainment']:.1%}"
                cells += [milliseconds(good["requests_per_s"]), met]
            table.add_row(*([escape(name)] if len(documents) > 1 else []), load_label(run["load"]), *cells)
    out.print(table)
    out.print()
    lags = [run["client"]["lag_ms"]["p99"] for d in documents for run in d["runs"]]
    cpu = max(run["client"]["cpu_share"] for d in documents for run in d["runs"])
    late = max((lag for lag in lags if lag is not None), default=None)
    text = f"the client used at most {cpu:.0%} of a core"
    text += "" if late is None else f" and sent at most {late:.2f} ms late at p99"
    cached = [(run["cached_tokens"] or 0) / run["prompt_tokens"] for d in documents for run in d["runs"]
              if run["prompt_tokens"]]  # fmt: skip
    if max(cached, default=0.0) > 0:
        text += f"; {min(cached):.0%} to {max(cached):.0%} of the prompt tokens were cached"
    out.print(f"[dim]{text}[/dim]\n")


def _print_mlperf(out: Console, result: Mapping[str, Any], run: Mapping[str, Any]) -> None:
    """The verdict, and LoadGen's percentiles beside ours of the same requests."""
    from .bench_report import milliseconds

    verdict = result["result"] or "no verdict: it was stopped"
    colour = "green" if verdict == "VALID" and run["num_ok"] == run["num_requests"] else "red"
    out.print(f"[bold]MLPerf LoadGen: [{colour}]{verdict}[/{colour}][/bold]")
    if run["num_ok"] != run["num_requests"]:
        out.print("[red]it knows nothing of requests that failed and took them for answered: void[/red]")
    for reason in result["reasons"]:
        out.print(f"[dim]  {reason}[/dim]")
    table = _table(["", "", "LoadGen", "this client"], left=2)
    summary = result["summary"]
    for keys, key, title in ((("Samples per second", "Completed samples per second"), "requests_per_s", "requests/s"),
                             (("Tokens per second", "Completed tokens per second"), "output_tokens_per_s",
                              "output tokens/s")):  # fmt: skip
        rate = next((summary[name] for name in keys if name in summary), None)
        if rate is not None:
            table.add_row(title, "", milliseconds(float(rate)), milliseconds(run[key]))
    for name, key, title in (("first token latency", "ttft_ms", "TTFT, ms"),
                             ("time to output token", "tpot_ms", "TPOT, ms"),
                             ("latency", "e2e_ms", "E2E, ms")):  # fmt: skip
        for point in ("50.00", "90.00", "95.00", "99.00"):
            theirs = summary.get(f"{point} percentile {name} (ns)")
            ours = run[key][f"p{point[:2]}"]
            if theirs is not None:
                table.add_row(title, f"p{point[:2]}", milliseconds(int(theirs) / 1e6), milliseconds(ours))
    if table.row_count:
        out.print(table)
    out.print(f"its own logs: {result['logs']}\n", style="dim", markup=False)


def _table(heads: Sequence[str], *, left: int = 1, dim_last: bool = False, header: bool = True) -> Any:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_header=header, header_style="dim")
    for index, head in enumerate(heads):
        last = dim_last and index == len(heads) - 1
        table.add_column(head, justify="left" if index < left or last else "right", style="dim" if last else "",
                         overflow="fold" if last else "ellipsis")  # fmt: skip
    return table
