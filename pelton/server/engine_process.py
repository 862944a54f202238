"""A process that runs a model for the API processes that connect to its Unix socket.

``python -m pelton.server.engine_process`` reads :class:`EngineProcessConfig` as JSON from standard input, whose end is
also the end of the process: it never outlives the one that started it. It says how it gets on in lines of JSON on a
file descriptor: ``{"progress": [done, total]}``, ``{"ready": seconds}``, ``{"error": text}``, ``{"alive": seconds}``.
"""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import json
import os
import signal
import socket
import sys
import threading
import time
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from ..answers import Grammars
from ..config import EngineConfig, PoolerConfig, PoolingParams, SamplingParams
from ..engine.async_engine import AsyncEngine
from ..engine.prefix_cache import CachePolicy
from ..engine.request import answer_ids
from ..errors import PeltonError, RequestError
from ..llm import engine_of
from . import wire
from .energy import EnergyMeter

if TYPE_CHECKING:
    from ..engine.engine import EngineOutput, LLMEngine
    from ..engine.request import Sequence
    from ..llm import Parts

#: Seconds between two states that API processes are sent.
TICK = 0.5
#: While the dashboard is looked at: seconds between two profiles of a step, cells of the KV map, and requests that may
#: finish between two states.
_PROFILE_EVERY, _KV_CELLS, _FINISHED_KEPT = 5.0, 2048, 1024
#: Prompt of the first request, which is nobody's.
_WARM_UP_TOKENS = 64
#: Bytes that wait for an API process that does not read. One that lets so much pile up is gone, or as good as.
_BACKLOG = 256 << 20
#: Exit status after a stall: "internal software error" of sysexits.h.
STALLED = 70


@dataclass(frozen=True)
class EngineProcessConfig:
    """engine: fields of an EngineConfig. socket: where API processes connect.

    max_unfinished: requests beyond which more are refused. stall_timeout: seconds without a step after which the
    process prints the stacks of its threads and ends. adapters: folders of LoRA adapters by name. cores: to run on.
    """

    engine: dict[str, Any]
    socket: str
    model_name: str
    max_unfinished: int
    stall_timeout: float
    adapters: dict[str, str] = field(default_factory=dict)
    cores: list[int] | None = None


