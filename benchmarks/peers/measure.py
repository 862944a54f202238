"""Runs the workers in turns and collects what they say."""

from __future__ import annotations

import os
import random
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from . import weights
from .catalogue import MAX_LEN, Model, Peer, Precision, Workload
from .environments import SetupError, python_of
from .process import Worker, WorkerError
from .statistics import agreement, decode_limit, figure, prefill_limit, ratio

#: "The capital of France is" to the demo model; to random weights as good as any other.
GREEDY_PROMPT = [504, 3575, 282, 4649, 314]
GREEDY = 16  # tokens that are compared with Pelton's
LOAD, CONVERT, RUN = 900.0, 1800.0, 900.0  # seconds before a worker counts as hung
SPARE = 3 << 30  # bytes that stay free while workers wait, for the one that runs
ROOT = Path(__file__).parent.parent.parent


@dataclass
class Options:
    work: Path
    threads: int
    rounds: int
    batch_rounds: int
    cold_rounds: int
    workloads: tuple[Workload, ...]


@dataclass
class Variant:
    """A peer with one precision of one model."""

    peer: Peer
    precision: Precision
    path: Path = Path()
    size: int = 0  # bytes on disk
    python: Path = Path()
    failure: str = ""
    note: str = ""
    version: str = ""
    settings: dict[str, Any] = field(default_factory=dict)
    greedy: list[int] = field(default_factory=list)
    samples: dict[str, list[float]] = field(default_factory=dict)  # tokens/s, seconds, GiB

    @property
    def name(self) -> str:
        return f"{self.peer.title} {self.precision.name}"

    def add(self, key: str, value: float) -> None:
        self.samples.setdefault(key, []).append(value)


class Pool:
    """Workers that stay loaded between their turns, as far as memory goes; one at a time runs."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self._workers: dict[str, Worker] = {}  # by the variant's name, the last used one last
        self._warm: set[tuple[str, str]] = set()
        self.peak_rss: dict[str, int] = {}  # bytes, by the variant's name

    def start(self, variant: Variant) -> Worker:
        """A new process, loaded. Not kept."""
        options = self.options
        worker = Worker([variant.python, variant.peer.worker], _variables(options), _log(options, variant))
        reply = worker.call(
            "load", LOAD, model=str(variant.path), precision=variant.precision.name, threads=options.threads,
            max_len=MAX_LEN, max_seqs=max((w.sequences for w in options.workloads), default=1),
        )  # fmt: skip
        variant.version, variant.settings = reply["version"], reply["settings"]
        return worker

    def take(self, variant: Variant) -> Worker:
        """The variant's worker, every other one paused."""
        worker = self._workers.pop(variant.name, None)
        for other in self._workers.values():
            other.pause()
        if worker is None:
            # Turns go round, so what ran last is what is wanted last: the others are worth keeping.
            while self._workers and available_memory() < 2 * variant.size + SPARE:
                self.drop(next(reversed(self._workers)))
            worker = self.start(variant)
        self._workers[variant.name] = worker
        worker.resume()
        time.sleep(0.05)  # what was stopped in the middle of a spin has stopped now
        return worker

    def first_time(self, variant: Variant, load: Workload) -> bool:
        """True once per loaded worker and workload: it has to warm up."""
        key = (variant.name, load.name)
        new = key not in self._warm
        self._warm.add(key)
        return new

    def drop(self, name: str) -> None:
        worker = self._workers.pop(name, None)
        if worker is not None:
            self.peak_rss[name] = max(self.peak_rss.get(name, 0), worker.peak_rss())
            worker.close()
        self._warm = {key for key in self._warm if key[0] != name}

    def close(self) -> None:
        for name in list(self._workers):
            self.drop(name)


