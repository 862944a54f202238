"""A workload on a server that is already there: what the server takes, single loads, sweeps, the search for a rate."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import math
import uuid
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, TypeVar

from ..errors import PeltonError, RequestError
from .http_client import ExchangeError, HttpClient
from .load_client import Control, Record, Run, Sender, closed_loop, open_loop
from .mlperf import MlperfResult, MlperfSettings, run_mlperf
from .openai_api import INSTEAD, OPTIONAL, Api, error_text
from .server_metrics import ServerMetrics
from .serving_report import load_label
from .slo import FoundRate, Slo, Trial, find_rate
from .workloads import Arrivals, Workload, WorkloadRequest

T = TypeVar("T")
_PROBE_TOKENS = 4
#: A field that a server does not know is a 400 or 422; some answer 500 to a body that does not fit their schema.
_REFUSALS = (400, 422, 500)
#: Tokens of each answer of a warm-up.
_WARMUP_TOKENS = 8
#: Runs have different random tokens, so that none finds its prompts in the server's prefix cache.
_SHIFT = 7919


class Tokenizer(Protocol):
    """What is needed of :class:`pelton.text.tokenizer.Tokenizer`."""

    vocab_size: int
    special_token_ids: frozenset[int]

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]: ...

    def encode_chat(self, messages: Any, *, tools: Any = None) -> list[int]: ...

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str: ...


@dataclass(frozen=True, slots=True)
class Load:
    """How requests are sent. arrivals: an open loop. concurrency: a closed one, with so many on their way. scenario:
    as MLPerf's LoadGen wants it."""

    arrivals: Arrivals | None = None
    concurrency: int | None = None
    duration: float = math.inf
    scenario: str | None = None

    @property
    def label(self) -> str:
        return load_label(self.row())

    def row(self) -> dict[str, Any]:
        if self.scenario is not None:
            return {"kind": "mlperf", "scenario": self.scenario}
        duration = None if self.duration == math.inf else self.duration
        if self.concurrency is not None:
            return {"kind": "closed", "max_concurrency": self.concurrency, "duration": duration}
        assert self.arrivals is not None
        rate = None if self.arrivals.rate == math.inf else self.arrivals.rate  # JSON knows no infinity
        return {"kind": "open", "request_rate": rate, "burstiness": self.arrivals.burstiness, "duration": duration}


@dataclass
class Measured:
    """A load that was sent. server: what the server counted meanwhile."""

    load: Load
    run: Run
    server: dict[str, Any] | None


@dataclass(frozen=True)
class ServedModel:
    """From /v1/models. root: where the server has the model from, if it says so."""

    name: str
    root: str | None = None
    max_model_len: int | None = None


def plain_ids(tokenizer: Tokenizer) -> list[int]:
    """Ids that stand for text: random prompts with the marks of turns or images in them are no prompts."""
    return [i for i in range(tokenizer.vocab_size) if i not in tokenizer.special_token_ids]


class Prompts:
    """The workload as it is sent: for every run other random tokens of the same lengths, as ids or as text.

    plain: ids that random tokens are drawn from; the workload was made with ``vocab_size=len(plain)``.
    """

    def __init__(self, workload: Workload, tokenizer: Tokenizer, plain: Sequence[int]) -> None:
        self.workload = workload
        self._tokenizer = tokenizer
        self._plain = plain
        self._is_random = _is_random(workload)

    def of_run(self, number: int, api: Api, count: int | None = None) -> list[WorkloadRequest]:
        """number: of the run; the same number gives the same prompts. count: only the first ones."""
        requests = list(self.workload.requests[:count])
        if self._is_random:
            requests = [replace(r, prompt_token_ids=self._shifted(r.prompt_token_ids, number)) for r in requests]
        if api.endpoint == "chat":
            return [self._as_text(r) if r.prompt is None and r.messages is None else r for r in requests]
        if api.wants_text:
            return [self._as_text(r) if r.prompt is None else r for r in requests]
        return requests

    def _shifted(self, ids: Sequence[int], number: int) -> tuple[int, ...]:
        plain, shift = self._plain, number * _SHIFT
        return tuple(plain[(i + shift) % len(plain)] for i in ids)

    def _as_text(self, request: WorkloadRequest) -> WorkloadRequest:
        """As a text of as many tokens, as nearly as that goes: random tokens are seldom what their text becomes."""
        ids = request.prompt_token_ids
        text = self._tokenizer.decode(ids)
        again = self._tokenizer.encode(text, add_special_tokens=False)
        for _ in range(8 if self._is_random else 0):
            if len(again) == len(ids):
                break
            again = again[: len(ids)] + list(ids[: max(0, len(ids) - len(again))])
            text = self._tokenizer.decode(again)
            again = self._tokenizer.encode(text, add_special_tokens=False)
        return replace(request, prompt_token_ids=tuple(again), prompt=text)


