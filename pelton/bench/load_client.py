"""Requests sent to a server under an open or a closed loop, and what became of each of them."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, TypeVar

from ..metrics import RequestMetrics
from .http_client import Exchange, ExchangeError, HttpClient
from .openai_api import Answer, Api, error_text
from .workloads import WorkloadRequest

T = TypeVar("T")
#: What can become of a request. ok: answered to its end. http: refused with another status than 200. connect: no
#: connection. timeout: not at its end in time. cut: the stream ended before the answer did. error: the server said so
#: in the stream, or sent no event stream. empty: an end without a token. cancelled: by this client, when it stopped.
STATUSES = ("ok", "http", "connect", "timeout", "cut", "error", "empty", "cancelled")
_TICK = 0.02


class Tokenizer(Protocol):
    """What is needed of :class:`pelton.text.tokenizer.Tokenizer`."""

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]: ...


@dataclass(slots=True)
class Record:
    """One request. Times are of time.monotonic.

    index: in the workload. due: when it was to be sent; None in a closed loop. sent: when it was, before connecting.
    end: when the client was through with it. chunk_times: when each chunk with tokens was read. counted_by: what
    ``output_tokens`` is from: "usage" of the server, the local "tokenizer", or "chunks". cached_tokens: prompt tokens
    found in the server's prefix cache; None where it does not say.
    """

    index: int
    due: float | None
    max_tokens: int
    sent: float = 0.0
    connected: float | None = None
    end: float = 0.0
    status: str = "cancelled"
    http_status: int = 0
    message: str = ""
    chunk_times: list[float] = field(default_factory=list)
    prompt_tokens: int = 0
    cached_tokens: int | None = None
    output_tokens: int = 0
    counted_by: str = "chunks"
    finish_reason: str | None = None

    @property
    def is_ok(self) -> bool:
        return self.status == "ok"

    @property
    def metrics(self) -> RequestMetrics:
        """With a stamp for each output token; tokens that came in the middle are spread over the chunks there."""
        times, n = self.chunk_times, self.output_tokens
        last = len(times) - 1
        stamps = tuple(times[round(i * last / (n - 1)) if n > 1 else 0] for i in range(n)) if times else ()
        return RequestMetrics(self.sent, None, stamps, self.prompt_tokens, self.cached_tokens or 0)

    @property
    def chunk_gaps(self) -> list[float]:
        return [b - a for a, b in itertools.pairwise(self.chunk_times)]


class Sender:
    """Sends the requests of a run, each as one exchange. tokenizer: counts tokens where the server does not.

    A request that is sent again has another cache salt, if it has one: it must not find its own prompt in a cache.
    """

    def __init__(self, client: HttpClient, api: Api, timeout: float, tokenizer: Tokenizer | None = None) -> None:
        self.client = client
        self.api = api
        self.timeout = timeout
        self._tokenizer = tokenizer
        self._sent = Counter[int]()  # times by index

    async def send(
        self, index: int, request: WorkloadRequest, due: float | None = None,
        on_first_token: Callable[[], None] | None = None,
    ) -> Record:  # fmt: skip
        """Never raises for anything that the server does; cancelling it gives a record, too.

        on_first_token: called in the read that brings it.
        """
        record = Record(index, due, request.max_tokens, prompt_tokens=len(request.prompt_token_ids))
        answer, exchange, refusal = Answer(self.api.endpoint), Exchange(), bytearray()

        def sink(data: bytes, now: float) -> None:
            if exchange.status != 200 or "event-stream" not in exchange.headers.get("content-type", ""):
                if len(refusal) < 4096:
                    refusal.extend(data)
                return
            waiting = on_first_token is not None and not answer.chunk_times
            answer.feed(data, now)
            if waiting and answer.chunk_times and on_first_token is not None:
                on_first_token()

        again = self._sent[index]
        self._sent[index] += 1
        api = replace(self.api, salt=f"{self.api.salt}-{again}") if again and self.api.salt else self.api
        try:
            body = api.body(request)
            await self.client.exchange("POST", self.api.path, body, sink, self.timeout, exchange)
            answer.close(time.monotonic())
            record.status, record.message = _status(exchange, answer, bytes(refusal))
        except ExchangeError as error:
            # An answer is complete with its finish_reason, whatever happens to the connection after that.
            complete = error.kind == "cut" and answer.finish_reason is not None and answer.chunk_times
            record.status, record.message = ("ok", "") if complete else (error.kind, str(error))
        except asyncio.CancelledError:
            record.status, record.message = "cancelled", "this client stopped"
        record.end = time.monotonic()
        record.sent, record.connected, record.http_status = exchange.sent, exchange.connected, exchange.status
        record.chunk_times, record.finish_reason = answer.chunk_times, answer.finish_reason
        self._count(record, answer)
        return record

    def _count(self, record: Record, answer: Answer) -> None:
        usage = answer.usage or {}
        if isinstance(tokens := usage.get("prompt_tokens"), int) and tokens > 0:
            record.prompt_tokens = tokens
        details = usage.get("prompt_tokens_details")
        if isinstance(details, dict) and isinstance(cached := details.get("cached_tokens"), int):
            record.cached_tokens = cached
        if not record.chunk_times:
            return
        record.output_tokens = len(record.chunk_times)
        if isinstance(tokens := usage.get("completion_tokens"), int) and tokens > 0:
            record.output_tokens, record.counted_by = tokens, "usage"
        elif self._tokenizer is not None and answer.text:
            record.output_tokens = max(1, len(self._tokenizer.encode(answer.text, add_special_tokens=False)))
            record.counted_by = "tokenizer"


def _status(exchange: Exchange, answer: Answer, refusal: bytes) -> tuple[str, str]:
    if exchange.status != 200:
        return "http", f"{exchange.status}: {error_text(refusal)}"
    if answer.error is not None:
        return "error", answer.error
    if "event-stream" not in exchange.headers.get("content-type", ""):
        return "error", f"no event stream but {exchange.headers.get('content-type', 'something')!r}"
    if not answer.is_done and answer.finish_reason is None:
        return "cut", "the stream ended without finish_reason and [DONE]"
    if not answer.chunk_times:
        return "empty", f"the answer ended without a token (finish_reason {answer.finish_reason})"
    return "ok", ""


class Control:
    """Ends a run early: on Ctrl-C, or when the server is gone.

    max_connect_errors: so many requests in a row without a connection end it.
    """

    def __init__(self, max_connect_errors: int = 10) -> None:
        self.reason: str | None = None
        self.interrupted = False
        self._most = max_connect_errors
        self._in_a_row = 0
        self._stopped = asyncio.Event()

    def stop(self, reason: str, *, interrupted: bool = False) -> None:
        if self.reason is None:
            self.reason, self.interrupted = reason, interrupted
            self._stopped.set()

    def saw(self, record: Record) -> None:
        self._in_a_row = self._in_a_row + 1 if record.status == "connect" else 0
        if self._in_a_row >= self._most:
            self.stop(f"the server is gone: {self._in_a_row} requests in a row got no connection ({record.message})")

    async def until_stopped(self, awaitable: Coroutine[Any, Any, T]) -> T | None:
        """Its result, or None if the run was stopped first, which cancels it."""
        task, stopped = asyncio.ensure_future(awaitable), asyncio.ensure_future(self._stopped.wait())
        try:
            await asyncio.wait((task, stopped), return_when=asyncio.FIRST_COMPLETED)
            return task.result() if task.done() else None
        finally:
            for each in (task, stopped):
                each.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await each


@dataclass(slots=True)
class Run:
    """A load that was sent. Times are of time.monotonic, lags in seconds.

    records: in the order of sending. start: when the first request was due. lags: of each request of an open loop, how
    much later than due it was sent. loop_lags: how late a timer of this process fired, looked at all the time.
    cpu_seconds: of this process. stopped: why it ended early.
    """

    start: float
    records: list[Record] = field(default_factory=list)
    loop_lags: list[float] = field(default_factory=list)
    wall_seconds: float = 0.0
    cpu_seconds: float = 0.0
    stopped: str | None = None

    @property
    def lags(self) -> list[float]:
        return [r.sent - r.due for r in self.records if r.due is not None]

    @property
    def ok(self) -> list[Record]:
        return [r for r in self.records if r.is_ok]

    @property
    def seconds(self) -> float:
        """From the start to the last token, or to the end of the last failure if that came later."""
        ends = [r.chunk_times[-1] if r.is_ok else r.end for r in self.records if r.status != "cancelled"]
        return max(ends, default=self.start) - self.start


#: Sends request number i of the workload, due at a time or None.
Send = Callable[[int, WorkloadRequest, "float | None"], Awaitable[Record]]


async def open_loop(
    send: Send, requests: Sequence[WorkloadRequest], times: Sequence[float], *, control: Control,
    duration: float = float("inf"), on_record: Callable[[Record], None] = lambda record: None,
) -> Run:  # fmt: skip
    """Each request is sent when it is due (``times``: seconds after the start), whatever became of earlier ones.

    duration: seconds after which nothing more is sent; what is on its way runs to its end.
    """
    run = Run(time.monotonic())
    tasks: set[asyncio.Task[None]] = set()
    failures: list[BaseException] = []  # of this client, not of the server

    def ended(task: asyncio.Task[None]) -> None:
        tasks.discard(task)
        if not task.cancelled() and (failure := task.exception()) is not None:
            failures.append(failure)

    async def one(index: int, due: float) -> None:
        record = await send(index, requests[index], due)
        run.records.append(record)
        control.saw(record)
        on_record(record)

    async def all_of_them() -> None:
        for index, after in enumerate(times):
            if after > duration:
                break
            due = run.start + after
            while (wait := due - time.monotonic()) > 0:  # timers may be early by a tick of the loop's clock
                await asyncio.sleep(wait)
            task = asyncio.create_task(one(index, due))
            tasks.add(task)
            task.add_done_callback(ended)
        while tasks:
            await asyncio.wait(tasks)

    async with Observed(run, control):
        await control.until_stopped(all_of_them())
        await _cancel(tasks)
    if failures:
        raise failures[0]
    run.records.sort(key=lambda r: r.index)
    return run


async def closed_loop(
    send: Send, requests: Sequence[WorkloadRequest], concurrency: int, *, control: Control,
    duration: float = float("inf"), on_record: Callable[[Record], None] = lambda record: None,
) -> Run:  # fmt: skip
    """``concurrency`` requests are on their way at any time: each that ends makes room for the next.

    duration: seconds after which nothing more is sent, and until which the requests are sent again and again.
    """
    run = Run(time.monotonic())
    endless = duration != float("inf")
    order: Iterator[int] = itertools.cycle(range(len(requests))) if endless else iter(range(len(requests)))

    async def worker() -> None:
        for index in order:
            if control.reason is not None or time.monotonic() - run.start > duration:
                break
            record = await send(index, requests[index], None)
            run.records.append(record)
            control.saw(record)
            on_record(record)

    workers = {
        asyncio.create_task(worker()) for _ in range(concurrency if endless else min(concurrency, len(requests)))
    }

    async def all_of_them() -> None:
        await asyncio.wait(workers)

    async with Observed(run, control):
        await control.until_stopped(all_of_them())
        await _cancel(workers)
    for each in workers:
        each.result()
    run.records.sort(key=lambda r: r.sent)
    return run


async def _cancel(tasks: set[asyncio.Task[None]]) -> None:
    """Each ends with a record that says so."""
    pending = {task for task in tasks if not task.done()}
    for task in pending:
        task.cancel()
    if pending:
        await asyncio.wait(pending)


class Observed:
    """Watches this process while a load runs: its CPU time, and how late its timers are."""

    def __init__(self, run: Run, control: Control) -> None:
        self._run, self._control = run, control

    async def __aenter__(self) -> None:
        self._cpu, self._wall = time.process_time(), time.monotonic()
        self._ticks = asyncio.create_task(self._tick())

    async def __aexit__(self, *_: object) -> None:
        self._ticks.cancel()
        self._run.wall_seconds = time.monotonic() - self._wall
        self._run.cpu_seconds = time.process_time() - self._cpu
        self._run.stopped = self._control.reason

    async def _tick(self) -> None:
        while True:
            due = time.monotonic() + _TICK
            await asyncio.sleep(_TICK)
            self._run.loop_lags.append(max(0.0, time.monotonic() - due))
