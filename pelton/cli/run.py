"""``pelton run``: a chat in the terminal, one answer, or a filter in a pipe."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..config import SamplingParams
from ..errors import PeltonError, RequestError

if TYPE_CHECKING:
    from ..engine.engine import EngineStats
    from ..llm import LLM
    from ..metrics import RequestMetrics
    from ..outputs import RequestOutput

HELP = """\
/help              this list
/clear             start a new conversation
/system TEXT       set the system prompt (and start a new conversation); without TEXT remove it
/set NAME VALUE    change a sampling parameter: /set temperature 0.7; without arguments show them
/stats             statistics after each answer on or off
/exit              leave, as Ctrl-D does; Ctrl-C stops an answer"""

# What /set may change: n answers at once make no conversation.
SETTABLE = tuple(f.name for f in fields(SamplingParams) if f.name != "n")


def run(
    model: Annotated[str, typer.Argument(help="Folder, .gguf file or hub id; none: the demo model.")] = "",
    prompt: Annotated[str | None, typer.Option("-p", "--prompt", help="Answer this and leave.")] = None,
    system: Annotated[str | None, typer.Option(help="System prompt.")] = None,
    chat: Annotated[bool, typer.Option("--chat/--no-chat", help="Chat template, or continue the raw text.")] = True,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.7,
    top_p: Annotated[float, typer.Option(help="Keep the likeliest tokens that have this probability.")] = 0.95,
    top_k: Annotated[int, typer.Option(help="Keep this many tokens; 0: all.")] = 0,
    min_p: Annotated[float, typer.Option(help="Keep tokens at least this likely, relative to the likeliest.")] = 0.0,
    repetition_penalty: Annotated[float, typer.Option(help="Above 1 discourages repetition.")] = 1.0,
    max_tokens: Annotated[int, typer.Option(help="Longest answer, in tokens.")] = 1024,
    stop: Annotated[list[str] | None, typer.Option(help="Text that ends the answer; may be repeated.")] = None,
    seed: Annotated[int | None, typer.Option(help="Same seed, same answer.")] = None,
    threads: Annotated[int | None, typer.Option(help="Threads; none: the cores this process may use.")] = None,
    max_model_len: Annotated[int | None, typer.Option(help="Tokens of context.")] = None,
    dtype: Annotated[str | None, typer.Option(help="Of unquantized weights: auto, f32 or bf16.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu or reference.")] = None,
    stats: Annotated[bool, typer.Option("--stats/--no-stats", help="Print a line of statistics to stderr.")] = True,
) -> None:
    """Chat with a model, or answer once: with -p, or with a prompt from a pipe."""
    params = SamplingParams(
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        max_tokens=max_tokens,
        stop=tuple(stop or ()),
        seed=seed,
    )
    interactive = prompt is None and is_terminal(sys.stdin)
    if not interactive:
        prompt = _prompt_text(prompt)
    options = {"threads": threads, "max_model_len": max_model_len, "dtype": dtype, "device": device}

    from ..llm import LLM

    with LLM(model, **{name: value for name, value in options.items() if value is not None}) as llm:
        session = Session(llm, params, system=system, chat=chat, stats=stats)
        if prompt is not None:
            session.answer(prompt)
        else:
            session.loop(read_line)


def is_terminal(stream: Any) -> bool:
    return bool(stream.isatty())


def _prompt_text(prompt: str | None) -> str:
    """The prompt of a single answer: -p, standard input, or both, in this order."""
    piped = "" if is_terminal(sys.stdin) else sys.stdin.read().strip("\n")
    text = "\n\n".join(part for part in (prompt, piped) if part)
    if not text:
        raise RequestError("the prompt is empty", "give -p TEXT or pipe a text in")
    return text


def read_line() -> str:
    """A line from the terminal. Raises EOFError on Ctrl-D."""
    if is_terminal(sys.stdout):
        return input("> ")
    # input() would write its prompt into what the user redirected.
    print("> ", end="", file=sys.stderr, flush=True)
    line = sys.stdin.readline()
    if not line:
        raise EOFError
    return line.rstrip("\n")


class Session:
    """A conversation. Answers go to stdout, everything else to stderr."""

    def __init__(self, llm: LLM, params: SamplingParams, *, system: str | None, chat: bool, stats: bool) -> None:
        self.llm = llm
        self.params = params
        self.system = system
        self.chat = chat
        self.stats = stats
        self.history: list[dict[str, str]] = []

    def loop(self, read: Callable[[], str]) -> None:
        """Read and answer until the user leaves."""
        with suppress(ImportError):  # not on Windows
            import readline  # noqa: F401  line editing and history in input()
        _note(f"context of {self.llm.max_model_len} tokens; /help lists commands, Ctrl-D leaves")
        while True:
            try:
                line = read().strip()
            except EOFError:
                _note("")
                return
            except KeyboardInterrupt:
                _note("\n(Ctrl-D leaves)")
                continue
            if line in ("/exit", "/quit", "/bye"):
                return
            try:
                if line.startswith("/"):
                    self.command(line)
                elif line:
                    self.answer(line)
            except KeyboardInterrupt:
                _note("\n(stopped)")
            except PeltonError as error:
                from .main import print_error

                print_error(error)

    def command(self, line: str) -> None:
        """Run a /command.

        Raises:
            RequestError: there is no such command, parameter or value.
        """
        name, _, rest = line.partition(" ")
        rest = rest.strip()
        if name == "/help":
            _note(HELP)
        elif name == "/clear":
            self.history.clear()
            _note("(new conversation)")
        elif name == "/system":
            self.system = rest or None
            self.history.clear()
            _note("(new conversation with this system prompt)" if rest else "(new conversation, no system prompt)")
        elif name == "/stats":
            self.stats = not self.stats
            _note(f"(statistics {'on' if self.stats else 'off'})")
        elif name == "/set":
            self._set(rest)
        else:
            raise RequestError(f"no command {name}", "/help lists them")

    def _set(self, text: str) -> None:
        name, _, value = text.partition(" ")
        if not name:
            _note("\n".join(f"{n} = {getattr(self.params, n)!r}" for n in SETTABLE))
            return
        if name not in SETTABLE:
            raise RequestError(f"no parameter {name!r}", f"choose one of {', '.join(SETTABLE)}")
        try:
            parsed: Any = json.loads(value)
        except ValueError:
            parsed = {"none": None, "None": None, "": None}.get(value, value)
        try:
            self.params = replace(self.params, **{name: parsed})
        except TypeError:
            raise RequestError(f"{name} cannot be {value}", "/set alone shows the values") from None
        _note(f"({name} = {getattr(self.params, name)!r})")

    def answer(self, text: str) -> None:
        """Stream the answer to stdout, then the line of statistics to stderr."""
        before = self.llm.stats()
        last: RequestOutput | None = None
        pieces: list[str] = []
        if self.chat:
            self.history.append({"role": "user", "content": text})
        try:
            with closing(self._outputs(text)) as outputs:  # closing aborts the request if Ctrl-C ends the loop
                for last in outputs:
                    pieces.append(last.outputs[0].text)
                    sys.stdout.write(pieces[-1])
                    sys.stdout.flush()
        finally:
            if pieces and not pieces[-1].endswith("\n"):
                sys.stdout.write("\n")
                sys.stdout.flush()
            if self.chat:
                self._remember("".join(pieces))
        if self.stats and last is not None and last.metrics is not None:
            _note(statistics_line(last.metrics, before, self.llm.stats(), self.llm.peak_bandwidth))

    def _remember(self, answer: str) -> None:
        """Keep the answer, also a partial one; a question that got none is forgotten."""
        if answer:
            self.history.append({"role": "assistant", "content": answer})
        else:
            self.history.pop()

    def _outputs(self, text: str) -> Any:  # a generator of RequestOutput: closing() needs close()
        if not self.chat:
            return self.llm.stream(text, self.params)
        return self.llm.chat(self._fitting(), self.params, stream=True)

    def _fitting(self) -> list[dict[str, str]]:
        """The conversation, without its oldest turns if it has outgrown the context."""
        system = [{"role": "system", "content": self.system}] if self.system else []
        limit = self.llm.max_model_len
        # Room for an answer, but no more than a quarter: history is worth more than a limit never reached.
        room = min(self.params.max_tokens or limit, max(1, limit // 4))
        dropped = 0
        while len(self.history) > 1:
            if len(self.llm.conversation(system + self.history).token_ids) + room <= limit:
                break
            del self.history[:2]  # a question and its answer
            dropped += 1
        if dropped:
            turns = "turn" if dropped == 1 else f"{dropped} turns"
            _note(f"(the conversation has outgrown the context of {limit} tokens: dropped the oldest {turns})")
        return system + self.history


def statistics_line(
    metrics: RequestMetrics, before: EngineStats, after: EngineStats, peak_bandwidth: float | None
) -> str:
    """``TTFT 41 ms · TPOT 6.2 ms · 161 tok/s · 128 tokens · MBU 43 %``, as far as these are known."""
    return " · ".join(_statistics(metrics, before, after, peak_bandwidth))


def _statistics(
    metrics: RequestMetrics, before: EngineStats, after: EngineStats, peak_bandwidth: float | None
) -> Iterator[str]:
    from ..metrics import mbu

    if metrics.ttft is not None:
        yield f"TTFT {_milliseconds(metrics.ttft)}"
    if metrics.tpot:
        yield f"TPOT {_milliseconds(metrics.tpot)}"
        yield f"{_short(1 / metrics.tpot)} tok/s"
    yield f"{metrics.num_output_tokens} token{'s' * (metrics.num_output_tokens != 1)}"
    num_bytes, seconds = after.decode_bytes - before.decode_bytes, after.decode_seconds - before.decode_seconds
    if peak_bandwidth and num_bytes and seconds:
        yield f"MBU {mbu(num_bytes, seconds, peak_bandwidth) * 100:.0f} %"


def _milliseconds(seconds: float) -> str:
    return f"{_short(seconds * 1000)} ms"


def _short(value: float) -> str:
    """Two digits or more: 6.2, 41, 1234."""
    return f"{value:.0f}" if value >= 10 else f"{value:.1f}" if value >= 1 else f"{value:.2g}"


def _note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