@dataclass
class Target:
    """A server, and how it wants to be asked. notes: what is not sent because it refuses that."""

    client: HttpClient
    api: Api
    timeout: float
    tokenizer: Tokenizer
    notes: list[str] = field(default_factory=list)

    def sender(self) -> Sender:
        """With a cache salt of its own."""
        api = replace(self.api, salt=uuid.uuid4().hex) if "cache_salt" in self.api.sent else self.api
        return Sender(self.client, api, self.timeout, self.tokenizer)

    async def probe(self, asked: Callable[[Api], WorkloadRequest]) -> float:
        """Ask for a few tokens and do without what the server refuses. Seconds that the answer took.

        asked: a request of the workload as it is sent under an Api.

        Raises:
            PeltonError: the server cannot be asked; the message says what it answered.
        """
        api = replace(self.api, salt=uuid.uuid4().hex)
        request = asked(api)
        first = await self._ask(api, request)
        record = first
        if first.http_status in _REFUSALS:
            used = [name for name in OPTIONAL if api.uses(name, request)]
            # Without each alone, then without more and more of them.
            attempts = [{name} for name in used] + [set(used[:n]) for n in range(2, len(used) + 1)]
            for dropped in attempts:
                attempt = replace(api, sent=api.sent - dropped)
                record = await self._ask(attempt, asked(attempt))
                if record.http_status not in _REFUSALS:
                    if record.is_ok:
                        self.api = replace(self.api, sent=attempt.sent)
                        self.notes += [INSTEAD[name] for name in OPTIONAL if name in dropped]
                    break
        if not record.is_ok:
            raise self._explain(record if record.http_status not in _REFUSALS else first)
        if record.counted_by != "usage":
            self.notes.append("the server reports no usage: tokens are counted with the local tokenizer")
        return record.end - record.sent

    async def _ask(self, api: Api, request: WorkloadRequest) -> Record:
        params = replace(request.params, max_tokens=min(request.max_tokens, _PROBE_TOKENS), min_tokens=0)
        sender = Sender(self.client, api, self.timeout, self.tokenizer)
        return await sender.send(0, replace(request, params=params))

    def _explain(self, record: Record) -> PeltonError:
        what, said = f"{self.client.base_url}{self.api.path}", record.message
        if record.status == "connect":
            return nothing_listens(self.client.base_url, said)
        if record.http_status in (401, 403):
            return refused_key(self.client.base_url, record.http_status)
        if record.http_status == 404 and "model" in said.lower():
            return PeltonError(f"{self.client.base_url} has no model {self.api.model} ({said})", "give another --model")
        if record.http_status in (404, 405):
            return PeltonError(f"there is no {what} ({said})", "try --endpoint completions or --endpoint chat")
        if record.status == "timeout":
            return PeltonError(f"{what} did not answer within {self.timeout:g} s", "raise --timeout")
        return PeltonError(f"{what} does not answer a first request ({said})", "see the server's log")


def nothing_listens(base_url: str, why: str) -> PeltonError:
    return PeltonError(f"no connection to {base_url} ({why})", "start the server, or give --base-url http://host:port")


