"""A server that speaks the contract of the web pages with scripted answers: for tests of the pages alone.

It serves the page files with the headers of the real server, /v1/models, /v1/chat/completions and /dashboard/events.
What it answers is set from the test; what it got is kept for the test to read.
"""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from pelton.server.pages import _POLICY, _TYPES

WEB = Path(__file__).parents[2] / "pelton" / "server" / "web"
HEADERS = {
    "Content-Security-Policy": _POLICY,
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-cache",
}

# One thing that the server does while it answers: ("text" | "think" | "raw" | "error", str), ("wait", seconds),
# ("gate", threading.Event) waits until the test opens it, ("cut", "") closes without an end.
Act = tuple[str, Any]


class FakeApi:
    """`url` is known from the start; start() and stop() may be called in turn, the port stays."""

    def __init__(self) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port: int = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.reset()

    def reset(self) -> None:
        """As new: one model, no key, echoes."""
        self.models: list[dict[str, Any]] = [{"id": "tiny/Wheel-135M", "object": "model", "max_model_len": 8192}]
        self.key: str | None = None
        self.script: Sequence[Act] | None = None
        self.refusal: tuple[int, str, dict[str, str]] | None = None  # status, message, headers
        self.bodies: list[dict[str, Any]] = []
        self.disconnects = 0
        self.dashboard: list[dict[str, Any]] = []  # messages, sent in turn; the last one is repeated
        self.interval_s = 0.05
        self.dashboard_readers = 0

    def start(self) -> None:
        routes = [
            Route("/", self._index),
            Route("/dashboard", self._dashboard_page),
            Route("/web/{name}", self._file),
            Route("/v1/models", self._models),
            Route("/v1/chat/completions", self._chat, methods=["POST"]),
            Route("/dashboard/events", self._events),
        ]
        config = uvicorn.Config(
            Starlette(routes=routes), port=self.port, log_level="critical", ws="none", lifespan="off"
        )
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, daemon=True)
        self._thread.start()
        end = time.monotonic() + 10
        while not self._server.started:
            if time.monotonic() > end or not self._thread.is_alive():
                raise RuntimeError(f"the test double did not start on port {self.port}")
            time.sleep(0.01)

    def stop(self) -> None:
        self._server.should_exit = self._server.force_exit = True
        self._thread.join(10)

    async def _index(self, request: Request) -> Response:
        return page("index.html")

    async def _dashboard_page(self, request: Request) -> Response:
        return page("dashboard.html")

    async def _file(self, request: Request) -> Response:
        return page(request.path_params["name"])

    def _denied(self, request: Request) -> Response | None:
        if self.key is None or request.headers.get("authorization") == f"Bearer {self.key}":
            return None
        return error(401, "The API key is missing or wrong.")

    async def _models(self, request: Request) -> Response:
        return self._denied(request) or JSONResponse({"object": "list", "data": self.models})

    async def _chat(self, request: Request) -> Response:
        if denied := self._denied(request):
            return denied
        body = await request.json()
        self.bodies.append(body)
        if self.refusal:
            status, message, headers = self.refusal
            return error(status, message, headers)
        return StreamingResponse(self._answer(request, body), media_type="text/event-stream")

    async def _answer(self, request: Request, body: dict[str, Any]) -> AsyncIterator[str]:
        acts: Sequence[Act] | None = self.script
        if acts is None and "response_format" in body:
            acts = [("text", json.dumps({"asked_for": body["response_format"]}))]
        elif acts is None:
            acts = [("text", "You said: "), ("text", body["messages"][-1]["content"])]
        count = 0

        def chunk(choices: list[dict[str, Any]], **more: object) -> str:
            whole = {"id": "c-1", "object": "chat.completion.chunk", "model": body["model"], "choices": choices, **more}
            return f"data: {json.dumps(whole)}\n\n"

        def delta(**content: object) -> str:
            return chunk([{"index": 0, "delta": content, "finish_reason": None}])

        finished = False
        try:
            yield delta(role="assistant", content="")
            for kind, value in acts:
                if kind == "wait":
                    await asyncio.sleep(value)
                elif kind == "gate":
                    while not value.is_set():
                        await asyncio.sleep(0.005)
                elif kind == "error":
                    fields = {"message": value, "type": "server_error", "param": None, "code": 500}
                    yield f"data: {json.dumps({'error': fields})}\n\n"
                    finished = True
                    return
                elif kind == "cut":
                    finished = True
                    return
                elif kind == "raw":
                    yield value
                else:
                    count += 1
                    yield delta(**{"content" if kind == "text" else "reasoning_content": value})
            yield chunk([{"index": 0, "delta": {}, "finish_reason": "stop"}])
            yield chunk([], usage={"prompt_tokens": 12, "completion_tokens": count, "total_tokens": 12 + count})
            yield "data: [DONE]\n\n"
            finished = True
        finally:
            if not finished:
                self.disconnects += 1

    async def _events(self, request: Request) -> Response:
        return self._denied(request) or StreamingResponse(self._feed(), media_type="text/event-stream")

    async def _feed(self) -> AsyncIterator[str]:
        self.dashboard_readers += 1
        turn = 0
        while True:
            if self.dashboard:
                message = self.dashboard[min(turn, len(self.dashboard) - 1)]
                yield f"data: {json.dumps(message)}\n\n"
                turn += 1
            await asyncio.sleep(self.interval_s)


def page(name: str) -> Response:
    path = WEB / name
    if not path.is_file():
        return error(404, f"There is no file {name!r}.")
    return FileResponse(path, media_type=_TYPES[path.suffix[1:]].decode(), headers=HEADERS)


def error(status: int, message: str, headers: dict[str, str] | None = None) -> Response:
    fields = {"message": message, "type": "invalid_request_error", "param": None, "code": None}
    return JSONResponse({"error": fields}, status_code=status, headers=headers)
