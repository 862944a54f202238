"""The engine in a thread of its own, for callers that must not wait: servers, event loops.

While a step runs in native code the interpreter is free, so the thread that takes the outputs turns tokens into text
and streams them in that time.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from typing import Any, TypeVar

from ..backends.base import StepProfile
from ..config import PoolingParams, SamplingParams
from ..errors import PeltonError, RequestError
from .engine import EngineOutput, LLMEngine
from .request import Sequence, answer_ids, num_answers
from .stats import EngineStats, StepRecord

_T = TypeVar("_T")

#: Seconds between two looks at a static or dynamic batch that waits to be filled.
_POLL = 0.002
#: Seconds without a request after which the books of the KV cache are checked.
_IDLE = 0.5


class EngineDeadError(PeltonError):
    """The engine failed in a way that it cannot answer anybody any more."""


class AsyncEngine:
    """Steps an LLMEngine whenever there is something to do. All methods may be called from any thread.

    Args:
        engine: belongs to this object from now on.
        on_outputs: called in the engine's thread with what a step brought; must be quick and must not raise.
        on_failure: called in the engine's thread when a step raised: all requests that were there are gone, each
            to be told the error. New ones may be added; the engine goes on.
    """

    def __init__(
        self,
        engine: LLMEngine,
        on_outputs: Callable[[list[EngineOutput]], None],
        on_failure: Callable[[list[str], BaseException], None],
    ) -> None:
        self._engine = engine
        self._on_outputs = on_outputs
        self._on_failure = on_failure
        self._commands: deque[Callable[[], None]] = deque()
        self._wake = threading.Condition()
        self._stopping = False
        self._dead: BaseException | None = None
        self._unfinished: set[str] = set()
        self._stats = engine.stats()
        self._step_began: float | None = None
        self._last_step = engine.now()
        self._thread = threading.Thread(target=self._run, name="pelton-engine", daemon=True)
        self._thread.start()

    def add_request(
        self, request_id: str, prompt_token_ids: Iterable[int], params: SamplingParams | PoolingParams, **options: Any
    ) -> None:
        """As :meth:`LLMEngine.add_request`; ids must be new.

        Raises:
            RequestError: the request is refused, now and here.
            EngineDeadError: there is no engine any more.
        """
        self._require_alive()
        prompt = tuple(prompt_token_ids)
        self._engine.validate(prompt, params)
        self._engine.adapters.get(options.get("adapter"))
        options.setdefault("arrival_time", self._engine.now())
        if not self._unfinished:
            self._last_step = self._engine.now()  # it has been idle, not stalled
        self._command(lambda: self._add(request_id, prompt, params, options))

    def _add(
        self, request_id: str, prompt: tuple[int, ...], params: SamplingParams | PoolingParams, options: dict[str, Any]
    ) -> None:
        try:
            ids = self._engine.add_request(request_id, prompt, params, **options)
        except RequestError as error:  # its adapter was removed in the meantime
            ids = answer_ids(request_id, num_answers(params))
            self._on_failure(list(ids), error)
            return
        self._unfinished.update(ids)

    def finish(self, request_id: str, reason: Any = "abort") -> None:
        """End a request, if it is still there; no output of it is on its way afterwards but those that are already."""

        def end() -> None:
            if request_id in self._unfinished:
                self._unfinished.discard(request_id)
                if self._engine.is_unfinished(request_id):  # the answers of a beam search end together
                    self._engine.finish(request_id, reason)

        self._command(end)

    def call(self, function: Callable[[LLMEngine], _T]) -> Future[_T]:
        """Run a function on the engine between two steps.

        Raises:
            EngineDeadError: there is no engine any more.
        """
        self._require_alive()
        future: Future[_T] = Future()

        def run() -> None:
            try:
                future.set_result(function(self._engine))
            except BaseException as error:
                future.set_exception(error)

        self._command(run)
        return future

    def stats(self) -> EngineStats:
        """Totals as of the last step."""
        return self._stats

    def adapter_names(self) -> list[str]:
        """Those that requests may name."""
        return self._engine.adapters.names()

    def recent_steps(self) -> list[StepRecord]:
        """The latest steps, without waiting for the one that runs."""
        return self._engine.steps()  # one copy of a deque: nothing comes between in an interpreter with a lock

    def sequence(self, request_id: str) -> Sequence | None:
        """An unfinished one, without waiting for the step that runs: to look at."""
        return self._engine.sequence(request_id)

    def kv_map(self, most: int) -> tuple[bytes, int]:
        """As :meth:`LLMEngine.kv_map`, without waiting for the step that runs: a picture, not the books."""
        return self._engine.kv_map(most)

    def profile_next_step(self) -> None:
        """Measure every kernel call of a step to come, which then takes twice as long: see :meth:`profile`."""
        self._engine.profile_next = True

    def profile(self) -> StepProfile | None:
        """What was measured last; None if nothing was, or the backend cannot."""
        return self._engine.profile

    @property
    def num_unfinished(self) -> int:
        """Requests that were added and have not ended."""
        return len(self._unfinished)

    @property
    def stalled(self) -> float:
        """Seconds since anything happened although there is something to do: how long the current step has run, or
        since the last one while requests wait. 0 if there is nothing to do."""
        began = self._step_began
        if began is not None:
            return self._engine.now() - began
        return self._engine.now() - self._last_step if self._unfinished else 0.0

    @property
    def error(self) -> BaseException | None:
        """Why the engine has died; None while it lives."""
        return self._dead

    def close(self) -> None:
        """End the thread, after the step that runs. Requests that are unfinished get nothing more. Idempotent."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _require_alive(self) -> None:
        if self._dead is not None or self._stopping:
            raise EngineDeadError(f"the engine has stopped ({self._dead or 'closed'})", "start a new one")

    def _command(self, command: Callable[[], None]) -> None:
        with self._wake:
            self._commands.append(command)
            self._wake.notify()

    def _run(self) -> None:
        try:
            while self._next():
                pass
        except BaseException as error:  # a bug of ours: nobody may wait for an answer that never comes
            self._dead = error
            self._on_failure(sorted(self._unfinished), error)
            self._unfinished.clear()

    def _next(self) -> bool:
        """Take commands and run a step, or wait for something to do. False at the end."""
        if not self._engine.has_unfinished:
            self._wait()
        if self._commands:
            while self._commands:
                self._commands.popleft()()
            self._stats = self._engine.stats()
        if self._stopping:
            return False
        if not self._engine.has_unfinished:
            return True
        steps = self._stats.steps
        self._step_began = self._engine.now()
        try:
            outputs = self._engine.step()
        except Exception as error:
            self._fail(error)
            return True
        finally:
            self._step_began, self._last_step = None, self._engine.now()
        self._stats = self._engine.stats()
        for output in outputs:
            if output.finish_reason is not None:
                self._unfinished.discard(output.request_id)
        if outputs:
            self._on_outputs(outputs)
        elif self._stats.steps == steps:  # a batch waits for others
            time.sleep(_POLL)
        return True

    def _wait(self) -> None:
        checked = False
        with self._wake:
            while not self._commands and not self._stopping:
                if not self._wake.wait(None if checked else _IDLE) and not checked:
                    self._engine.check()  # raises if a block was lost, which ends the engine
                    checked = True

    def _fail(self, error: BaseException) -> None:
        """Nobody knows which request a failed step is to blame on, and to try again might fail for ever."""
        gone = sorted(self._unfinished)
        self._unfinished.clear()
        for request_id in gone:
            self._engine.abort(request_id)
        self._stats = self._engine.stats()
        self._on_failure(gone, error)
