"""One HTTP request from its first byte to its last: limits, keys, disconnects, slow readers, the access log."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import logging
import re
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from .config import ServerConfig
from .errors import HttpError, http_error
from .logs import AccessLine

Scope: TypeAlias = "MutableMapping[str, Any]"
Receive: TypeAlias = Callable[[], Awaitable[Any]]
Send: TypeAlias = Callable[[Any], Awaitable[None]]

access_log = logging.getLogger("pelton.access")
log = logging.getLogger("pelton.server")

#: Seconds that a connection may take for its first request's head, or for a later one's once it has begun.
_HEAD_TIMEOUT = 30.0
#: How many times too large a body may be to be read to its end, as clients that are cut off do not see the answer.
_PATIENCE = 8
#: Request ids of clients that are taken over.
_REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}")
_CONNECTION = "pelton.connection"

JSON = b"application/json"
_EVENTS = b"text/event-stream; charset=utf-8"
_NO_CACHE = [(b"cache-control", b"no-cache"), (b"x-accel-buffering", b"no")]


def _nothing() -> None:
    pass


@dataclass(slots=True)
class Reply:
    """A complete answer."""

    body: bytes
    status: int = 200
    media_type: bytes = JSON
    headers: list[tuple[bytes, bytes]] = field(default_factory=list)


@dataclass(slots=True)
class Context:
    """What is known of an HTTP request besides its body; ``log`` is what its line in the access log says besides."""

    scope: Scope
    request_id: str
    arrival_time: float  # seconds of time.monotonic, when the body was there
    log: dict[str, Any] = field(default_factory=dict)

    def header(self, name: bytes) -> str | None:
        for key, value in self.scope["headers"]:
            if key == name:
                return str(value.decode("latin-1"))
        return None


class TokenStream(Protocol):
    """An answer that is sent as it comes, without a task that wakes up for each piece."""

    def open(self, ready: Callable[[], None]) -> None:
        """Begin. ``ready`` is called, in the event loop, whenever there is something to take."""
        ...

    def take(self) -> bytes:
        """What is new, as server-sent events; maybe nothing. Raises what ends the stream before its time."""
        ...

    @property
    def ended(self) -> bool:
        """Whether all has been taken."""
        ...

    def failure(self, error: HttpError) -> bytes | None:
        """What to say of an error in mid-stream; None: the event of the API's error form."""
        ...

    def close(self, error: BaseException | None) -> None:
        """Nothing is taken any more; error: why, if it has not ended."""
        ...


#: Answers at once, streams tokens, or yields other events from time to time.
Handler: TypeAlias = Callable[[bytes, Context], Awaitable["Reply | TokenStream | AsyncIterator[bytes]"]]
#: An error in the form that an API has for it: (the body, what is sent of it within a stream).
ErrorForm: TypeAlias = Callable[[HttpError], tuple[bytes, bytes]]


def openai_error(error: HttpError) -> tuple[bytes, bytes]:
    body = error.to_json()
    return body, b"data: " + body + b"\n\n"


class Connection(HttpToolsProtocol):
    """uvicorn's protocol, which lets the application write without waiting, and drop a reader that has gone to sleep.

    on_writable: called when the reader has caught up.
    """

    _head: asyncio.TimerHandle | None = None
    on_writable: Callable[[], None] | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._head = self.loop.call_later(_HEAD_TIMEOUT, transport.abort)

    def connection_lost(self, exc: Exception | None) -> None:
        self._head_came()
        super().connection_lost(exc)

    def on_message_begin(self) -> None:
        if self._head is None:  # a later request of the connection
            self._head = self.loop.call_later(_HEAD_TIMEOUT, self.transport.abort)
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        self._head_came()
        self.scope["extensions"] = {_CONNECTION: {"connection": self}}
        super().on_headers_complete()

    def resume_writing(self) -> None:
        super().resume_writing()
        if self.on_writable is not None:
            self.on_writable()

    def write_chunk(self, data: bytes) -> None:
        """Send a chunk of a chunked response."""
        self.transport.write(b"%x\r\n%b\r\n" % (len(data), data))

    def _head_came(self) -> None:
        if self._head is not None:
            self._head.cancel()
            self._head = None