def refused_key(base_url: str, status: int) -> PeltonError:
    return PeltonError(f"{base_url} refuses the key ({status})", "give --api-key or set OPENAI_API_KEY")


async def served_models(client: HttpClient) -> list[ServedModel]:
    """What /v1/models lists; nothing if the server does not have that page.

    Raises:
        PeltonError: nothing listens, or the key is refused.
    """
    try:
        status, body = await client.get("/v1/models")
    except ExchangeError as error:
        if error.kind == "connect":
            raise nothing_listens(client.base_url, str(error)) from None
        raise PeltonError(f"{client.base_url} does not answer ({error})", "is it an HTTP server?") from None
    if status in (401, 403):
        raise refused_key(client.base_url, status)
    if status >= 500:
        raise PeltonError(f"{client.base_url} answers {status}: {error_text(body)}", "wait until it is ready")
    try:
        listed = json.loads(body)["data"] if status == 200 else []
        return [_served(model) for model in listed]
    except (ValueError, TypeError, KeyError, AttributeError):
        return []


def _served(model: Mapping[str, Any]) -> ServedModel:
    longest = model.get("max_model_len") or (model.get("meta") or {}).get("n_ctx")
    root = model.get("root")
    return ServedModel(
        str(model["id"]), root if isinstance(root, str) else None, longest if isinstance(longest, int) else None
    )


def choose_model(models: Sequence[ServedModel], asked: str | None, base_url: str) -> ServedModel:
    """The one that was asked for, listed or not (many servers take any name), or else the first.

    Raises:
        PeltonError: none was asked for and none is listed.
    """
    if asked is not None:
        return next((model for model in models if model.name == asked), ServedModel(asked))
    if not models:
        raise PeltonError(f"{base_url}/v1/models lists no model", "check --base-url, or give --model")
    return models[0]


@dataclass
class Bench:
    """Loads of one workload on one server, one after the other."""

    target: Target
    prompts: Prompts
    control: Control
    with_server_metrics: bool = True
    on_record: Callable[[Load, int, Record], None] = lambda load, total, record: None
    measured: list[Measured] = field(default_factory=list)
    _runs: int = 0

    async def warm_up(self, count: int) -> None:
        """A few short requests with prompts of their own, so that connections and the server are awake.

        Raises:
            PeltonError: the server answers none of them.
        """
        if not count:
            return
        short = [
            replace(r, params=replace(r.params, max_tokens=min(r.max_tokens, _WARMUP_TOKENS), min_tokens=0))
            for r in self._next(count)
        ]
        run = await closed_loop(self.target.sender().send, short, min(4, count), control=self.control)
        if not run.ok and run.records and not self.control.interrupted:
            raise PeltonError(f"the server answers no request ({run.records[0].message})", "see the server's log")

    async def measure(self, load: Load) -> Measured:
        """Send the workload once. It is kept in ``measured`` if anything was sent."""
        requests = self._next()
        sender = self.target.sender()

        def on_record(record: Record) -> None:
            self.on_record(load, len(requests), record)

        async with self._server_metrics() as metrics:
            if load.concurrency is not None:
                run = await closed_loop(
                    sender.send, requests, load.concurrency, control=self.control, duration=load.duration,
                    on_record=on_record,
                )  # fmt: skip
            else:
                assert load.arrivals is not None
                run = await open_loop(
                    sender.send, requests, load.arrivals.times(len(requests)), control=self.control,
                    duration=load.duration, on_record=on_record,
                )  # fmt: skip
        return self._keep(Measured(load, run, metrics.row()))

    async def mlperf(self, settings: MlperfSettings) -> MlperfResult:
        """As LoadGen wants it; kept in ``measured``, too."""
        requests, load = self._next(), Load(scenario=settings.scenario)

        def on_record(record: Record) -> None:
            self.on_record(load, len(requests), record)

        async with self._server_metrics() as metrics:
            result = await run_mlperf(self.target.sender(), requests, settings, self.control, on_record)
        self._keep(Measured(load, result.run, metrics.row()))
        return result

    def _server_metrics(self) -> ServerMetrics:
        return ServerMetrics(self.target.client if self.with_server_metrics else None)

    def _keep(self, done: Measured) -> Measured:
        if done.run.records:
            self.measured.append(done)
        return done

    def notes(self) -> list[str]:
        """What is to be known of the loads that were sent, besides the target's notes."""
        again = [each for each in self.measured if len({r.index for r in each.run.records}) < len(each.run.records)]
        short = [each for each in self.measured if each.load.arrivals is not None and each.run.stopped is None
                 and each.load.arrivals.rate < math.inf and each.load.duration < math.inf
                 and len(each.run.records) == len(self.prompts.workload.requests)]  # fmt: skip
        said = []
        if again and "cache_salt" not in self.target.api.sent:
            said.append(f"{_labels(again)}: prompts were repeated, so they may come from the prefix cache")
        if short:
            said.append(f"{_labels(short)}: all requests were sent before the duration was over: raise --num-prompts")
        return said

    async def sweep(self, loads: Sequence[Load]) -> None:
        for load in loads:
            if self.control.reason is None:
                await self.measure(load)

    async def find_rate(self, slo: Slo, start: float, load: Load, *, max_runs: int, precision: float) -> FoundRate:
        """Each run is kept in ``measured``. load: its arrivals give burstiness and seed."""
        arrivals = load.arrivals or Arrivals()

        async def trial(rate: float) -> Trial | None:
            done = await self.measure(replace(load, arrivals=replace(arrivals, rate=rate)))
            if self.control.reason is not None:
                return None
            return Trial.of(rate, [r.is_ok and slo.met_by(r.metrics) for r in done.run.records])

        return await find_rate(trial, start, needed=slo.attainment, max_runs=max_runs, precision=precision)

    def _next(self, count: int | None = None) -> list[WorkloadRequest]:
        self._runs += 1
        return self.prompts.of_run(self._runs, self.target.api, count)