class EngineServer:
    """Connects an engine with API processes.

    Args:
        parts: belong to this object from now on.
        config: limits and rules of the engine.
        listener: a listening Unix socket.
    """

    def __init__(
        self,
        parts: Parts,
        config: EngineConfig,
        listener: socket.socket,
        *,
        model_name: str = "",
        max_unfinished: int = 1024,
    ) -> None:
        self._parts = parts
        self._config = config
        self._listener = listener
        self._max_unfinished = max_unfinished
        self._grammars = Grammars(parts.tokenizer, parts.vocab_size, parts.eos_token_ids)
        # One thread: a grammar waits for those before it, and the forks of a request come after it.
        self._slow = ThreadPoolExecutor(1, thread_name_prefix="pelton-slow")
        self._energy = EnergyMeter()
        self._connections: dict[int, _Connection] = {}
        self._num_connections = 0
        self._told_until = 0.0
        self._profiled = 0.0
        self._live: dict[str, _Live] = {}
        self._adapters: dict[str, str] = {}  # folders by name
        self._adapters_file: Path | None = None
        self._finished: deque[wire.RequestRecord] = deque(maxlen=_FINISHED_KEPT)
        self._reasons: Counter[str] = Counter()
        _warm_up(engine_of(parts, config), parts.pooler)
        engine = engine_of(parts, config)
        self._now = engine.now
        spec = parts.executor.kv_spec
        self._hello: dict[str, Any] = {
            "version": wire.VERSION, "model": model_name, "max_model_len": engine.max_model_len,
            "max_num_seqs": config.max_num_seqs, "num_blocks": spec.num_blocks, "block_size": spec.block_size,
            "vocab_size": parts.vocab_size, "eos_token_ids": sorted(parts.eos_token_ids),
            "peak_bandwidth": None, "peak_flops": None, "device": config.device, "pooler": parts.pooler,
        }  # fmt: skip
        self.engine = AsyncEngine(engine, self._outputs_came, self._failed)

    def measure_peaks(self) -> None:
        """What MBU and MFU are fractions of; takes a second where it is not known yet."""
        self._hello["peak_bandwidth"] = self._parts.peak_bandwidth()
        self._hello["peak_flops"] = self._parts.peak_flops()

    def load_adapters(self, given: dict[str, str], file: Path) -> None:
        """Load LoRA adapters: those that an engine process before this one has left in ``file``, or else the given.

        Raises:
            PeltonError: one of the given cannot be loaded.
        """
        try:
            kept = json.loads(file.read_text())
        except FileNotFoundError:
            kept = None
        for name, folder in (given if kept is None else kept).items():
            try:
                self.add_adapter(name, folder)
            except PeltonError as error:
                if kept is None:
                    raise
                print(f"pelton: the adapter {name} is lost: {error}", file=sys.stderr, flush=True)
        self._adapters_file = file

    def add_adapter(self, name: str, folder: str) -> None:
        """Load a LoRA adapter beside what runs."""
        adapter = self._parts.read_adapter(folder)
        self.engine.call(lambda engine: engine.add_adapter(name, adapter.identity, adapter.weights)).result()
        self._adapters[name] = folder
        self._keep_adapters()

    def remove_adapter(self, name: str) -> None:
        self.engine.call(lambda engine: engine.remove_adapter(name)).result()
        self._adapters.pop(name, None)
        self._keep_adapters()

    def _keep_adapters(self) -> None:
        """For the process that comes after this one, if this one dies."""
        if self._adapters_file is not None:
            whole = Path(f"{self._adapters_file}.new")
            whole.write_text(json.dumps(self._adapters))
            os.replace(whole, self._adapters_file)  # half a file would keep that process from starting

    def accept(self) -> None:
        """Serve connections until the listener is closed."""
        while True:
            try:
                peer, _ = self._listener.accept()
            except OSError:
                if self._listener.fileno() < 0:
                    return
                time.sleep(0.1)  # too many open files: not for ever
                continue
            self._num_connections += 1
            connection = _Connection(self, self._num_connections, peer)
            connection.send(wire.Hello(**self._hello, adapters=self.engine.adapter_names()))
            self._connections[connection.number] = connection
            connection.start()

    def close(self) -> None:
        self._listener.close()
        self.engine.close()
        for connection in list(self._connections.values()):
            connection.close()
        self._slow.shutdown(cancel_futures=True)
        self._grammars.close()
        self._parts.close()

    def send_states(self) -> None:
        """Tell everybody how the engine stands."""
        watched = any(connection.watching for connection in list(self._connections.values()))
        stats = self.engine.stats()
        state = wire.State(
            time=self._now(), stalled=self.engine.stalled, stats=stats, adapters=self.engine.adapter_names(),
            joules=self._energy.joules(), finished=dict(self._reasons),
        )  # fmt: skip
        if watched:
            # By their times, as the engine goes on meanwhile.
            state.steps = [step for step in self.engine.recent_steps() if step.time > self._told_until]
            for live in list(self._live.values()):
                live.sequence = live.sequence or self.engine.sequence(live.full_id)
                state.requests.append(live.record())
            while self._finished:
                state.requests.append(self._finished.popleft())
            state.kv_map, state.blocks_per_cell = self.engine.kv_map(_KV_CELLS)
            state.operations = self._operations()
        self._told_until = state.steps[-1].time if state.steps else self._told_until if watched else state.time
        data = wire.frame(state)
        for connection in list(self._connections.values()):
            connection.send_frame(data)

    def _operations(self) -> list[tuple[str, float, float | None]] | None:
        """Where the time of a recent step went. Asks for another look now and then."""
        if self._now() - self._profiled > _PROFILE_EVERY:
            self._profiled = self._now()
            self.engine.profile_next_step()
        profile = self.engine.profile()
        if profile is None:
            return None
        bandwidth, flops = self._hello["peak_bandwidth"], self._hello["peak_flops"]
        seconds: dict[str, float] = {}
        least: dict[str, float] = {}
        for call in profile.calls:
            seconds[call.op] = seconds.get(call.op, 0.0) + call.seconds
            if bandwidth and flops:
                bound = max(call.streamed_bytes / bandwidth, call.flops / flops)
                least[call.op] = least.get(call.op, 0.0) + bound
        return [(op, took, least[op] / took if op in least and took else None) for op, took in seconds.items()]

    def _ended(self, full_id: str, reason: str) -> None:
        live = self._live.pop(full_id, None)
        if live is not None:
            record = live.record()
            record.finished, record.reason = self._now(), reason
            self._reasons[reason] += 1
            self._finished.append(record)

    # Called in a connection's thread.

    def received(self, connection: _Connection, message: wire.ToEngine) -> None:
        if isinstance(message, wire.Add):
            self._queue(connection, message)
        elif isinstance(message, wire.Finish):
            self._ended(connection.prefix + message.request_id, message.reason)  # first: _add looks after it has added
            self.engine.finish(connection.prefix + message.request_id, message.reason)
        elif isinstance(message, wire.Watch):
            connection.watching = message.watching
        else:
            self._slow.submit(self._call, connection, message)

    def left(self, connection: _Connection) -> None:
        """An API process is gone: nobody waits for its answers."""
        self._connections.pop(connection.number, None)
        for full_id in list(self._live):
            if full_id.startswith(connection.prefix):
                self._ended(full_id, "abort")
                self.engine.finish(full_id, "abort")

    def _queue(self, connection: _Connection, message: wire.Add) -> None:
        """Take a request in, or refuse it. Counts what the engine will only see after its step."""
        count = message.params.get("n", 1) if message.params.get("use_beam_search") else 1
        ids = answer_ids(message.request_id, count)
        full = message.parent_id is None and len(self._live) >= self._max_unfinished
        if full or (message.parent_id is not None and message.parent_id == connection.refused):
            connection.refused = message.parent_id or message.request_id
            connection.send(wire.Failed(list(ids), "busy", f"{len(self._live)} requests are running or waiting"))
            return
        full_ids = [connection.prefix + request_id for request_id in ids]
        for full_id in full_ids:
            self._live[full_id] = _Live(full_id, message.arrival_time, len(message.prompt_token_ids))
        if "structured_outputs" in message.params:
            self._slow.submit(self._add, connection, message, full_ids)
        else:
            self._add(connection, message, full_ids)

    def _add(self, connection: _Connection, message: wire.Add, full_ids: list[str]) -> None:
        try:
            params: SamplingParams | PoolingParams
            if message.pooling is not None:
                params, grammar = message.pooling, None
            else:
                params = SamplingParams(**message.params)
                if full_ids[0] not in self._live:
                    return  # it was left while others' grammars were compiled
                compiled = self._grammars.compiled(params)
                grammar = None if compiled is None else compiled.copy()  # others may have the same
            self.engine.add_request(
                connection.prefix + message.request_id, message.prompt_token_ids, params,
                arrival_time=message.arrival_time, priority=message.priority, deadline=message.deadline,
                cache=CachePolicy(salt=message.cache_salt), grammar=grammar, adapter=message.adapter,
                parent_id=None if message.parent_id is None else connection.prefix + message.parent_id,
            )  # fmt: skip
        except Exception as error:
            self._failed(full_ids, error)
            return
        for full_id in full_ids:
            if full_id not in self._live:  # it was left while its own was: its end came before it
                self.engine.finish(full_id, "abort")

    def _call(self, connection: _Connection, message: wire.Call) -> None:
        try:
            if message.name == "add_lora":
                self.add_adapter(**message.arguments)
            elif message.name == "remove_lora":
                self.remove_adapter(**message.arguments)
            else:
                raise RequestError(f"there is no call {message.name!r}", "use one version of Pelton in all processes")
            connection.send(wire.Result(message.number))
        except Exception as error:
            text = str(error) if isinstance(error, PeltonError) else f"{type(error).__name__}: {error}"
            connection.send(wire.Result(message.number, error=text))

    # Called in the engine's thread.

    def _outputs_came(self, outputs: list[EngineOutput]) -> None:
        now = self._now()
        by_connection: dict[str, list[wire.Output]] = {}
        for output in outputs:
            full_id = output.request_id
            number, _, request_id = full_id.partition(":")
            sequence = cast("Sequence", output.sequence)
            message = wire.Output(request_id, list(output.token_ids))
            first = len(sequence.output_token_ids) == len(output.token_ids)
            if first and (live := self._live.get(full_id)) is not None:
                live.sequence = sequence
            if output.finish_reason is not None:
                self._ended(full_id, output.finish_reason)
            if first or output.finish_reason is not None:
                metrics = output.metrics or sequence.metrics()
                message.finish_reason, message.stop_reason = output.finish_reason, output.stop_reason
                message.stamps = (metrics.first_scheduled_time, metrics.num_cached_tokens, metrics.num_preemptions)
                if sequence.search is not None:
                    message.token_times = list(metrics.token_times)
                if sequence.prompt_logprobs and output.token_ids and (first or sequence.search is not None):
                    message.prompt_logprobs = wire.plain_logprobs(sequence.prompt_logprobs)
            if output.embedding is not None:
                message.embedding = output.embedding.astype("<f4").tobytes()
            if output.logprobs and output.logprobs[0] is not None:
                message.logprobs = wire.plain_logprobs(output.logprobs)
            by_connection.setdefault(number, []).append(message)
        for number, messages in by_connection.items():
            connection = self._connections.get(int(number))
            if connection is not None:
                connection.send(wire.Outputs(now, messages))

    def _failed(self, request_ids: list[str], error: BaseException) -> None:
        kind = "request" if isinstance(error, RequestError) else "failure"
        text = str(error) if isinstance(error, PeltonError) else f"{type(error).__name__}: {error}"
        if kind == "failure":
            print(f"pelton: {len(request_ids)} requests failed: {text}", file=sys.stderr, flush=True)
        by_connection: dict[str, list[str]] = {}
        for full_id in request_ids:
            self._ended(full_id, "error")
            number, _, request_id = full_id.partition(":")
            by_connection.setdefault(number, []).append(request_id)
        for number, ids in by_connection.items():
            connection = self._connections.get(int(number))
            if connection is not None:
                connection.send(wire.Failed(ids, kind, text))


