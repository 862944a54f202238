"""``pelton run``: a chat in the terminal, one answer, or a filter in a pipe."""

from __future__ import annotations

import difflib
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..config import SamplingParams, StructuredOutputsParams
from ..errors import PeltonError, RequestError
from . import options

if TYPE_CHECKING:
    from ..engine.stats import EngineStats
    from ..llm import LLM
    from ..metrics import RequestMetrics
    from ..outputs import RequestOutput

HELP = """\
/help              this list
/clear             start a new conversation
/system TEXT       start a new conversation with this system prompt, or none
/set               show the sampling parameters
/set NAME VALUE    change one: /set temperature 0.7
/lora NAME         start a new conversation with this adapter of --lora, or with none
/stats             statistics after each answer on or off
/exit              leave, as Ctrl-D does; Ctrl-C stops an answer"""

# What /set may change: n answers at once make no conversation, and functions cannot be typed.
SETTABLE = tuple(f.name for f in fields(SamplingParams) if f.name not in ("n", "best_of", "logits_processors"))


@click.command(short_help="Chat in the terminal, or answer once.")
@options.model
@click.option("-p", "--prompt", metavar="TEXT", help="Answer this and leave.")
@click.option("--system", metavar="TEXT", help="System prompt.")
@click.option("--chat/--no-chat", default=True, help="Use the chat template, or continue the raw text.")
@click.option("--temperature", type=float, default=0.7, help="0 is greedy.")
@click.option(
    "--top-p", type=float, default=0.95, help="Keep the likeliest tokens that together have this probability."
)
@click.option("--top-k", type=int, default=0, help="Keep this many tokens; 0: all.")
@click.option("--min-p", type=float, default=0.0, help="Keep tokens at least this likely, relative to the likeliest.")
@click.option(
    "--typical-p", type=float, default=1.0, help="Keep the most typical tokens that together have this probability."
)
@click.option("--repetition-penalty", type=float, default=1.0, help="Above 1 discourages repetition.")
@click.option("--presence-penalty", type=float, default=0.0, help="Above 0 discourages tokens of the answer.")
@click.option("--frequency-penalty", type=float, default=0.0, help="The same, per time that they occurred.")
@click.option("--bad-words", multiple=True, metavar="TEXT", help="Text the answer must not have; may be repeated.")
@click.option(
    "--json-schema", type=click.Path(dir_okay=False), metavar="FILE", help="Answer with JSON that follows this schema."
)
@click.option("--regex", metavar="REGEX", help="The whole answer matches this.")
@click.option("--choice", multiple=True, metavar="TEXT", help="The answer is one of these; may be repeated.")
@click.option("--max-tokens", type=int, default=1024, help="Longest answer, in tokens.")
@click.option("--stop", multiple=True, metavar="TEXT", help="Text that ends the answer; may be repeated.")
@click.option("--seed", type=int, help="Same seed, same answer.")
@options.lora
@options.loading
@click.option("--stats/--no-stats", default=True, help="Print a line of statistics to stderr.")
def run(
    model: str,
    prompt: str | None,
    system: str | None,
    chat: bool,
    stop: tuple[str, ...],
    json_schema: str | None,
    regex: str | None,
    choice: tuple[str, ...],
    lora: tuple[str, ...],
    max_lora_rank: int | None,
    stats: bool,
    engine: dict[str, Any],
    **sampling: Any,
) -> None:
    """Chat with a model in the terminal, or answer once: with -p, or with a prompt from a pipe.

    Answers go to stdout, everything else to stderr. In the chat, /help lists commands, Ctrl-C stops an
    answer and Ctrl-D leaves.

    \b
    Examples:
      pelton run
      pelton run model.gguf -p "Why is the sky blue?" --temperature 0
      git diff | pelton run -p "Write a commit message:"
      pelton run -p "Is the sky green?" --choice yes --choice no
      pelton run org/base-model --lora ./my-adapter
    """
    adapters = options.adapters(lora, max_lora_rank)
    params = SamplingParams(stop=stop, structured_outputs=_structure(json_schema, regex, choice), **sampling)
    interactive = prompt is None and is_terminal(sys.stdin)
    if not interactive:
        prompt = _prompt_text(prompt)

    from ..llm import LLM
    from .progress import packing_progress

    with packing_progress() as progress:
        llm = LLM(model, progress=progress, max_num_seqs=1, **adapters.engine, **engine)
    with llm:
        for name, folder in adapters.folders.items():
            llm.add_lora(name, folder)
        if chat and llm.tokenizer is not None and llm.tokenizer.chat_template is None:
            print("note: the model has no chat template, its raw text goes on (as with --no-chat)", file=sys.stderr)
            chat = False
        session = Session(llm, params, system=system, chat=chat, stats=stats, lora=adapters.first)
        if prompt is not None:
            session.answer(prompt)
        else:
            session.loop(read_line)