def measure_model(model: Model, peers: list[Peer], options: Options, say: Callable[[str], None]) -> dict[str, Any]:
    """Everything about one model. Failures are part of the result; nothing is raised for them."""
    folder = options.work / "models" / model.name
    folder.mkdir(parents=True, exist_ok=True)
    variants = [
        Variant(peer, precision, failure="" if takes_part(precision, model) else precision.elsewhere)
        for peer in peers
        for precision in peer.precisions
        if precision.bits in model.bits and (takes_part(precision, model) or precision.elsewhere)
    ]
    for variant in variants:
        say(f"{variant.name}: {variant.failure or 'preparing'}")
        _try(variant, say, partial(_prepare, variant, model, folder, options, say))
    peaks: list[dict[str, Any]] = []
    neighbours = Neighbours()
    for bits in model.bits:
        group = [v for v in variants if v.precision.bits == bits]
        if any(not v.failure for v in group):
            peaks.append(measure_peaks(options))
            _measure_group(group, model, options, say)
    if peaks:
        peaks.append(measure_peaks(options))
    return _result(model, variants, options, peaks) | {"cpu_used_by_others": round(neighbours.share(), 3)}


def takes_part(precision: Precision, model: Model) -> bool:
    return not precision.only or model.name in precision.only


def _prepare(variant: Variant, model: Model, folder: Path, options: Options, say: Callable[[str], None]) -> None:
    """The environment and the model in the peer's format; made once."""
    precision = variant.precision
    if model.gguf_only and precision.source != "gguf":
        raise SetupError("its converter would start from a bf16 folder, which is not made at this size")
    variant.python = python_of(variant.peer, options.work)
    if precision.source == "gguf":
        # In all engines the same file: names differ in case only.
        name = precision.name.upper()
        variant.path = _made(folder / f"{name}.gguf", lambda path: weights.write_gguf(model, path, name))
        variant.size = variant.path.stat().st_size
        variant.note = precision.note
        return

    def write_folder(path: Path) -> None:
        path.mkdir()
        weights.write_folder(model, path)

    source = _made(folder / "hf", write_folder)
    variant.note = precision.note
    if precision.source == "hf":
        variant.path = source
    else:
        notes = folder / f"{variant.peer.name}-{precision.name}.note"

        def convert(path: Path) -> None:
            say(f"{variant.name}: converting")
            worker = Worker([variant.python, variant.peer.worker], _variables(options), _log(options, variant))
            try:
                fields = {"source": str(source), "destination": str(path), "precision": precision.name}
                notes.write_text(str(worker.call("convert", CONVERT, **fields)["note"]))
            finally:
                worker.close()

        variant.path = _made(folder / f"{variant.peer.name}-{precision.name}", convert)
        variant.note = "; ".join(n for n in (precision.note, notes.read_text()) if n)
    variant.size = sum(f.stat().st_size for f in variant.path.rglob("*") if f.is_file())


def _made(path: Path, make: Callable[[Path], None]) -> Path:
    """`path`, made by make() under another name first: what has the right name is complete."""
    if not path.exists():
        half = path.with_name(path.name + ".partial")
        shutil.rmtree(half, ignore_errors=True)
        half.unlink(missing_ok=True)
        make(half)
        half.rename(path)
    return path


def _try(variant: Variant, say: Callable[[str], None], run: Callable[[], None]) -> bool:
    """Run it unless the variant has failed; its failure is noted, not raised."""
    if variant.failure:
        return False
    try:
        run()
    except (WorkerError, SetupError, OSError, MemoryError) as error:
        variant.failure = str(error) or type(error).__name__
        say(f"{variant.name}: FAILED: {variant.failure}")
        return False
    return True


