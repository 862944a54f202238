"""MLPerf's scenarios with its own LoadGen, which decides when requests go out, takes the times and gives the verdict.

LoadGen runs in a thread of its own and calls back from threads of C++; requests live in the event loop. The one
way into the loop is ``call_soon_threadsafe``, the way back is LoadGen's own functions, which any thread may call.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import PeltonError
from .load_client import Control, Observed, Record, Run, Sender
from .slo import Slo
from .workloads import WorkloadRequest

SCENARIOS = {"singlestream": "SingleStream", "server": "Server", "offline": "Offline"}
_LINE = re.compile(r"\s*([^:]+?)\s*:\s*(\S.*?)\s*")
_REASON = re.compile(r"\s*\*\s*(\S.*?)\s*")
#: Seconds that LoadGen has for its end after Ctrl-C, when every request counts as answered.
_PATIENCE = 2.0


@dataclass(frozen=True)
class MlperfSettings:
    """What LoadGen is told. Durations in seconds; ``target_latency`` is of the Server scenario, seconds.

    target_qps: Server: rate of its Poisson arrivals; Offline: expected rate, from which the number of samples follows.
    min_queries: None: LoadGen's default for the scenario. concurrency: Offline: so many requests at a time.
    """

    scenario: str
    min_duration: float = 60.0
    min_queries: int | None = None
    target_qps: float = 1.0
    target_latency: float | None = None
    slo: Slo | None = None
    logs: Path = Path("mlperf_logs")
    concurrency: int = 256
    seed: int = 0


@dataclass
class MlperfResult:
    """LoadGen's verdict ("VALID", "INVALID"; None without one), its reasons, every value of its summary; our stamps."""

    run: Run
    result: str | None
    summary: dict[str, str] = field(default_factory=dict)
    reasons: tuple[str, ...] = ()
    logs: Path = Path()
    finished: bool = True  # False: LoadGen's threads still run, so the process must end without waiting for them

    def row(self) -> dict[str, Any]:
        return {"result": self.result, "summary": self.summary, "reasons": list(self.reasons), "logs": str(self.logs)}


def check_installed() -> Any:
    """LoadGen's module. Raises PeltonError if it is not installed."""
    try:
        import mlperf_loadgen
    except ImportError:
        raise PeltonError(
            "MLPerf's LoadGen is not installed", "pip install mlcommons-loadgen (or 'pelton[bench]')"
        ) from None
    return mlperf_loadgen


def check_logs(folder: Path) -> None:
    """Raises PeltonError if LoadGen could not write there: it would end the process."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "mlperf_log_summary.txt").open("a").close()
    except OSError as error:
        raise PeltonError(f"cannot write to {folder} ({error.strerror})", "give another --mlperf-logs") from None


class _Bridge:
    """LoadGen's system under test: samples in from its threads, answers back from the event loop."""

    def __init__(
        self, sender: Sender, requests: Sequence[WorkloadRequest], settings: MlperfSettings, run: Run,
        control: Control, on_record: Callable[[Record], None],
    ) -> None:  # fmt: skip
        self._loadgen = check_installed()
        self._loop = asyncio.get_running_loop()
        self._sender, self._requests, self._run, self._control = sender, requests, run, control
        self._on_record = on_record
        self._slots = asyncio.Semaphore(settings.concurrency) if settings.scenario == "offline" else None
        self._waits_for_due = settings.scenario == "server"
        self.tasks: set[asyncio.Task[None]] = set()
        self.failure: BaseException | None = None

    # Called by LoadGen's threads; an exception would end the process.

    def issue(self, samples: Sequence[Any]) -> None:
        now = time.monotonic()
        given = [(sample.id, sample.index) for sample in samples]
        with contextlib.suppress(RuntimeError):  # the loop is closed: after Ctrl-C
            self._loop.call_soon_threadsafe(self._start, given, now)

    def flush(self) -> None:
        pass

    # In the event loop

    def _start(self, samples: Sequence[tuple[int, int]], issued: float) -> None:
        for sample, index in samples:
            task = self._loop.create_task(self._answer(sample, index, issued))
            self.tasks.add(task)
            task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self.tasks.discard(task)
        if not task.cancelled() and (failure := task.exception()) is not None:
            self.failure = failure
            self._control.stop(f"this client failed: {failure!r}")

    async def _answer(self, sample: int, index: int, issued: float) -> None:
        """LoadGen waits for every sample, so each is completed whatever happens."""
        tokens, told = 1, False

        def first_token() -> None:
            nonlocal told
            told = True
            self._loadgen.FirstTokenComplete([self._loadgen.QuerySampleResponse(sample, 0, 0, 1)])

        try:
            if self._control.reason is None:
                async with self._slots or contextlib.nullcontext():
                    if self._control.reason is None:
                        due = issued if self._waits_for_due else None
                        record = await self._sender.send(index, self._requests[index], due, first_token)
                        tokens = max(1, record.output_tokens)
                        self._run.records.append(record)
                        self._control.saw(record)
                        self._on_record(record)
        finally:
            if not told:
                first_token()
            self._loadgen.QuerySamplesComplete([self._loadgen.QuerySampleResponse(sample, 0, 0, tokens)])


