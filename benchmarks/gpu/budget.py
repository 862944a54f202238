"""Throughput where every response must come within a given time: how many requests may be in flight, and what they get.

A closed loop: n requests are in flight at any time, each that ends makes room for the next. The first n, which come all
at once, do not count; the next n do (or a few more, if n is small), and the loop goes on until the last of them has
ended. A response's time is that from its arrival to its last token. n is met by a limit if the 99th percentile of
these times is, of less than 100 requests the longest. The largest n is searched by doubling and then halving the
interval, to an eighth; every measurement serves all limits.

    python -m benchmarks.gpu.budget FILE.json        draws the curve of a result again, where there is matplotlib
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .decode import replayed, requests
from .model import loaded
from .part import Part, Row
from .precision import Precision, each, with_ratios

if TYPE_CHECKING:
    from pelton.engine.engine import LLMEngine
    from pelton.metrics import RequestMetrics

#: From so many requests on, the 99th percentile counts.
_MANY = 100
#: Different prompts.
_PROMPTS = 16


# ---------------------------------------------------------------------- the search


def next_size(worst: Mapping[int, float], budgets: Iterable[float], most: int) -> int | None:
    """The number of requests to try next; None if nothing is left to learn.

    worst: seconds that count, by numbers that were tried, infinite for those that took too long for every budget.
    """
    budgets = sorted(budgets)
    if not worst:
        return 1
    largest = max(worst)
    if worst[largest] <= budgets[-1] and largest < most:
        return min(2 * largest, most)
    for budget in reversed(budgets):  # the largest throughput first, if time should run out
        low, high = bracket(worst, budget)
        if low and high is not None and high - low > max(1, low // 8):
            return (low + high) // 2
    return None


def bracket(worst: Mapping[int, float], budget: float) -> tuple[int, int | None]:
    """(largest number that meets the budget or 0, the next larger that was tried and does not or None)."""
    low = max((n for n, seconds in worst.items() if seconds <= budget), default=0)
    return low, min((n for n, seconds in worst.items() if n > low), default=None)


# ---------------------------------------------------------------------- a closed loop


@dataclass
class Loop:
    """What was measured of n requests in flight. seconds: from the arrival of the first request that counts to the end
    of the last. tokens: of all requests in that time. too_long: it was given up, as no budget can be met."""

    n: int
    requests: list[RequestMetrics]
    seconds: float
    tokens: int
    too_long: bool = False

    @property
    def times(self) -> list[float]:
        return [r.e2e for r in self.requests if r.e2e is not None]

    @property
    def worst(self) -> float:
        from pelton.metrics import percentile

        if self.too_long:
            return math.inf
        return percentile(self.times, 99) if len(self.times) >= _MANY else max(self.times)


def closed_loop(
    engine: LLMEngine, asked: Sequence[Any], n: int, least: int, longest: float, check: Callable[[], None],
    clock: Callable[[], float] = time.monotonic,
) -> Loop:  # fmt: skip
    """Keep n requests in flight, until max(n, least) of them behind the first n have ended. longest: seconds; once more
    requests took longer than a 99th percentile leaves out, it is given up."""
    count = max(n, least)
    due = range(n, n + count)  # the numbers of those that count
    arrivals: dict[int, float] = {}  # of those in flight that count
    done: list[RequestMetrics] = []
    spared = count // 100 if count >= _MANY else 0
    started, late, tokens, begin = 0, 0, 0, clock()

    def start() -> None:
        nonlocal started, begin
        request = asked[started % len(asked)]
        engine.add_request(str(started), request.prompt_token_ids, request.params)
        if started == due.start:
            begin = clock()
        if started in due:
            arrivals[started] = clock()
        started += 1

    for _ in range(n):
        start()
    while len(done) < count:
        for output in engine.step():
            tokens += len(output.token_ids) if started > n else 0
            if output.metrics is None:
                continue
            number = int(output.request_id)
            if arrivals.pop(number, None) is not None:
                done.append(output.metrics)
                late += (output.metrics.e2e or 0.0) > longest
            start()
        check()
        now = clock()
        if late + sum(now - at > longest for at in arrivals.values()) > spared:
            return Loop(n, done, now - begin, tokens, too_long=True)
    return Loop(n, done, clock() - begin, tokens)


# ---------------------------------------------------------------------- the part


def run(part: Part) -> None:
    part.data["budgets"] = list(part.scale.budgets)
    try:
        each(part, lambda precision, left: _measure(part, precision, left))
    finally:
        summarize(part.data)
        _picture(part)
        part.save()


def _measure(part: Part, precision: Precision, left: Callable[[], float]) -> None:
    from pelton.bench.latency import check_capacity
    from pelton.errors import RequestError

    scale = part.scale
    length = scale.prompt_len + scale.output_len
    limits: dict[str, Any] = {"max_num_seqs": scale.budget_seats, "max_num_batched_tokens": scale.budget_chunk,
                              "max_model_len": length + 32, "async_scheduling": True}  # fmt: skip
    worst: dict[int, float] = {}
    took = 0.0
    with loaded(part, **limits, **precision.options) as (built, config):
        most = scale.budget_seats
        while most > 1:
            try:
                check_capacity(built.executor.kv_spec, most, length)
                break
            except RequestError:
                most -= 1
        asked = requests(part, [(scale.prompt_len, scale.output_len)] * _PROMPTS)
        replayed(part, built, config, requests(part, [(scale.prompt_len, 4)] * 2))  # compiles kernels
        while (n := next_size(worst, scale.budgets, most)) is not None:
            part.check()
            if worst and left() < took:  # the last one is a fair guess: half of the next are shorter
                part.data.setdefault("cut_short", {})[precision.name] = n
                part.say(f"{precision.name}: no time to try {n} and others")
                break
            before = left()
            loop = _loop(part, built, config, asked, n)
            took = before - left()
            worst[n] = loop.worst
            part.row(precision=precision.name, most=most, **_figures(loop, scale.output_len))


def _loop(part: Part, built: Any, config: Any, asked: Sequence[Any], n: int) -> Loop:
    from pelton.llm import engine_of

    engine = engine_of(built, config)
    try:
        return closed_loop(engine, asked, n, part.scale.least_requests, max(part.scale.budgets), part.check)
    finally:
        engine.drain()


def _figures(loop: Loop, output: int) -> Row:
    """worst: null if it was given up."""
    from pelton.metrics import percentile, throughput

    if loop.too_long:
        return {"n": loop.n, "worst": None, "requests": len(loop.requests), "seconds": loop.seconds}
    rate = throughput(loop.tokens, loop.seconds)
    tpots = [r.tpot for r in loop.requests if r.tpot is not None]
    return {
        "n": loop.n, "worst": loop.worst, "p50": percentile(loop.times, 50), "requests": len(loop.requests),
        "output_tokens_per_s": rate, "requests_per_s": rate / output,
        "tpot_ms": 1e3 * percentile(tpots, 50) if tpots else None, "seconds": loop.seconds,
    }  # fmt: skip


def summarize(data: Row) -> None:
    """``table``: for each precision and budget the largest number of requests that meets it, and its figures."""
    data["table"] = [
        {"precision": name, **_within([r for r in data["rows"] if r["precision"] == name], budget)}
        for name in dict.fromkeys(r["precision"] for r in data["rows"] if "n" in r)
        for budget in data["budgets"]
    ]
    with_ratios(data["table"], ("budget",), ("output_tokens_per_s",))


def _within(rows: Sequence[Row], budget: float) -> Row:
    """missed: the smallest number that was tried and is too many; None if there is none: then n is what seats, KV
    cache or time allowed."""
    by_size = {r["n"]: r for r in rows if "n" in r}
    low, high = bracket({n: math.inf if r["worst"] is None else r["worst"] for n, r in by_size.items()}, budget)
    found: Row = {"budget": budget, "n": low, "missed": high}
    if low:
        keys = ("worst", "p50", "output_tokens_per_s", "requests_per_s", "tpot_ms")
        found |= {key: by_size[low][key] for key in keys}
        found["full"] = low == by_size[low]["most"]
    return found


# ---------------------------------------------------------------------- the picture


def _picture(part: Part) -> None:
    if part.picture is None or not part.data["table"]:
        return
    try:
        draw(part.data, part.picture, f"{part.scale.model}, random weights")
    except ImportError:
        part.say("no matplotlib, no picture; later: python -m benchmarks.gpu.budget FILE.json")


def draw(data: Mapping[str, Any], path: Path, model: str) -> None:
    """Output tokens per second that each budget allows; and beside it all that was measured."""
    from pelton.bench.plots import COLOURS, DIM, _figure

    names = list(dict.fromkeys(r["precision"] for r in data["table"]))
    subtitle = "closed loop of n requests, p99 of their times (the longest of less than 100)"
    with _figure(f"Throughput within a response time: {model}", subtitle, str(path), columns=2, height=4.8) as axes:
        curve, points = axes
        for index, name in enumerate(names):
            style: dict[str, Any] = {"color": COLOURS[index % len(COLOURS)], "marker": "o", "markersize": 4,
                                     "linestyle": ("-", "--", ":")[index // len(COLOURS) % 3]}  # fmt: skip
            met = [r for r in data["table"] if r["precision"] == name and r["n"]]
            curve.plot([r["budget"] for r in met], [r["output_tokens_per_s"] for r in met], label=name, **style)
            tried = sorted((r for r in data["rows"] if r["precision"] == name and r.get("worst")), key=lambda r: r["n"])
            points.plot([r["output_tokens_per_s"] for r in tried], [r["worst"] for r in tried], **style)
            for row in tried[-1:]:
                points.annotate(f"n = {row['n']}", (row["output_tokens_per_s"], row["worst"]), (4, 2),
                                textcoords="offset points", fontsize=8, color=DIM)  # fmt: skip
        curve.set_title("output tokens/s by response time allowed")
        curve.set_xlabel("seconds")
        curve.set_ylim(bottom=0)
        curve.legend(loc="upper left")
        points.set_title("response time, s, of all n that were tried")
        points.set_xlabel("output tokens/s")
        points.set_xlim(left=0)
        points.set_ylim(bottom=0)


def main() -> None:
    import json

    for name in sys.argv[1:]:
        results = json.loads(Path(name).read_text())
        picture = Path(name).with_suffix("").with_name(f"{Path(name).stem}-budget.svg")
        draw(results["parts"]["budget"], picture, f"{results['model']}, {results['environment']['device']}")
        print(picture)


if __name__ == "__main__":
    main()