class Gate:
    """What every request passes: the limits of a server, and the books of who is being served.

    Args:
        config: limits and keys.
    """

    def __init__(self, config: ServerConfig) -> None:
        self.config = config
        self.draining = False
        self._keys = [key.encode() for key in config.api_keys]
        self._active: dict[_Exchange, None] = {}
        self._to_write: list[tuple[Connection, bytes]] = []

    def write_soon(self, connection: Connection, data: bytes) -> None:
        """Send a chunk in the event loop's next turn, together with those of other connections.

        A step has tokens for all of them, and a reader that wakes up in between costs more than the write itself.
        """
        if not self._to_write:
            asyncio.get_running_loop().call_soon(self.flush)
        self._to_write.append((connection, data))

    def flush(self) -> None:
        """Send now what :meth:`write_soon` was given."""
        ready, self._to_write = self._to_write, []
        for connection, data in ready:
            if not connection.transport.is_closing():  # whoever has left must not take others' tokens along
                connection.write_chunk(data)

    @property
    def num_active(self) -> int:
        """Requests that are being answered."""
        return len(self._active)

    async def check_readers(self) -> None:
        """For ever: end connections that have left what they were sent unread, or did not send what they began."""
        while True:
            await asyncio.sleep(1.0)
            late = time.monotonic() - self.config.send_timeout
            for exchange in list(self._active):
                if exchange.waiting_since is not None and exchange.waiting_since < late:
                    exchange.abort()

    def authorize(self, context: Context) -> None:
        """Raises HttpError 401 without one of the API keys. Takes as long for a wrong one as for a right one."""
        if not self._keys:
            return
        given = context.header(b"authorization") or ""
        scheme, _, token = given.partition(" ")
        key = (token.strip() if scheme.lower() == "bearer" else context.header(b"x-api-key") or "").encode("latin-1")
        right = False
        for known in self._keys:
            right |= hmac.compare_digest(known, key)
        if not right:
            what = "the API key is wrong" if key else "an API key is needed"
            raise HttpError(401, f"{what}; send it as Authorization: Bearer KEY", code="invalid_api_key")

    def endpoint(self, handler: Handler, *, form: ErrorForm = openai_error, free: bool = False) -> Endpoint:
        """An ASGI application for a route. free: no key is needed, and it is there while the server drains."""
        return Endpoint(self, handler, form, free)


class Endpoint:
    """A handler as an ASGI application."""

    def __init__(self, gate: Gate, handler: Handler, form: ErrorForm, free: bool) -> None:
        self.gate = gate
        self.handler = handler
        self.form = form
        self.free = free

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        exchange = _Exchange(self, scope, receive, send)
        self.gate._active[exchange] = None
        try:
            await exchange.run()
        finally:
            del self.gate._active[exchange]