def _warm_up(engine: LLMEngine, pooler: PoolerConfig) -> None:
    """Answer something, so that the weights are in memory before the first request is. Then the engine is of no use."""
    tokens = max(1, min(_WARM_UP_TOKENS, engine.max_model_len - 2))
    params: SamplingParams | PoolingParams = SamplingParams(temperature=0.0, max_tokens=2, ignore_eos=True)
    if pooler.embeds_only:
        params = PoolingParams("last")
    engine.add_request("warm-up", [0] * tokens, params, cache=CachePolicy(store=False))
    while engine.has_unfinished:
        engine.step(flush=True)


class _Live:
    """An unfinished request, for those who watch; ``sequence`` is there once it has a token, or was looked for."""

    __slots__ = ("arrived", "full_id", "prompt_tokens", "sequence")

    def __init__(self, full_id: str, arrived: float, prompt_tokens: int) -> None:
        self.full_id = full_id
        self.arrived = arrived
        self.prompt_tokens = prompt_tokens
        self.sequence: Sequence | None = None

    def record(self) -> wire.RequestRecord:
        record = wire.RequestRecord(self.full_id, self.arrived, self.prompt_tokens)
        sequence = self.sequence
        if sequence is not None:
            record.scheduled, record.cached_tokens = sequence.first_scheduled_time, sequence.num_cached_tokens
            times = sequence.token_times
            if times:
                record.first_token, record.last_token, record.output_tokens = times[0], times[-1], len(times)
        return record


