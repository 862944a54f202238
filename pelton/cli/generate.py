"""``pelton generate``: a file of prompts in, a file of answers out, resumable.

The answers are appended line by line as they get ready. Beside the output lies ``OUTPUT.meta.json``, which
says what it was made from. A run that was killed is continued by the same command; a last line that
was cut off is dropped and its prompt answered again. Prompts without a seed get one from the run's seed and
their index, so an interrupted run gives the same answers as an unbroken one.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import click

from ..config import SamplingParams
from ..errors import PeltonError, RequestError
from . import options

if TYPE_CHECKING:
    from ..llm import LLM
    from ..outputs import CompletionOutput, RequestOutput
    from ..prompts import Prompt

PROMPT_KEYS = ("prompt", "messages", "prompt_token_ids")
#: What a run may be continued with another value of.
_ANSWERS_ARE_THE_SAME = ("isa", "threads", "gpu_memory_utilization", "enforce_eager")
SAMPLING_KEYS = tuple(f.name for f in fields(SamplingParams) if f.name != "logits_processors")  # functions


@click.command(short_help="Answer a file of prompts, resumable.")
@options.model
@click.option("-i", "--input", required=True, type=click.Path(path_type=Path), help="JSON lines of prompts.")
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="JSON lines of answers.")
@click.option("--temperature", type=float, help="For lines without their own; 0 is greedy.")
@click.option("--top-p", type=float, help="For lines without their own.")
@click.option("--top-k", type=int, help="For lines without their own.")
@click.option("--min-p", type=float, help="For lines without their own.")
@click.option("--typical-p", type=float, help="For lines without their own.")
@click.option("--max-tokens", type=int, help="For lines without their own.")
@click.option("--seed", type=int, default=0, help="Each line's seed comes from it, unless it has its own.")
@options.max_num_seqs
@options.loading
@click.option("--token-ids", is_flag=True, help="Write token_ids of the answers, too.")
@click.option("--overwrite", is_flag=True, help="Start anew if the output exists.")
def generate(
    model: str,
    input: Path,
    output: Path,
    seed: int,
    max_num_seqs: int,
    token_ids: bool,
    overwrite: bool,
    engine: dict[str, Any],
    **defaults: Any,
) -> None:
    """Answer a file of prompts. A run that was killed goes on with the same command.

    Each input line is a JSON object with prompt, messages or prompt_token_ids, an optional id, and any
    sampling parameter. The output has a line per prompt, in the order of completion, with id, text,
    finish_reason and usage. A prompt that the model refuses (too long, say) gets a line with "error",
    and is tried again by the next run; the last line of an index counts.

    \b
    Examples:
      pelton generate -i prompts.jsonl -o answers.jsonl --temperature 0
      pelton generate model.gguf -i in.jsonl -o out.jsonl --max-num-seqs 128

    \b
    A line of the input:
      {"prompt": "The capital of France is", "max_tokens": 8}
      {"id": "q1", "messages": [{"role": "user", "content": "Hi"}]}
    """
    given = {name: value for name, value in defaults.items() if value is not None}
    raw = read_file(input)
    tasks = read_tasks(raw, input, given, seed)
    if output.exists() and input.exists() and output.samefile(input):
        raise RequestError("--input and --output are the same file", "choose another --output")
    made_from = {
        "input_sha256": hashlib.sha256(raw).hexdigest(),
        "model": model,
        "sampling": given,
        "seed": seed,
        **{name: value for name, value in engine.items() if name not in _ANSWERS_ARE_THE_SAME},
        "token_ids": token_ids,
    }
    with _opened(output, made_from, overwrite) as (sink, done):
        missing = [task for task in tasks if task.index not in done]
        for task in tasks:
            if task.index in done and done[task.index] != task.id:
                raise RequestError(
                    f"{output} has id {done[task.index]!r} at index {task.index}, the input has {task.id!r}",
                    "choose another --output or --overwrite",
                )
        if not missing:
            print(f"all {len(tasks)} answers are in {output}", file=sys.stderr)
            return

        from ..llm import LLM
        from .progress import packing_progress

        with packing_progress() as progress:
            llm = LLM(model, progress=progress, max_num_seqs=max_num_seqs, **engine)
        with llm:
            refused = _answer(llm, missing, len(tasks), sink, token_ids)
    if refused:
        raise RequestError(f"{refused} of {len(tasks)} prompts were refused", f"see 'error' in {output}")


@dataclass(frozen=True, slots=True)
class Task:
    """One line of the input. ``index`` counts lines that are not blank, from 0."""

    index: int
    id: str | int
    kind: str  # one of PROMPT_KEYS
    prompt: Any
    params: SamplingParams


def read_file(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise RequestError(f"cannot read {path} ({error.strerror})", "give a file of JSON lines") from None


def read_tasks(raw: bytes, path: Path, defaults: dict[str, Any], seed: int) -> list[Task]:
    """Check every line before anything is loaded.

    Raises:
        RequestError: a line is wrong; the message names file and line.
    """
    from ..engine.request import derive_seed

    tasks: list[Task] = []
    lines_of_ids: dict[str | int, int] = {}
    for number, line in enumerate(raw.split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            task = _task(json.loads(line), len(tasks), defaults)
            if task.id in lines_of_ids:
                raise RequestError(f"id {task.id!r} is that of line {lines_of_ids[task.id]}", "make ids unique")
        except PeltonError as error:
            raise RequestError(f"{path} line {number}: {error}") from None
        except ValueError as error:  # of json, and of bytes that are no UTF-8
            raise RequestError(f"{path} line {number}: no JSON ({error})", "write one JSON object per line") from None
        lines_of_ids[task.id] = number
        if task.params.seed is None:
            task = replace(task, params=replace(task.params, seed=derive_seed(seed, task.index)))
        tasks.append(task)
    if not tasks:
        raise RequestError(f"{path} holds no prompt", "write one JSON object per line")
    return tasks


def _task(line: Any, index: int, defaults: dict[str, Any]) -> Task:
    if not isinstance(line, dict):
        raise RequestError("no JSON object", 'write {"prompt": "..."}')
    for key in line:
        known = (*PROMPT_KEYS, "id", *SAMPLING_KEYS)
        if key not in known:
            close = difflib.get_close_matches(key, known, n=1)
            raise RequestError(f"unknown field {key!r}", f"did you mean {close[0]}?" if close else "remove it")
    present = [key for key in PROMPT_KEYS if key in line]
    if len(present) != 1:
        raise RequestError(f"has {' and '.join(present) or 'no prompt'}", f"give one of {', '.join(PROMPT_KEYS)}")
    (kind,) = present
    prompt = line[kind]
    if kind == "prompt" and not isinstance(prompt, str):
        raise RequestError("prompt is no text", "give a string")
    if kind == "messages" and not (
        isinstance(prompt, list)
        and prompt
        and all(isinstance(message, dict) and "role" in message and "content" in message for message in prompt)
    ):
        raise RequestError("messages is no conversation", 'give [{"role": "user", "content": "..."}]')
    if kind == "prompt_token_ids" and not (
        isinstance(prompt, list) and prompt and all(type(token) is int for token in prompt)
    ):
        raise RequestError("prompt_token_ids is no list of token ids", "give integers")
    identifier = line.get("id", index)
    if type(identifier) not in (str, int):
        raise RequestError("id is neither text nor integer", "give one of them")
    try:
        params = SamplingParams(**(defaults | {key: line[key] for key in SAMPLING_KEYS if key in line}))
    except TypeError:  # a list where a number belongs, or the reverse
        raise RequestError("a sampling parameter has the wrong type", "compare with SamplingParams") from None
    return Task(index, identifier, kind, prompt, params)


@contextmanager
def _opened(
    output: Path, made_from: dict[str, Any], overwrite: bool
) -> Iterator[tuple[IO[bytes], dict[int, str | int]]]:
    """The output, open for appending and locked, and {index: id} of the answers that it has.

    Raises:
        RequestError: it was made from something else, is damaged, is in use, or cannot be written.
    """
    sidecar = output.with_name(output.name + ".meta.json")
    try:
        sink = output.open("a+b")
    except OSError as error:
        raise RequestError(f"cannot write {output} ({error.strerror})", "choose another --output") from None
    with sink:
        _lock(sink, output)
        if overwrite:
            sink.truncate(0)
        sink.seek(0)
        content = sink.read()
        if content:
            _check_origin(output, sidecar, made_from)
        done, length = _read_answers(content, output)
        sink.truncate(length)
        if not length:
            # Complete before the first answer is written, so that no answer is ever without its origin.
            draft = sidecar.with_name(sidecar.name + ".tmp")
            draft.write_text(json.dumps(made_from, indent=1) + "\n", encoding="utf-8")
            os.replace(draft, sidecar)
        yield sink, done


def _lock(sink: IO[bytes], output: Path) -> None:
    try:
        import fcntl
    except ImportError:  # no such locks on Windows
        return
    try:
        fcntl.flock(sink, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise RequestError(f"another run is writing {output}", "wait for it or choose another --output") from None


def _check_origin(output: Path, sidecar: Path, made_from: dict[str, Any]) -> None:
    try:
        before = json.loads(sidecar.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        before = None
    if not isinstance(before, dict):
        raise RequestError(
            f"{output} exists and {sidecar.name}, which says what it was made from, does not",
            "choose another --output or --overwrite",
        )
    differing = [name for name in made_from if before.get(name) != made_from[name]]
    if differing:
        what = ", ".join("input" if name == "input_sha256" else name for name in differing)
        raise RequestError(f"{output} was made from another {what}", "choose another --output or --overwrite")


def _read_answers(content: bytes, output: Path) -> tuple[dict[int, str | int], int]:
    """{index: id} of what need not be answered again, and the length in bytes of the complete lines.

    A prompt that was refused is tried again: its later line replaces the earlier one.
    """
    done: dict[int, str | int] = {}
    length = content.rfind(b"\n") + 1
    for number, line in enumerate(content[:length].split(b"\n")[:-1], 1):
        try:
            answer = json.loads(line)
            index, identifier = answer["index"], answer["id"]
            if "error" not in answer:
                done[index] = identifier
        except (ValueError, KeyError, TypeError):
            raise RequestError(f"{output} line {number}: no answer of Pelton", "repair it or --overwrite") from None
    return done, length


def _answer(llm: LLM, tasks: list[Task], total: int, sink: IO[bytes], token_ids: bool) -> int:
    """Append the answers; the number of refused prompts."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn
    from rich.text import Text

    start = time.monotonic()

    def rate() -> str:
        return f"{llm.get_stats().output_tokens / max(time.monotonic() - start, 1e-9):.0f} tok/s"

    class Rate(ProgressColumn):
        def render(self, task: Any) -> Text:
            return Text(rate())

    def prompts() -> Iterator[tuple[Prompt, SamplingParams]]:
        for task in tasks:
            yield {task.kind: task.prompt}, task.params

    console = Console(stderr=True)
    columns = (TextColumn("prompts"), BarColumn(), MofNCompleteColumn(), Rate(), TextColumn("ETA"))
    finished, refused = total - len(tasks), 0
    with Progress(*columns, TimeRemainingColumn(), console=console, disable=not console.is_terminal) as bar:
        shown = bar.add_task("", total=total, completed=finished)
        try:
            for index, result in llm.as_completed(prompts()):
                task = tasks[index]
                if isinstance(result, RequestError):
                    refused += 1
                    row: dict[str, Any] = {"index": task.index, "id": task.id, "error": str(result)}
                else:
                    row = _row(task, result, token_ids or llm.tokenizer is None)
                sink.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
                sink.flush()
                finished += 1
                bar.update(shown, completed=finished)
        except KeyboardInterrupt:
            bar.stop()
            print(f"stopped after {finished} of {total}; the same command goes on", file=sys.stderr)
            raise
    stats = llm.get_stats()
    print(
        f"{finished} of {total} prompts · {stats.prompt_tokens} prompt and {stats.output_tokens} output tokens"
        f" in {time.monotonic() - start:.1f} s · {rate()}",
        file=sys.stderr,
    )
    return refused


def _row(task: Task, result: RequestOutput, token_ids: bool) -> dict[str, Any]:
    """The line of an answer; with n > 1 the answers are under ``outputs``, the first also at the top."""
    completions = [_completion(completion, token_ids) for completion in result.outputs]
    num_prompt, num_output = len(result.prompt_token_ids), sum(len(o.token_ids) for o in result.outputs)
    row: dict[str, Any] = {"index": task.index, "id": task.id, **completions[0]}
    if len(completions) > 1:
        row["outputs"] = completions
    row["usage"] = {
        "prompt_tokens": num_prompt,
        "completion_tokens": num_output,
        "total_tokens": num_prompt + num_output,
    }
    return row


def _completion(completion: CompletionOutput, token_ids: bool) -> dict[str, Any]:
    row: dict[str, Any] = {"text": completion.text, "finish_reason": completion.finish_reason}
    if completion.stop_reason is not None:
        row["stop_reason"] = completion.stop_reason
    if token_ids:
        row["token_ids"] = list(completion.token_ids)
    if completion.logprobs is not None:
        row["logprobs"] = completion.logprobs
    return row