class _Exchange:
    """A request and its answer."""

    def __init__(self, endpoint: Endpoint, scope: Scope, receive: Receive, send: Send) -> None:
        self.waiting_since: float | None = None  # for the client to read, or to send its body
        self._endpoint = endpoint
        self._gate = endpoint.gate
        self._scope = scope
        self._receive = receive
        self._send_event = send
        self._status = 0
        self._disconnected = False
        self._task: asyncio.Task[Any] | None = None
        self._ready: Callable[[], None] = _nothing  # called when there are tokens
        self._last_words: bytes | None = None
        self._started = time.monotonic()
        extension = scope.get("extensions", {}).get(_CONNECTION)
        self._connection: Connection | None = None if extension is None else extension["connection"]

    def abort(self) -> None:
        """The client has gone to sleep: drop the connection with what it has not read."""
        if self._connection is not None:
            self._connection.transport.abort()

    async def run(self) -> None:
        context = Context(self._scope, _request_id(self._scope), self._started)
        self._task = asyncio.current_task()
        watch: asyncio.Task[None] | None = None
        try:
            try:
                self._admit(context)
                body = await self._body()
                context.arrival_time = time.monotonic()
                watch = asyncio.create_task(self._watch())
                result = await self._endpoint.handler(body, context)
                if isinstance(result, Reply):
                    await self._reply(result, context)
                elif isinstance(result, AsyncIterator):
                    await self._stream(result, context)
                else:
                    await self._send_tokens(result, context)
            except asyncio.CancelledError:
                if not self._disconnected:
                    raise
            except Exception as error:
                if not self._disconnected:
                    await self._error(error, context)
        finally:
            if watch is not None:
                watch.cancel()
            self._log(context)

    def _admit(self, context: Context) -> None:
        if self._endpoint.free:
            return
        if self._gate.draining:
            text = "the server is shutting down; ask another one"
            raise HttpError(503, text, code="shutting_down", retry_after=5.0)
        self._gate.authorize(context)

    async def _body(self) -> bytes:
        limit = self._gate.config.max_body_bytes
        declared = _content_length(self._scope)
        if declared is not None and declared > _PATIENCE * limit:
            raise _too_large(limit)
        chunks, size = [], 0
        self.waiting_since = time.monotonic()
        while True:
            message = await self._receive()
            if message["type"] == "http.disconnect":
                self._disconnected = True
                raise asyncio.CancelledError
            chunk = message.get("body", b"")
            size += len(chunk)
            if size <= limit:
                chunks.append(chunk)
            if size > _PATIENCE * limit:
                raise _too_large(limit)
            if not message.get("more_body", False):
                self.waiting_since = None
                if size > limit:
                    raise _too_large(limit)
                return b"".join(chunks)

    async def _watch(self) -> None:
        """Cancel the answer as soon as the client is gone."""
        while True:
            message = await self._receive()
            if message["type"] == "http.disconnect":
                break
        self._disconnected = True
        assert self._task is not None
        self._task.cancel()

    async def _send(self, message: dict[str, Any]) -> None:
        self.waiting_since = time.monotonic()
        await self._send_event(message)
        self.waiting_since = None

    async def _start(self, status: int, media_type: bytes, headers: list[tuple[bytes, bytes]], ctx: Context) -> None:
        self._status = status
        head = [(b"content-type", media_type), (b"x-request-id", ctx.request_id.encode("latin-1")), *headers]
        head.append((b"request-id", head[1][1]))  # the same, under the name that Anthropic's client reads
        if self._gate.draining:
            head.append((b"connection", b"close"))
        await self._send({"type": "http.response.start", "status": status, "headers": head})

    async def _reply(self, reply: Reply, context: Context) -> None:
        headers = [*reply.headers, (b"content-length", str(len(reply.body)).encode())]
        await self._start(reply.status, reply.media_type, headers, context)
        body = b"" if self._scope["method"] == "HEAD" else reply.body
        await self._send({"type": "http.response.body", "body": body, "more_body": True})
        await self._send({"type": "http.response.body", "body": b""})  # waits until the client has read most of it

    async def _send_tokens(self, stream: TokenStream, context: Context) -> None:
        """Stream tokens: the first with the head of the response, the others from within ``ready``."""
        news, error = asyncio.Event(), None
        self._ready = news.set
        try:
            stream.open(lambda: self._ready())
            while not (data := stream.take()) and not stream.ended:
                news.clear()
                await news.wait()
            await self._start(200, _EVENTS, _NO_CACHE, context)
            await self._send({"type": "http.response.body", "body": data, "more_body": True})
            if self._connection is not None and self._scope["http_version"] == "1.1":
                await self._write_tokens(stream, self._connection)
            else:
                while not stream.ended:
                    if data := stream.take():
                        await self._send({"type": "http.response.body", "body": data, "more_body": True})
                    else:
                        news.clear()
                        await news.wait()
            await self._send({"type": "http.response.body", "body": b""})
        except BaseException as raised:
            error = raised
            if isinstance(raised, Exception):
                self._last_words = stream.failure(http_error(raised))
            raise
        finally:
            self._ready = _nothing
            stream.close(error)

    async def _write_tokens(self, stream: TokenStream, connection: Connection) -> None:
        """Write each piece in the turn in which it comes in, past ASGI, whose messages take a task's turn each."""
        over = asyncio.get_running_loop().create_future()

        def write() -> None:
            if over.done():
                return
            if connection.flow.write_paused:  # what comes is gathered until the reader has caught up
                self.waiting_since = self.waiting_since or time.monotonic()
                return
            self.waiting_since = None
            try:
                if data := stream.take():
                    self._gate.write_soon(connection, data)
                if stream.ended:
                    over.set_result(None)
            except Exception as error:
                over.set_exception(error)

        self._ready = connection.on_writable = write
        try:
            write()
            await over
        finally:
            connection.on_writable = None
            self._gate.flush()  # before what goes through ASGI again

    async def _stream(self, events: AsyncIterator[bytes], context: Context) -> None:
        async with contextlib.aclosing(events):  # type: ignore[type-var]
            first = await anext(events)  # what is refused is refused with a status of its own
            await self._start(200, _EVENTS, _NO_CACHE, context)
            await self._send({"type": "http.response.body", "body": first, "more_body": True})
            async for event in events:
                await self._send({"type": "http.response.body", "body": event, "more_body": True})
        await self._send({"type": "http.response.body", "body": b""})

    async def _error(self, error: Exception, context: Context) -> None:
        told = http_error(error)
        context.log["error"] = told.body.message
        if told.body.code == "internal_error":
            log.error("request %s failed", context.request_id, exc_info=error)
        body, event = self._endpoint.form(told)
        if self._status:  # in mid-stream
            event = self._last_words or event
            await self._send({"type": "http.response.body", "body": event, "more_body": True})
            await self._send({"type": "http.response.body", "body": b""})
            return
        headers = []
        if told.retry_after is not None:
            headers.append((b"retry-after", str(max(1, round(told.retry_after))).encode()))
        if told.status == 401:
            headers.append((b"www-authenticate", b"Bearer"))
        if told.status == 413:  # the rest of the body is not read
            headers.append((b"connection", b"close"))
        await self._reply(Reply(body, told.status, JSON, headers), context)

    def _log(self, context: Context) -> None:
        config = self._gate.config
        if self._endpoint.free and self._status < 400:  # probes, every few seconds
            return
        if not config.access_log or not access_log.isEnabledFor(logging.INFO):
            return
        client = self._scope.get("client") or ("-", 0)
        fields = {
            "client": client[0], "method": self._scope["method"], "path": self._scope["path"],
            "status": 499 if self._disconnected else self._status, "request_id": context.request_id,
            "seconds": round(time.monotonic() - self._started, 4), **context.log,
        }  # fmt: skip
        access_log.info("%s", AccessLine(fields))


def _request_id(scope: Scope) -> str:
    for name, value in scope["headers"]:
        if name == b"x-request-id":
            text = value.decode("latin-1")
            if _REQUEST_ID.fullmatch(text):
                return str(text)
    return uuid.uuid4().hex


def _content_length(scope: Scope) -> int | None:
    for name, value in scope["headers"]:
        if name == b"content-length" and value.isdigit():
            return int(value)
    return None


def _too_large(limit: int) -> HttpError:
    return HttpError(413, f"the body has more than {limit} bytes, which is the limit", code="body_too_large")