def _measure_group(group: list[Variant], model: Model, options: Options, say: Callable[[str], None]) -> None:
    """All variants of the same weight bits, in turns."""
    pool = Pool(options)
    vocab = int(model.config.get("vocab_size", 49152))
    single = [w for w in options.workloads if w.sequences == 1]
    try:
        for round_ in range(options.cold_rounds + 1):  # the first start packs, compiles, fills the page cache
            for variant in (v for v in group if not v.failure):
                say(f"{variant.name}: start {round_}/{options.cold_rounds}")
                _try(variant, say, partial(_start, variant, pool, measured=round_ > 0))
        for round_ in range(options.rounds):
            for load in single:
                for variant in (v for v in group if not v.failure):
                    say(f"{variant.name}: {load.name} tokens, round {round_ + 1}/{options.rounds}")
                    prompts = _prompts(load, vocab, round_)
                    if not _try(variant, say, partial(_one, variant, load, prompts[0], pool)):
                        pool.drop(variant.name)
        for load in options.workloads:
            if load.sequences == 1:
                continue
            for round_ in range(options.batch_rounds):
                for variant in (v for v in group if not v.failure):
                    say(f"{variant.name}: {load.name}, round {round_ + 1}/{options.batch_rounds}")
                    prompts = _prompts(load, vocab, round_)
                    if not _try(variant, say, partial(_batch, variant, load, prompts, pool)):
                        pool.drop(variant.name)
    finally:
        pool.close()
    for variant in group:
        if rss := pool.peak_rss.get(variant.name):
            variant.add("peak_rss", rss / 2**30)


def _prompts(load: Workload, vocab: int, round_: int) -> list[list[int]]:
    """Random tokens, other ones in every round and workload, the same for all engines: no cache helps."""
    rng = random.Random(f"{load.name}/{round_}")
    return [[rng.randrange(10, vocab) for _ in range(load.prompt)] for _ in range(load.sequences)]


def _start(variant: Variant, pool: Pool, *, measured: bool) -> None:
    worker = pool.start(variant)
    try:
        # The first time to see that the engine computes what the others do, later ones for the first token only.
        reply = worker.call("generate", RUN, tokens=GREEDY_PROMPT, count=0 if measured else GREEDY - 1)
        if measured:
            variant.add("first_token", time.perf_counter() - worker.started)
        else:
            variant.greedy = reply["tokens"]
    finally:
        worker.close()


def _one(variant: Variant, load: Workload, tokens: list[int], pool: Pool) -> None:
    worker = pool.take(variant)
    if pool.first_time(variant, load):
        worker.call("generate", RUN, tokens=tokens[::-1], count=2)
    reply = worker.call("generate", RUN, tokens=tokens, count=load.output)
    if len(reply["tokens"]) != load.output + 1:
        raise WorkerError(f"made {len(reply['tokens'])} tokens, {load.output + 1} were asked for")
    variant.add(f"prefill {load.name}", load.prompt / reply["first"])
    variant.add(f"decode {load.name}", load.output / reply["rest"])


def _batch(variant: Variant, load: Workload, prompts: list[list[int]], pool: Pool) -> None:
    worker = pool.take(variant)
    if pool.first_time(variant, load):  # as many sequences, but short ones
        worker.call("batch", RUN, prompts=[p[:8] for p in prompts], count=2)
    reply = worker.call("batch", RUN, prompts=prompts, count=load.output)
    if reply["tokens"] != load.sequences * load.output:
        raise WorkerError(f"made {reply['tokens']} tokens, {load.sequences * load.output} were asked for")
    variant.add(load.name, reply["tokens"] / reply["seconds"])


def measure_peaks(options: Options) -> dict[str, Any]:
    """What the machine reaches at this moment, by Pelton's own measurement."""
    from .catalogue import PEERS

    pelton = Variant(PEERS["pelton"], PEERS["pelton"].precisions[0], python=Path(sys.executable))
    worker = Worker([sys.executable, pelton.peer.worker], _variables(options), _log(options, pelton))
    try:
        return worker.call("peaks", RUN, threads=options.threads)
    finally:
        worker.close()


def available_memory() -> int:
    """Bytes that can be taken without swapping."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return 0


def _variables(options: Options) -> dict[str, str]:
    threads = str(options.threads)
    return {
        "PYTHONPATH": str(ROOT),
        "PELTON_CACHE": str(options.work / "pelton"),
        "OMP_NUM_THREADS": threads,
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "VLLM_CACHE_ROOT": str(options.work / "vllm"),
        "TORCHINDUCTOR_CACHE_DIR": str(options.work / "inductor"),
    }


def _log(options: Options, variant: Variant) -> Path:
    folder = options.work / "logs"
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"{variant.peer.name}-{variant.precision.name.replace(' ', '-')}.log"


def compared_with(variant: Variant, variants: list[Variant]) -> Variant | None:
    """Pelton's variant of the same format, or else of the same bits; None for Pelton itself."""
    ours = [v for v in variants if v.peer.name == "pelton" and v.precision.bits == variant.precision.bits]
    if variant.peer.name == "pelton" or not ours:
        return None
    same = [v for v in ours if v.precision.name.lower() == variant.precision.name.lower()]
    return (same or ours[-1:])[0]


