"""HTTP/1.1 for load tests: bodies are handed on, with the time, in the very call in which the socket was read.

General clients queue what they read and wake a task for it later, after whatever else is ready; with hundreds of
streams that delay is part of every gap between tokens. Here a chunk costs one callback and no task.
"""

from __future__ import annotations

import asyncio
import ssl
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import cast
from urllib.parse import urlsplit

from ..errors import PeltonError

#: Takes a piece of a body and the time (time.monotonic) of the read that brought it.
Sink = Callable[[bytes, float], None]
_CONNECT_SECONDS = 30.0


class ExchangeError(Exception):
    """An exchange that did not end. kind: "connect", "timeout" or "cut"."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


@dataclass(slots=True)
class Exchange:
    """A request on its way and the head of its response; times are of time.monotonic.

    sent: before connecting. connected: when the request was written, on a new connection or one in use before.
    """

    sent: float = 0.0
    connected: float | None = None
    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)


class HttpClient:
    """Connections to one server, as many as there are exchanges at a time; ended exchanges leave theirs for others.

    Raises:
        PeltonError: ``base_url`` is no http or https URL, a header has other characters than Latin-1's printable ones,
            or httptools is not installed.
    """

    def __init__(self, base_url: str, headers: Mapping[str, str] | None = None) -> None:
        try:
            import httptools  # noqa: F401
        except ImportError:
            raise PeltonError("the HTTP client needs httptools", "pip install httptools (or 'pelton[bench]')") from None
        self.base_url = _checked(base_url)
        parts = urlsplit(self.base_url)
        assert parts.hostname is not None
        self._ssl = ssl.create_default_context() if parts.scheme == "https" else None
        self._host = parts.hostname
        self._port = parts.port or (443 if self._ssl else 80)
        self._prefix = parts.path
        fields = {"Host": parts.netloc.rpartition("@")[2], "User-Agent": "pelton-bench", **(headers or {})}
        if not all(value.isprintable() and all(c < "\u0100" for c in value) for value in fields.values()):
            raise PeltonError("the API key has characters that a header cannot have", "check --api-key, OPENAI_API_KEY")
        self._head = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
        self._address: str | None = None  # the one that answered
        self._idle: list[_Connection] = []
        self._all: set[_Connection] = set()

    async def exchange(
        self, method: str, path: str, body: bytes | None, sink: Sink, timeout: float, exchange: Exchange | None = None
    ) -> Exchange:
        """Send a request and hand its response to ``sink`` until that ends.

        timeout: seconds for everything, connecting included. exchange: filled in as things happen, so that the
        caller has them after an error, too.

        Raises:
            ExchangeError: no connection, no end within ``timeout``, or the connection ended first.
        """
        exchange = exchange or Exchange()
        request = self._request(method, path, body)
        exchange.sent = time.monotonic()
        while True:
            reused = bool(self._idle)
            connection = self._idle.pop() if reused else await self._connect(timeout)
            if connection.is_closed:
                if reused:
                    continue
                raise ExchangeError("cut", "the server closed the connection at once, or spoke before it was asked")
            left = exchange.sent + timeout - time.monotonic()
            try:
                await connection.run(request, exchange, sink, left)
            except ExchangeError as error:
                # A server may close an idle connection at any time; it has not seen what came after that.
                if reused and error.kind == "cut" and not connection.heard:
                    continue
                raise
            finally:
                if connection.is_reusable:
                    self._idle.append(connection)
                else:
                    connection.abort()
                    self._all.discard(connection)
            return exchange

    async def get(self, path: str, timeout: float = 10.0) -> tuple[int, bytes]:
        """Status and body. Raises ExchangeError as :meth:`exchange`."""
        parts: list[bytes] = []
        done = await self.exchange("GET", path, None, lambda data, _: parts.append(data), timeout)
        return done.status, b"".join(parts)

    def close(self) -> None:
        for connection in self._all:
            connection.abort()

    def _request(self, method: str, path: str, body: bytes | None) -> bytes:
        lines = f"{method} {self._prefix}{path} HTTP/1.1\r\n{self._head}"
        if body is None:
            return f"{lines}Accept: */*\r\n\r\n".encode("latin-1")
        lines += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\nAccept: text/event-stream\r\n\r\n"
        return lines.encode("latin-1") + body

    async def _connect(self, timeout: float) -> _Connection:
        loop = asyncio.get_running_loop()
        name = self._host if self._ssl else None
        limit = min(timeout, _CONNECT_SECONDS)
        problem: Exception | None = None
        try:
            for address in await self._addresses(loop):
                try:
                    connecting = loop.create_connection(
                        _Connection, address, self._port, ssl=self._ssl, server_hostname=name
                    )
                    _, connection = await asyncio.wait_for(connecting, limit)
                except (OSError, asyncio.TimeoutError) as error:
                    problem = error
                    continue
                self._address = address
                self._all.add(connection)
                return connection
        except (OSError, UnicodeError) as error:  # UnicodeError: what stands there can be no name of a host
            problem = error
        if isinstance(problem, asyncio.TimeoutError):
            raise ExchangeError("connect", f"no connection within {limit:g} s")
        text = problem.strerror if isinstance(problem, OSError) and problem.strerror else str(problem)
        raise ExchangeError("connect", text or type(problem).__name__)

    async def _addresses(self, loop: asyncio.AbstractEventLoop) -> list[str]:
        if self._address is not None:  # no look-up in a thread for each connection
            return [self._address]
        found = await loop.getaddrinfo(self._host, self._port, type=1)  # SOCK_STREAM
        return list(dict.fromkeys(str(info[4][0]) for info in found))


class _Connection(asyncio.Protocol):
    """One exchange after the other. ``heard``: something came since the last request."""

    def __init__(self) -> None:
        import httptools

        self._new_parser = httptools.HttpResponseParser
        self._transport: asyncio.Transport | None = None
        self._done: asyncio.Future[None] | None = None
        self._now = 0.0
        self._ends_with_connection = False
        self.heard = False
        self.is_closed = False
        self.is_reusable = False

    async def run(self, request: bytes, exchange: Exchange, sink: Sink, timeout: float) -> None:
        loop = asyncio.get_running_loop()
        assert self._transport is not None
        self._done = loop.create_future()
        self._exchange, self._sink = exchange, sink
        self._parser = self._new_parser(self)
        self.heard = self.is_reusable = self._ends_with_connection = False
        exchange.status, exchange.headers = 0, {}
        timer = loop.call_later(max(0.0, timeout), self._fail, "timeout", "no end within the time limit")
        self._transport.write(request)
        exchange.connected = time.monotonic()
        try:
            await self._done
        finally:
            timer.cancel()
            self._done = None

    def abort(self) -> None:
        self.is_closed = True
        if self._transport is not None:
            self._transport.abort()

    def _fail(self, kind: str, message: str) -> None:
        if self._done is not None and not self._done.done():
            self._done.set_exception(ExchangeError(kind, message))

    # asyncio's side

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is of no class of asyncio's

    def data_received(self, data: bytes) -> None:
        self._now = time.monotonic()
        if self._done is None or self._done.done():
            self.abort()  # nobody asked for this
            return
        self.heard = True
        try:
            self._parser.feed_data(data)
        except Exception as error:
            if error.__context__ is not None:  # raised by the sink
                self._done.set_exception(error.__context__)
            else:
                self._fail("cut", f"the server does not speak HTTP/1.1 ({error})")

    def connection_lost(self, error: Exception | None) -> None:
        self.is_closed, self.is_reusable = True, False
        if self._ends_with_connection and error is None and self._done is not None and not self._done.done():
            self._done.set_result(None)
            return
        reason = getattr(error, "strerror", None) or str(error) if error else "the server closed the connection"
        self._fail("cut", reason)

    # the parser's side

    def on_header(self, name: bytes, value: bytes) -> None:
        self._exchange.headers[name.decode("latin-1").lower()] = value.decode("latin-1")

    def on_headers_complete(self) -> None:
        headers = self._exchange.headers
        self._exchange.status = self._parser.get_status_code()
        self._ends_with_connection = "content-length" not in headers and "transfer-encoding" not in headers

    def on_body(self, data: bytes) -> None:
        self._sink(data, self._now)

    def on_message_complete(self) -> None:
        self.is_reusable = not self.is_closed and self._parser.should_keep_alive()
        if self._done is not None and not self._done.done():
            self._done.set_result(None)


def _checked(base_url: str) -> str:
    """Without the /v1 that clients of OpenAI write at the end."""
    url = base_url.strip()
    url = (url if "://" in url else f"http://{url}").rstrip("/")
    try:
        parts = urlsplit(url)
        fine = parts.scheme in ("http", "https") and parts.hostname and (parts.port or 1) and url.isascii()
    except ValueError:  # a port that is no number, brackets that do not close
        fine = False
    if not fine or any(c.isspace() for c in url):
        raise PeltonError(f"--base-url is {base_url!r}", "give http://host:port")
    return url.removesuffix("/v1").rstrip("/")