def _structure(json_schema: str | None, regex: str | None, choice: tuple[str, ...]) -> StructuredOutputsParams | None:
    """What --json-schema, --regex and --choice ask for."""
    if json_schema is None and regex is None and not choice:
        return None
    schema = None
    if json_schema is not None:
        try:
            schema = Path(json_schema).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise RequestError(f"{json_schema} cannot be read ({error})", "give a file with a JSON schema") from None
    return StructuredOutputsParams(json=schema, regex=regex, choice=choice or None)


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

    def __init__(
        self,
        llm: LLM,
        params: SamplingParams,
        *,
        system: str | None,
        chat: bool,
        stats: bool,
        lora: str | None = None,
    ) -> None:
        self.llm = llm
        self.params = params
        self.system = system
        self.chat = chat
        self.stats = stats
        self.lora = lora
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
                _note("(stopped)")
            except PeltonError as error:
                from .main import print_error

                print_error(str(error))

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
        elif name == "/lora":
            if rest and rest not in self.llm.list_loras():
                raise RequestError(f"no adapter {rest!r}", f"there is: {', '.join(self.llm.list_loras()) or 'none'}")
            self.lora = rest or None
            self.history.clear()
            _note(f"(new conversation with {f'adapter {rest}' if rest else 'the model alone'})")
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
            close = difflib.get_close_matches(name, SETTABLE, n=1)
            raise RequestError(f"no parameter {name!r}", f"did you mean {close[0]}?" if close else "/set shows them")
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
        before = self.llm.get_stats()
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
        except KeyboardInterrupt:
            if not pieces:
                _note("")  # the terminal has written ^C
            raise
        finally:
            if pieces and not pieces[-1].endswith("\n"):
                sys.stdout.write("\n")
                sys.stdout.flush()
            if self.chat:
                self._remember("".join(pieces))
        if self.stats and last is not None and last.metrics is not None:
            _note(statistics_line(last.metrics, before, self.llm.get_stats(), self.llm.peak_bandwidth))

    def _remember(self, answer: str) -> None:
        """Keep the answer, also a partial one; a question that got none is forgotten."""
        if answer:
            self.history.append({"role": "assistant", "content": answer})
        else:
            self.history.pop()

    def _outputs(self, text: str) -> Any:  # a generator of RequestOutput: closing() needs close()
        if not self.chat:
            return self.llm.stream(text, self.params, lora=self.lora)
        return self.llm.chat(self._fitting(), self.params, lora=self.lora, stream=True)

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
    metrics: RequestMetrics,
    before: EngineStats,
    after: EngineStats,
    peak_bandwidth: Callable[[float], float | None],
) -> str:
    """``TTFT 41 ms · TPOT 6.2 ms · 161 tok/s · 128 tokens · MBU 43 %``, as far as these are known."""
    return " · ".join(_statistics(metrics, before, after, peak_bandwidth))


def _statistics(
    metrics: RequestMetrics,
    before: EngineStats,
    after: EngineStats,
    peak_bandwidth: Callable[[float], float | None],
) -> Iterator[str]:
    from ..metrics import mbu

    if metrics.ttft is not None:
        yield f"TTFT {_milliseconds(metrics.ttft)}"
    if metrics.tpot:
        yield f"TPOT {_milliseconds(metrics.tpot)}"
        yield f"{_short(1 / metrics.tpot)} tok/s"
    yield f"{metrics.num_output_tokens} token{'s' * (metrics.num_output_tokens != 1)}"
    num_bytes, seconds = after.decode_bytes - before.decode_bytes, after.decode_seconds - before.decode_seconds
    if num_bytes and seconds and (peak := peak_bandwidth(num_bytes / seconds)):
        share = mbu(num_bytes, seconds, peak)
        # The peak is that of memory; a small model is read from the last-level cache, which is faster.
        yield f"MBU {share * 100:.0f} %" + (" (partly from cache)" if share > 1 else "")


def _milliseconds(seconds: float) -> str:
    return f"{_short(seconds * 1000)} ms"


def _short(value: float) -> str:
    """Two digits or more: 6.2, 41, 1234."""
    return f"{value:.0f}" if value >= 10 else f"{value:.1f}" if value >= 1 else f"{value:.2g}"


def _note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
