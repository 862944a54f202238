"""The parent of a server's processes: starts them, starts what dies again, and ends them in the right order."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import shutil
import signal
import socket
import ssl
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from ..errors import PeltonError
from .config import ApiProcessConfig, ServerConfig
from .engine_process import EngineProcessConfig, config_line

log = logging.getLogger("pelton.server")

#: What processes run.
ENGINE_MODULE, API_MODULE = "pelton.server.engine_process", "pelton.server.api_process"
#: Seconds before a process that died is started again: doubled with each time that it was not up for a minute.
_BACKOFF, _LONGEST_BACKOFF, _LONG_ENOUGH = 0.5, 30.0, 60.0
#: Deaths in a row without ever being ready after which the server gives up.
_MOST_FAILURES = 5
#: Seconds that a process has to end after it was told to, before it is killed.
_LAST_SECONDS = 10.0


class _FatalError(Exception):
    """There is no use in going on: the text says why."""


@dataclass
class _Child:
    """A process that is to run all the time. engine: or else it is an API process."""

    name: str
    engine: bool
    process: asyncio.subprocess.Process | None = None
    ready: bool = False
    last_alive: float = 0.0
    failures: int = 0
    task: asyncio.Task[None] | None = field(default=None, repr=False)

    def __str__(self) -> str:
        return f"{'engine' if self.engine else 'API process'} {self.name}"


class Supervisor:
    """Runs a server until it is told to end.

    Args:
        config: of the API processes.
        engine: the fields of an EngineConfig; its model is a path.
        adapters: folders of LoRA adapters by name.
        on_progress: called with (done, total) bytes while weights are packed.
        on_ready: called when everything is up for the first time, with the port and the seconds that it took.

    Raises:
        PeltonError: the address cannot be listened on, or the certificate is of no use.
    """

    def __init__(
        self,
        config: ServerConfig,
        engine: Mapping[str, Any],
        adapters: Mapping[str, str] | None = None,
        *,
        on_progress: Callable[[int, int], None] = lambda done, total: None,
        on_ready: Callable[[int, float], None] = lambda port, seconds: None,
    ) -> None:
        self._config = config
        self._engine = dict(engine)
        self._adapters = dict(adapters or {})
        self._on_progress = on_progress
        self._on_ready = on_ready
        self._started = time.monotonic()
        self._ending = False
        self._is_up = False
        _check_certificate(config)
        self._listener = listen(config.host, config.port)
        self.port: int = self._listener.getsockname()[1]
        self._folder = Path(tempfile.mkdtemp(prefix="pelton-"))  # for its owner only
        self._children = [_Child(str(i), True) for i in range(config.replicas)]
        self._children += [_Child(str(i), False) for i in range(config.api_processes)]

    async def run(self) -> int:
        """The exit status, when all has ended."""
        loop = asyncio.get_running_loop()
        stop = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._signal, stop)
        error: BaseException | None = None
        try:
            for child in self._children:
                child.task = asyncio.create_task(self._keep(child))
            waiting = asyncio.create_task(stop.wait())
            watching = asyncio.create_task(self._watch())
            tasks = [child.task for child in self._children if child.task is not None]
            done, _ = await asyncio.wait([waiting, watching, *tasks], return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                if task is not waiting:
                    error = error or task.exception()
            waiting.cancel()
            watching.cancel()
        finally:
            await self._end()
            self._listener.close()
            shutil.rmtree(self._folder, ignore_errors=True)
        if isinstance(error, _FatalError):
            raise PeltonError(str(error))
        if error is not None:
            raise error
        return 0

    def _signal(self, stop: asyncio.Event) -> None:
        if stop.is_set():  # somebody is in a hurry
            for child in self._children:
                if child.process is not None and child.process.returncode is None:
                    child.process.kill()
        stop.set()

    async def _keep(self, child: _Child) -> None:
        """Run a process, again and again."""
        backoff = _BACKOFF
        while True:
            start = time.monotonic()
            await self._run_once(child)
            if self._ending:
                return
            assert child.process is not None
            code = child.process.returncode
            child.failures = 0 if child.ready else child.failures + 1
            child.ready = False
            if child.failures >= _MOST_FAILURES or (child.failures and not self._is_up):
                raise _FatalError(f"{child} ended with status {code} before it was ready; its messages are above")
            if time.monotonic() - start > _LONG_ENOUGH:
                backoff = _BACKOFF
            log.error("%s ended with status %s; it is started again in %.1f s", child, code, backoff)
            await asyncio.sleep(backoff)
            backoff = min(2 * backoff, _LONGEST_BACKOFF)

    async def _run_once(self, child: _Child) -> None:
        read_end, write_end = os.pipe()
        listen_fd = self._listener.fileno()
        if child.engine:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._socket(child.name))
            command, fds = [ENGINE_MODULE, str(write_end)], (write_end,)
            line = config_line(self._engine_config(int(child.name)))
        else:
            command = [API_MODULE, str(write_end), str(listen_fd)]
            fds = (write_end, listen_fd)  # type: ignore[assignment]
            sockets = [self._socket(c.name) for c in self._children if c.engine]
            line = msgspec.json.encode(ApiProcessConfig(self._config, sockets)) + b"\n"
        try:
            # A session of its own: Ctrl-C in a terminal is for this process, which ends the others in order.
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", *command, stdin=asyncio.subprocess.PIPE, pass_fds=fds, start_new_session=True,
                env=self._environment(),
            )  # fmt: skip
        finally:
            os.close(write_end)
        child.process, child.last_alive = process, time.monotonic()
        assert process.stdin is not None
        with contextlib.suppress(ConnectionError):
            process.stdin.write(line)
            await process.stdin.drain()
        await self._listen_to(child, read_end)
        await process.wait()
        process.stdin.close()
        for file in (self._folder / "metrics").glob(f"gauge_live*_{process.pid}.db"):
            file.unlink()  # else its requests would be counted for ever

    async def _listen_to(self, child: _Child, read_end: int) -> None:
        """Hear what a process says of itself, until it ends."""
        reader = asyncio.StreamReader()
        transport, _ = await asyncio.get_running_loop().connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(read_end, "rb")
        )
        try:
            while line := await reader.readline():
                message = json.loads(line)
                child.last_alive = time.monotonic()
                if "error" in message:
                    if not self._is_up:
                        raise _FatalError(message["error"])
                    log.error("%s: %s", child, message["error"])
                if "progress" in message:
                    self._on_progress(*message["progress"])
                if "ready" in message:
                    child.ready = True
                    if not self._is_up and all(c.ready for c in self._children):
                        self._is_up = True
                        _tell_systemd("READY=1")
                        self._on_ready(self.port, time.monotonic() - self._started)
                    elif self._is_up:
                        log.info("%s is back", child)
        finally:
            transport.close()

    async def _watch(self) -> None:
        """A process that neither works nor ends, not even itself, is killed."""
        while True:
            await asyncio.sleep(1.0)
            for child in self._children:
                silent = time.monotonic() - child.last_alive
                process = child.process
                if child.ready and process is not None and silent > 2 * self._config.stall_timeout:
                    log.error("%s has been silent for %.0f s and is killed", child, silent)
                    child.last_alive = time.monotonic()
                    with contextlib.suppress(ProcessLookupError):
                        process.send_signal(signal.SIGABRT)  # prints its stacks, if it still can
                        await asyncio.sleep(1.0)
                        process.kill()

    async def _end(self) -> None:
        """First those that speak to clients, whose answers may need the engines until their end."""
        self._ending = True
        _tell_systemd("STOPPING=1")
        for child in self._children:
            if child.task is not None and (child.process is None or child.process.returncode is not None):
                child.task.cancel()  # it was to be started again
        await self._stop([c for c in self._children if not c.engine], self._config.drain_timeout + _LAST_SECONDS)
        await self._stop([c for c in self._children if c.engine], _LAST_SECONDS)
        for child in self._children:
            if child.task is not None:
                child.task.cancel()
        await asyncio.gather(*(c.task for c in self._children if c.task is not None), return_exceptions=True)

    async def _stop(self, children: Sequence[_Child], seconds: float) -> None:
        running = [c.process for c in children if c.process is not None and c.process.returncode is None]
        for process in running:
            with contextlib.suppress(ProcessLookupError):
                process.terminate()
        if not running:
            return
        _, late = await asyncio.wait([asyncio.ensure_future(p.wait()) for p in running], timeout=seconds)
        if late:
            log.error("%d processes did not end in %.0f s and are killed", len(late), seconds)
            for process in running:
                with contextlib.suppress(ProcessLookupError):
                    process.kill()
            await asyncio.wait(late)

    def _socket(self, name: str) -> str:
        return str(self._folder / f"engine-{name}")

    def _engine_config(self, index: int) -> EngineProcessConfig:
        config = self._config
        cores = None
        if config.replicas > 1:  # each has its share
            all_cores = sorted(os.sched_getaffinity(0))
            share = max(1, len(all_cores) // config.replicas)
            start = index * share % len(all_cores)
            cores = all_cores[start : start + share]
        return EngineProcessConfig(
            self._engine, self._socket(str(index)), config.model_names[0],
            max_unfinished=config.max_queue + self._engine["max_num_seqs"], stall_timeout=config.stall_timeout,
            adapters=self._adapters, cores=cores,
        )  # fmt: skip

    def _environment(self) -> dict[str, str]:
        environment = dict(os.environ)
        if self._config.api_processes > 1:  # where their metrics are added up
            folder = self._folder / "metrics"
            folder.mkdir(exist_ok=True)
            environment["PROMETHEUS_MULTIPROC_DIR"] = str(folder)
        return environment


def _tell_systemd(state: str) -> None:
    """Of a unit of Type=notify: https://www.freedesktop.org/software/systemd/man/latest/sd_notify.html"""
    address = os.environ.get("NOTIFY_SOCKET")
    if address:
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
            notify.sendto(state.encode(), address.replace("@", "\0", 1) if address.startswith("@") else address)


def _check_certificate(config: ServerConfig) -> None:
    if config.ssl_certfile is None or config.ssl_keyfile is None:
        return
    try:
        # The password keeps OpenSSL from asking the terminal for one.
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(config.ssl_certfile, config.ssl_keyfile, password="")
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise PeltonError(
            f"{config.ssl_certfile} and {config.ssl_keyfile} cannot be used for TLS ({reason})",
            "give a certificate and its key as PEM files, without a password",
        ) from None


def listen(host: str, port: int) -> socket.socket:
    """A listening socket.

    Raises:
        PeltonError: the address is unknown, in use, or not allowed.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0][0]
        return socket.create_server((host, port), family=family, backlog=2048)
    except (OSError, UnicodeError) as error:
        is_errno = isinstance(error, OSError) and not isinstance(error, socket.gaierror) and error.errno
        reason = os.strerror(error.errno) if is_errno else str(error)  # type: ignore[union-attr, arg-type]
        raise PeltonError(f"cannot listen on {host} port {port} ({reason})", "choose --host or --port") from None