def _test_settings(loadgen: Any, settings: MlperfSettings) -> Any:
    test = loadgen.TestSettings()
    test.scenario = getattr(loadgen.TestScenario, SCENARIOS[settings.scenario])
    test.mode = loadgen.TestMode.PerformanceOnly
    test.min_duration_ms = max(1, round(1e3 * settings.min_duration))
    if settings.min_queries is not None:
        test.min_query_count = settings.min_queries
    test.qsl_rng_seed, test.sample_index_rng_seed, test.schedule_rng_seed = (settings.seed + i for i in (1, 2, 3))
    test.use_token_latencies = True
    if settings.scenario == "server":
        test.server_target_qps = settings.target_qps
        slo = settings.slo or Slo()
        limits = {"ttft_latency": slo.ttft, "tpot_latency": slo.tpot}
        for name, limit in limits.items():  # without a limit: longer than anything
            setattr(test, name, round(1e9 * min(limit, 86_400.0)))
        if settings.target_latency is not None:
            test.server_target_latency_ns = round(1e9 * settings.target_latency)
    elif settings.scenario == "offline":
        test.offline_expected_qps = settings.target_qps
    else:
        test.single_stream_expected_latency_ns = round(1e9 / settings.target_qps)
    return test


async def run_mlperf(
    sender: Sender,
    requests: Sequence[WorkloadRequest],
    settings: MlperfSettings,
    control: Control,
    on_record: Callable[[Record], None] = lambda record: None,
) -> MlperfResult:
    """One test of LoadGen in performance mode. Its log files are in ``settings.logs`` afterwards.

    When ``control`` stops it, everything that LoadGen still asks for counts as answered, so that it comes to its end;
    there is no verdict then.

    Raises:
        PeltonError: LoadGen is not installed, or the folder for its logs cannot be written.
    """
    loadgen = check_installed()
    check_logs(settings.logs)
    loop, run, ended = asyncio.get_running_loop(), Run(time.monotonic()), asyncio.Event()
    bridge = _Bridge(sender, requests, settings, run, control, on_record)
    logs = loadgen.LogSettings()
    output = loadgen.LogOutputSettings()
    output.outdir, output.copy_summary_to_stdout = str(settings.logs), False
    logs.log_output, logs.enable_trace = output, False
    asked = _test_settings(loadgen, settings)

    def test() -> None:
        try:
            sut = loadgen.ConstructSUT(bridge.issue, bridge.flush)
            qsl = loadgen.ConstructQSL(len(requests), len(requests), lambda indices: None, lambda indices: None)
            loadgen.StartTestWithLogSettings(sut, qsl, asked, logs, str(settings.logs / "no-audit.config"))
            loadgen.DestroyQSL(qsl)
            loadgen.DestroySUT(sut)
        except Exception as error:  # nobody looks at this thread
            bridge.failure = error
        finally:
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(ended.set)

    thread = threading.Thread(target=test, name="loadgen", daemon=True)
    finished = True
    async with Observed(run, control):
        thread.start()
        await control.until_stopped(ended.wait())
        if control.reason is not None and not ended.is_set():
            for task in list(bridge.tasks):
                task.cancel()
            try:
                await asyncio.wait_for(ended.wait(), _PATIENCE)
            except asyncio.TimeoutError:
                finished = False
        if finished:
            while bridge.tasks:
                await asyncio.wait(bridge.tasks)
    if bridge.failure is not None:
        raise bridge.failure
    run.records.sort(key=lambda r: r.sent)
    run.start = min((r.sent for r in run.records), default=run.start)
    if control.reason is not None:
        return MlperfResult(run, None, {}, (), settings.logs, finished)
    summary, reasons = read_summary((settings.logs / "mlperf_log_summary.txt").read_text(errors="replace"))
    return MlperfResult(run, summary.get("Result is"), summary, reasons, settings.logs, finished)


def read_summary(text: str) -> tuple[dict[str, str], tuple[str, ...]]:
    """The lines ``name : value`` of LoadGen's summary, settings included, and what it says about its verdict."""
    lines = text.splitlines()
    values = [found for found in map(_LINE.fullmatch, lines) if found]
    reasons = [found.group(1) for found in map(_REASON.fullmatch, lines) if found]
    return {found.group(1): found.group(2) for found in values}, tuple(dict.fromkeys(reasons))