class _Connection:
    """An API process, as the engine sees it. Sending never waits: what the socket does not take, a thread sends on."""

    def __init__(self, server: EngineServer, number: int, peer: socket.socket) -> None:
        self.number = number
        self.prefix = f"{number}:"
        self.watching = False
        self.refused: str | None = None  # the latest request for which there was no room; its forks follow it
        self._server = server
        self._socket = peer
        self._lock = threading.Condition()
        self._backlog: deque[bytes] = deque()
        self._backlog_bytes = 0
        self.closed = False
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 << 20)

    def start(self) -> None:
        for run, name in ((self._read, "read"), (self._write, "write")):
            threading.Thread(target=run, name=f"pelton-{name}-{self.number}", daemon=True).start()

    def send(self, message: wire.ToApi) -> None:
        self.send_frame(wire.frame(message))

    def send_frame(self, data: bytes) -> None:
        with self._lock:
            if self.closed:
                return
            if not self._backlog:
                try:
                    sent = self._socket.send(data, socket.MSG_DONTWAIT)
                except BlockingIOError:
                    sent = 0
                except OSError:
                    self._shut()
                    return
                if sent == len(data):
                    return
                data = data[sent:]
            self._backlog.append(data)
            self._backlog_bytes += len(data)
            if self._backlog_bytes > _BACKLOG:
                self._shut()
            self._lock.notify()

    def close(self) -> None:
        with self._lock:
            self._shut()

    def _shut(self) -> None:
        self.closed = True
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)  # which ends the reader as well
        self._lock.notify()

    def _read(self) -> None:
        try:
            while (message := wire.receive(self._socket)) is not None:
                self._server.received(self, message)
        except Exception as error:  # whatever it sent: the engine serves others
            if not self.closed:
                print(f"pelton: connection {self.number} is broken: {error}", file=sys.stderr, flush=True)
        self.close()
        self._server.left(self)
        self._socket.close()

    def _write(self) -> None:
        while True:
            with self._lock:
                while not self._backlog and not self.closed:
                    self._lock.wait()
                if self.closed:
                    return
                data = self._backlog[0]
            try:
                self._socket.sendall(data)
            except OSError:
                self.close()
                return
            with self._lock:
                self._backlog.popleft()
                self._backlog_bytes -= len(data)