def _result(model: Model, variants: list[Variant], options: Options, peaks: list[dict[str, Any]]) -> dict[str, Any]:
    reference = next((v.greedy for v in variants if v.peer.name == "pelton" and v.precision.bits == 16), [])
    rows = []
    for variant in variants:
        row: dict[str, Any] = {
            "peer": variant.peer.name, "title": variant.peer.title, "precision": variant.precision.name,
            "bits": variant.precision.bits, "version": variant.version, "settings": variant.settings,
            "batching": variant.peer.batching, "note": variant.note, "size": variant.size,
            "greedy": variant.greedy, "greedy_same_as_pelton_bf16": agreement(reference, variant.greedy),
            "figures": {key: figure(samples).to_json() for key, samples in variant.samples.items()},
        }  # fmt: skip
        if variant.failure:
            row["failure"] = variant.failure
        ours = compared_with(variant, variants)
        if ours is not None:
            ratios = {k: ratio(ours.samples.get(k, []), s) for k, s in variant.samples.items()}
            row["compared_with"] = ours.precision.name
            row["pelton_is_faster_by"] = {
                k: round(r, 3) for k, r in ratios.items() if r is not None and k not in ("first_token", "peak_rss")
            }
        rows.append(row)
    return {
        "title": model.title,
        "workloads": [vars(w) for w in options.workloads],
        "peaks": peaks,
        "limits": _limits(model, options, peaks),
        "variants": rows,
    }


def _limits(model: Model, options: Options, peaks: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """What bandwidth and bf16 arithmetic of this run allow at each weight size, in tokens/s."""
    if not peaks:
        return {}
    best = {k: max(p["peaks"][k] for p in peaks) for k in ("read_bandwidth", *peaks[0]["peaks"])}
    flops = best.get("bf16", best.get("f32", 0.0))
    shape = weights.shape_counts(model)
    limits: dict[str, dict[str, float]] = {}
    for bits in model.bits:
        row = limits.setdefault(str(bits), {})
        for load in options.workloads:
            if load.sequences > 1:
                continue
            context = load.prompt + load.output // 2
            row[f"decode {load.name}"] = decode_limit(shape.matrices, bits, shape.kv, context, best["read_bandwidth"])
            row[f"prefill {load.name}"] = prefill_limit(shape.matrices, shape.head, shape.queries, load.prompt, flops)
    return limits


class Neighbours:
    """How much of the CPU others take between two moments at which no worker runs."""

    def __init__(self) -> None:
        self._total, self._busy = _cpu_seconds()
        self._ours = sum(os.times()[:4])

    def share(self) -> float:
        """Of all cores, 0 to 1; time that a hypervisor gave to others included."""
        total, busy = _cpu_seconds()
        ours = sum(os.times()[:4]) - self._ours
        return max(0.0, busy - self._busy - ours) / max(1e-9, total - self._total)


def _cpu_seconds() -> tuple[float, float]:
    """(all, busy) of all cores since boot."""
    fields = [int(f) for f in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    total = sum(fields)  # user, nice, system, idle, iowait, irq, softirq, steal
    tick = os.sysconf("SC_CLK_TCK")
    return total / tick, (total - fields[3] - fields[4]) / tick


def machine() -> dict[str, Any]:
    """The machine, without a word about where it stands."""
    memory = 0
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemTotal:"):
            memory = int(line.split()[1]) * 1024
    return {"cores": len(os.sched_getaffinity(0)), "memory": memory, "load_before": round(os.getloadavg()[0], 2)}