def _labels(measured: Sequence[Measured]) -> str:
    return ", ".join(each.load.label for each in measured)


def prepare_requests(workload: Workload, ignore_eos: bool | None) -> Workload:
    """With ``sha256`` among its settings, for comparisons: files may change under the same options.

    ignore_eos: for all requests; None: as the workload has it.
    """
    requests = workload.requests
    if ignore_eos is not None:
        requests = tuple(replace(r, params=replace(r.params, ignore_eos=ignore_eos)) for r in requests)
    digest = hashlib.sha256()
    for r in requests:
        # Random tokens are others in every run and for every tokenizer: only their number counts.
        prompt = len(r.prompt_token_ids) if _is_random(workload) else r.prompt_token_ids
        digest.update(repr((prompt, r.max_tokens, r.params.ignore_eos)).encode())
    return replace(workload, requests=requests, settings={**workload.settings, "sha256": digest.hexdigest()})


def _is_random(workload: Workload) -> bool:
    return workload.settings["dataset"] in ("random", "shared-prefix")


def parse_extra_body(text: str | None) -> dict[str, Any]:
    """Raises RequestError unless ``text`` is a JSON object."""
    if text is None:
        return {}
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise RequestError(f"--extra-body is {text!r}", """give a JSON object, e.g. '{"top_k": 40}'""")
    return found


def run_in_loop(main: Callable[[], Coroutine[Any, Any, T]]) -> T:
    """Run a coroutine in a new event loop, uvloop's if it is installed, with as many connections as are allowed."""
    with contextlib.suppress(ImportError, OSError, ValueError):  # Windows, or not permitted
        import resource

        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    try:
        import uvloop

        loop: asyncio.AbstractEventLoop = uvloop.new_event_loop()
    except ImportError:
        loop = asyncio.new_event_loop()
    task = loop.create_task(main())
    try:
        return loop.run_until_complete(task)
    finally:
        task.cancel()  # after Ctrl-C it has connections to close, which takes the loop
        loop.run_until_complete(asyncio.gather(task, return_exceptions=True))
        loop.close()