def watch(server: EngineServer, stall_timeout: float, alive: Any, stopping: threading.Event) -> None:
    """Send states until ``stopping``; end the process with all stacks printed if the engine stalls.

    A thread of C ends it if not even this loop runs, as when an extension holds the interpreter's lock for ever.
    """
    last_resort = -stall_timeout
    while True:
        now = time.monotonic()
        if now - last_resort > stall_timeout / 4:
            faulthandler.dump_traceback_later(1.5 * stall_timeout, exit=True)
            last_resort = now
        if stopping.wait(TICK):
            break
        if server.engine.error is not None:
            print(f"pelton: the engine died: {server.engine.error!r}", file=sys.stderr, flush=True)
            os._exit(1)
        stalled = server.engine.stalled
        if stalled > stall_timeout:
            print(f"pelton: no step for {stalled:.0f} s; stacks of all threads follow", file=sys.stderr, flush=True)
            faulthandler.dump_traceback(all_threads=True)
            os._exit(STALLED)
        server.send_states()
        alive()
    faulthandler.cancel_dump_traceback_later()


def main() -> None:
    from ..build import build

    status = os.fdopen(int(sys.argv[1]), "w", buffering=1)

    def say(**message: Any) -> None:
        with contextlib.suppress(OSError):
            status.write(json.dumps(message) + "\n")

    faulthandler.enable()
    given = EngineProcessConfig(**json.loads(sys.stdin.readline()))
    if given.cores:
        os.sched_setaffinity(0, given.cores)
    config = EngineConfig(**given.engine)
    shown = 0.0

    def progress(done: int, total: int) -> None:
        nonlocal shown
        if time.monotonic() - shown > 0.1 or done >= total:
            shown = time.monotonic()
            say(progress=[done, total])

    stopping, is_up = threading.Event(), threading.Event()

    def outlive_nobody() -> None:
        sys.stdin.read()
        stopping.set()
        if not is_up.is_set():
            os._exit(1)  # there may be minutes of packing to come

    threading.Thread(target=outlive_nobody, name="pelton-parent", daemon=True).start()
    start = time.monotonic()
    try:
        listener = socket.socket(socket.AF_UNIX)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(given.socket + ".new")  # of one that was killed before it was ready
        listener.bind(given.socket + ".new")
        listener.listen()
        server = EngineServer(
            build(config, progress), config, listener,
            model_name=given.model_name, max_unfinished=given.max_unfinished,
        )  # fmt: skip
        server.load_adapters(given.adapters, Path(given.socket + ".adapters"))
        server.measure_peaks()
    except PeltonError as error:
        say(error=str(error))
        sys.exit(2)
    gc.collect()
    gc.freeze()  # the vocabulary is not to be searched for garbage between steps
    os.rename(given.socket + ".new", given.socket)  # whoever finds it can connect
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stopping.set())
    threading.Thread(target=server.accept, name="pelton-accept", daemon=True).start()
    is_up.set()
    say(ready=time.monotonic() - start)
    watch(server, given.stall_timeout, lambda: say(alive=time.monotonic()), stopping)
    server.close()
    sys.stderr.flush()
    os._exit(0)  # threads that read from sockets need not be waited for


def config_line(config: EngineProcessConfig) -> bytes:
    """What the process reads first."""
    return json.dumps(asdict(config)).encode() + b"\n"


if __name__ == "__main__":
    main()
