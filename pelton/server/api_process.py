"""A process that speaks HTTP: ``python -m pelton.server.api_process STATUS_FD LISTEN_FD``.

Reads an ApiProcessConfig as JSON from standard input, whose end is also the end of the process. SIGTERM: no new
requests, then the end, when all answers are complete or ``drain_timeout`` is over. It says how it gets on in lines of
JSON on STATUS_FD: ``{"ready": true}``, ``{"error": text}``, and ``{"alive": seconds}`` as long as its event loop turns.
"""

from __future__ import annotations

import asyncio
import contextlib
import faulthandler
import gc
import json
import os
import resource
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator

import msgspec
import uvicorn

from ..errors import PeltonError
from .app import create_app
from .config import ApiProcessConfig
from .http import Connection, Gate
from .logs import set_up_logging


class Server(uvicorn.Server):
    """uvicorn's, whose signals are handled here: answers go on for a while after SIGTERM."""

    def __init__(self, config: uvicorn.Config, gate: Gate, drain_timeout: float) -> None:
        super().__init__(config)
        self._gate = gate
        self._drain_timeout = drain_timeout
        self._draining: asyncio.Task[None] | None = None

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.drain)
        yield

    def drain(self) -> None:
        """Begin to end; a second time: end now."""
        if self._draining is not None:
            self.should_exit = self.force_exit = True
            return
        self._gate.draining = True
        self._draining = asyncio.get_running_loop().create_task(self._drain())

    async def _drain(self) -> None:
        end = time.monotonic() + self._drain_timeout
        while self._gate.num_active and time.monotonic() < end:
            await asyncio.sleep(0.05)
        self.should_exit = True


def main() -> None:
    faulthandler.enable()
    status_fd, listen_fd = int(sys.argv[1]), int(sys.argv[2])
    given = msgspec.json.decode(sys.stdin.readline(), type=ApiProcessConfig)
    with contextlib.suppress(ValueError, OSError):  # every client is an open file, and 1024 is a usual limit
        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    set_up_logging(given.server.log_format)
    with os.fdopen(status_fd, "w", buffering=1) as status:
        try:
            server = _server(given)
        except PeltonError as error:
            status.write(json.dumps({"error": str(error)}) + "\n")
            sys.exit(2)

        def outlive_nobody() -> None:
            sys.stdin.read()
            os.kill(os.getpid(), signal.SIGTERM)

        threading.Thread(target=outlive_nobody, name="pelton-parent", daemon=True).start()
        listener = socket.socket(fileno=listen_fd)
        gc.collect()
        gc.freeze()  # the vocabulary is not to be searched for garbage beside streams

        async def serve() -> None:
            serving = asyncio.ensure_future(server.serve(sockets=[listener]))
            while not server.started and not serving.done():
                await asyncio.sleep(0.005)
            if server.started:
                status.write(json.dumps({"ready": True}) + "\n")
            while not serving.done():
                await asyncio.wait([serving], timeout=1.0)
                with contextlib.suppress(OSError):  # whoever listened is gone, and so will this be
                    status.write(json.dumps({"alive": time.monotonic()}) + "\n")
            await serving

        import uvloop

        uvloop.run(serve())


def _server(given: ApiProcessConfig) -> Server:
    """Raises PeltonError: the model or another option cannot be used."""
    config = given.server
    gate = Gate(config)
    app = create_app(config, given.sockets, gate)
    http = uvicorn.Config(
        app, http=Connection, loop="uvloop", ws="none", lifespan="on", log_config=None, access_log=False,
        server_header=False, proxy_headers=False, timeout_keep_alive=75, timeout_graceful_shutdown=1,
        ssl_certfile=config.ssl_certfile, ssl_keyfile=config.ssl_keyfile, backlog=2048,
    )  # fmt: skip
    return Server(http, gate, config.drain_timeout)


if __name__ == "__main__":
    main()
