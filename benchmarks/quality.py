"""KL divergence to float32 and perplexity of every kind of quantized weight, beside llama.cpp's.

    python -m benchmarks.quality [--tokens 512] [--types int4 Q4_K ...]        needs llama-cpp-python
    python -m benchmarks.quality --groups        what sharing a scale among more weights and activations costs
    python -m benchmarks.quality --gpu           what quantized activations cost on GPUs; needs torch, no GPU

The model is SmolLM2-135M-Instruct, from its Q4_1 file, since no original is at hand. Its weights lie on a grid of
4 bits, which a 4-bit type might find again. So the base model is *shuffled*: channels of the residual stream, of
the MLP and of the values are permuted at random, which changes no result but scatters the grid over all groups of 32.
Its width is also padded with zeros from 576 to 768 (3 more heads), which again changes no result, because K-quants
need rows of whole 256s. The model as shipped is measured as well. All files keep embedding and output
layer in Q8_0, as ``--quantization`` keeps the latter in int8: what differs is the type of the layers.

Pelton and llama.cpp read the same files and tokens, one sequence, KV cache in f32. Kinds of activations in Pelton:
f32 (on the tier "avx512", which has no bf16 products), then --activations float, int8 and auto on the best tier.
auto is measured for types on load only: GGUF files as written here get int8. --gpu: the NumPy reference, its products
with activations rounded as ``pelton/backends/cuda/activations.py`` has it.
Writes benchmarks/results/quality-<machine>.json and prints a Markdown table.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import numpy.typing as npt

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results"
TEXT = ROOT / "tests" / "data" / "alice.txt"
BLOCK = 16
HEAD, VALUE_HEADS, PAD = 64, 3, 256

#: Type -> file type and tensor type of llama.cpp's quantizer.
GGUF_TYPES = {
    "BF16": "BF16", "Q8_0": "Q8_0", "Q6_K": "Q6_K", "Q5_K": "Q5_K_S", "Q4_K": "Q4_K_S", "Q4_1": "Q4_1", "Q4_0": "Q4_0",
    "Q3_K": "Q3_K_S", "MXFP4": "MXFP4_MOE",
}  # fmt: skip
ON_LOAD = ("int8", "fp8", "w8a8", "int4", "nvfp4")
#: Whose groups could find the grid of the model as shipped.
ON_THE_GRID = ("int4", "nvfp4")
KINDS = ("f32", "float", "int8")

Floats = npt.NDArray[np.float32]


# ------------------------------------------------------------------ figures


@dataclass(frozen=True)
class Divergence:
    """Of a model's predictions from another's, over the positions of a text; in nats."""

    mean: float
    error: float  # of the mean: standard deviation over the root of positions
    p99: float
    same_top: float  # share of positions whose most likely token is the same


def log_softmax(logits: Floats) -> npt.NDArray[np.float64]:
    wide = logits.astype(np.float64)
    wide -= wide.max(axis=1, keepdims=True)
    wide -= np.log(np.exp(wide).sum(axis=1, keepdims=True))
    return wide


def divergence(want: Floats, got: Floats) -> Divergence:
    """KL(want || got) of logits [positions, vocab] over the whole vocabulary."""
    parts = []
    for i in range(0, len(want), 64):  # a few rows at a time in float64
        p, q = log_softmax(want[i : i + 64]), log_softmax(got[i : i + 64])
        parts.append((np.exp(p) * (p - q)).sum(axis=1))
    each = np.concatenate(parts)
    same = (want.argmax(axis=1) == got.argmax(axis=1)).mean()
    error = each.std() / np.sqrt(len(each))
    return Divergence(float(each.mean()), float(error), float(np.quantile(each, 0.99)), float(same))


def perplexity(logits: Floats, tokens: list[int]) -> float:
    """Of tokens[1:], from the logits at each token before."""
    rows = range(0, len(tokens) - 1, 64)
    targets = np.array(tokens[1:])
    total = 0.0
    for i in rows:
        part = targets[i : i + 64]
        total -= float(log_softmax(logits[i : i + len(part)])[np.arange(len(part)), part].sum())
    return float(np.exp(total / len(targets)))


# ------------------------------------------------------------------ engines


def pelton_logits(
    model: Path,
    tokens: list[int],
    threads: int = 2,
    *,
    within: Callable[[Any], AbstractContextManager[None]] = lambda executor: nullcontext(),
    **options: Any,
) -> Floats:
    """Float32 logits [tokens, vocab] at every token of one sequence. within: entered with the executor."""
    from pelton.backends.base import Batch, SampleSpec, ScheduledSequence
    from pelton.build import build
    from pelton.config import EngineConfig, SamplingParams

    count = len(tokens)
    blocks = tuple(range(-(-count // BLOCK)))
    config = EngineConfig(
        model=str(model), threads=threads, max_num_seqs=count, max_num_batched_tokens=count, block_size=BLOCK,
        max_model_len=len(blocks) * BLOCK, **{"kv_cache_memory": 1 << 28, "kv_cache_dtype": "f32"} | options,
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # notes on rows that are no whole groups
        built = build(config)
    spec = SampleSpec(SamplingParams(temperature=0.0), (), (), 0)
    batch = Batch((ScheduledSequence("a", tuple(tokens), 0, blocks, spec),))
    with within(built.executor):
        logits = np.array(built.executor.logits(batch, every=True))  # type: ignore[attr-defined]
    built.close()
    return logits


def pelton_kind(kind: str) -> dict[str, Any]:
    """EngineConfig's fields for a kind of activations."""
    return {"activations": "float", "isa": "avx512"} if kind == "f32" else {"activations": kind}


def llama_cpp_logits(model: Path, tokens: list[int], threads: int) -> Floats:
    """The same from llama.cpp: one batch, no flash attention, KV cache in f32."""
    from llama_cpp import GGML_TYPE_F32, Llama

    llama = Llama(
        str(model), n_ctx=len(tokens), n_batch=len(tokens), n_ubatch=len(tokens), n_threads=threads,
        n_threads_batch=threads, logits_all=True, type_k=GGML_TYPE_F32, type_v=GGML_TYPE_F32, verbose=False,
    )  # fmt: skip
    llama.eval(tokens)
    logits = np.array(llama.scores[: len(tokens)])
    llama.close()
    return logits


@contextmanager
def rounded_products(executor: Any, choice: str) -> Iterator[None]:
    """A reference executor's products take activations as a GPU does. choice: ``EngineConfig.product_activations``."""
    from pelton.backends.cuda.activations import Activations, activations_of
    from pelton.backends.cuda.stored import PRODUCTS
    from pelton.graph import OPS, GroupQuant, Op
    from pelton.graph.ops import _scaled_tokens, scaled_token

    def rounded(x: Floats, wanted: Activations) -> Floats:
        size = wanted.group_size or x.shape[-1]
        tokens = _scaled_tokens(x.reshape(-1, size), scaled_token(wanted.codes, size))
        values: Floats = tokens["codes"].astype(np.float32) * tokens["scale"][:, None]
        return values.reshape(x.shape)

    types = {
        id(value): node.tensor.dtype
        for node, value in executor._constants.items()
        if isinstance(node.tensor.dtype, GroupQuant)
    }

    def rounding(op: Op) -> Op:
        def product(attrs: Any, x: Floats, w: Floats, *bias: Floats) -> Any:
            type = types.get(id(w))
            wanted = None if type is None else activations_of(type, choice, True)
            return op.reference(attrs, x if wanted is None else rounded(x, wanted), w, *bias)

        return replace(op, reference=product)

    with patch.dict(OPS, {name: rounding(OPS[name]) for name in PRODUCTS}):
        yield


# ------------------------------------------------------------------ files


def shuffled(name: str, value: Floats, seed: int = 0) -> Floats:
    """A tensor of the model (GGUF names and layout) with permuted channels of the stream, MLP and values."""

    def order(what: str, count: int) -> npt.NDArray[np.int64]:
        return np.random.default_rng([seed, *what.encode()]).permutation(count)

    layer, _, kind = name.removesuffix(".weight").rpartition(".")
    width = {"ffn_down": 0, "attn_output": 0}.get(kind, value.ndim - 1)  # the dimension that is the stream
    value = np.take(value, order("stream", value.shape[width]), axis=width)
    if kind in ("ffn_gate", "ffn_up"):
        value = value[order(layer + "mlp", len(value))]
    if kind == "ffn_down":
        value = value[:, order(layer + "mlp", value.shape[1])]
    if kind in ("attn_v", "attn_output"):
        orders = [order(f"{layer}value{head}", HEAD) + head * HEAD for head in range(VALUE_HEADS)]
        if kind == "attn_v":
            value = value[np.concatenate(orders)]
        else:
            heads = value.shape[1] // HEAD
            parts = [orders[h * VALUE_HEADS // heads] % HEAD + h * HEAD for h in range(heads)]
            value = value[:, np.concatenate(parts)]
    return value


def padded(name: str, value: Floats, width: int) -> Floats:
    """A tensor with all its channels padded with zeros to whole 256s; norms make up for the longer mean."""
    if value.ndim == 1:
        wide = -(-width // PAD) * PAD
        return np.pad(value * np.float32(np.sqrt(width / wide)), (0, wide - width))
    vocabulary = name.startswith("token_embd")
    rows, cols = (-n % PAD for n in value.shape)
    return np.pad(value, ((0, 0 if vocabulary else rows), (0, cols)))


def write_base(path: Path, *, shuffle: bool, pad: bool) -> None:
    """The demo model in f32 as a GGUF file."""
    import gguf

    from pelton.checkpoint import resolve_model
    from pelton.checkpoint.gguf import read_gguf
    from pelton.graph.ops import f32

    source = read_gguf(resolve_model(""))
    reader = gguf.GGUFReader(source.path)
    arch = source.metadata["general.architecture"]
    width = source.metadata[f"{arch}.embedding_length"]
    changed: dict[str, Any] = {"general.file_type": 0}
    if pad:
        wide = -(-width // PAD) * PAD
        key = f"{arch}.attention.layer_norm_rms_epsilon"
        changed |= {f"{arch}.embedding_length": wide, key: source.metadata[key] * width / wide}
        for key in (f"{arch}.attention.head_count", f"{arch}.attention.head_count_kv"):
            changed[key] = -(-source.metadata[key] * HEAD // PAD) * PAD // HEAD
    writer = gguf.GGUFWriter(path, arch)
    for key, field in reader.fields.items():
        if key.startswith("GGUF.") or key == "general.architecture":
            continue
        kind = field.types[0]
        inner = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(key, changed.get(key, field.contents()), kind, inner)
    for name in source.tensors:
        value = np.array(f32(source.lazy(name).read()))
        if shuffle:
            value = shuffled(name, value)
        if pad:
            value = padded(name, value, width)
        writer.add_tensor(name, np.ascontiguousarray(value))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_quantized(base: Path, path: Path, kind: str, threads: int) -> None:
    """``base`` with all layers in one type, embedding and output layer in Q8_0 (BF16: all in it), by llama.cpp."""
    import llama_cpp

    params = llama_cpp.llama_model_quantize_default_params()
    params.nthread, params.pure = threads, True
    params.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{GGUF_TYPES[kind]}")
    if kind != "BF16":
        params.token_embedding_type = params.output_tensor_type = llama_cpp.GGML_TYPE_Q8_0
    if llama_cpp.llama_model_quantize(str(base).encode(), str(path).encode(), params):
        raise RuntimeError(f"llama.cpp cannot write {kind}")
    check_types(path, kind)


def check_types(path: Path, kind: str) -> None:
    from pelton.checkpoint.gguf import read_gguf

    layers = {t.kind.name for n, t in read_gguf(path).tensors.items() if n.startswith("blk.") and len(t.shape) == 2}
    if layers != {kind}:
        raise RuntimeError(f"{path.name} has layers in {layers}")


# ------------------------------------------------------------------ the run


def layer_type(model: Path, quantization: str | None = None) -> tuple[str, float]:
    """Pelton's name of the type that most layers have, and its bits per weight."""
    from pelton.build import plan
    from pelton.config import EngineConfig
    from pelton.graph import GroupQuant

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        graph = plan(EngineConfig(model=str(model), quantization=quantization, max_num_seqs=1)).graph  # type: ignore[arg-type]
    types = [n.tensor.dtype for n in graph.leaves("weight") if len(n.tensor.shape) == 2]
    most = max(set(types), key=types.count)
    return str(most), most.bits_per_weight if isinstance(most, GroupQuant) else most.bits


class Run:
    def __init__(self, tokens: list[int], threads: int) -> None:
        self.tokens, self.threads = tokens, threads
        self.rows: list[dict[str, Any]] = []

    def references(self, base: Path) -> None:
        self.f32 = pelton_logits(base, self.tokens, self.threads, dtype="f32", activations="float")
        self.llama_f32 = llama_cpp_logits(base, self.tokens, self.threads)

    def add(self, model: str, name: str, engine: str, activations: str, logits: Floats, **more: Any) -> None:
        figures = asdict(divergence(self.llama_f32 if engine == "llama.cpp" else self.f32, logits))
        row = {"model": model, "type": name, "engine": engine, "activations": activations, **more}
        row |= {"perplexity": perplexity(logits, self.tokens), "kl": figures}
        self.rows.append(row)
        print(
            f"  {model:9} {name:7} {engine:9} {activations:6} ppl {row['perplexity']:8.3f}  "
            f"KL {figures['mean']:.6f}  99% {figures['p99']:.5f}  same {figures['same_top']:.4f}"
            + "".join(f"  {k} {v['mean']:.6f}" for k, v in more.items() if isinstance(v, dict)),
            flush=True,
        )  # fmt: skip

    def pelton(self, model: str, name: str, path: Path, **options: Any) -> None:
        type, bits = layer_type(path, options.get("quantization"))
        exact: Floats | None = None
        plain: Floats | None = None
        # Where the output layer has another type than the others, auto may be neither of the other kinds.
        for kind in (*KINDS, "auto") if "quantization" in options else KINDS:
            if kind == "int8" and (name == "BF16" or type.startswith("fp8")):
                continue
            logits = pelton_logits(path, self.tokens, self.threads, **options, **pelton_kind(kind))
            more: dict[str, Any] = {"weights": type, "bits": bits}
            if exact is not None:
                more["from_f32_activations"] = asdict(divergence(exact, logits))
            if plain is not None:
                more["from_float_activations"] = asdict(divergence(plain, logits))
            exact, plain = logits if kind == "f32" else exact, logits if kind == "float" else plain
            self.add(model, name, "pelton", kind, logits, **more)

    def llama_cpp(self, model: str, name: str, path: Path) -> None:
        logits = llama_cpp_logits(path, self.tokens, self.threads)
        to_ours = asdict(divergence(self.f32, logits))
        self.add(model, name, "llama.cpp", "own", logits, to_our_f32=to_ours)


def measure(run: Run, types: list[str], folder: Path) -> None:
    from pelton.checkpoint import resolve_model

    for model, shuffle in (("shuffled", True), ("shipped", False)):
        base = folder / f"{model}-f32.gguf"
        write_base(base, shuffle=shuffle, pad=shuffle)
        run.references(base)
        run.add(model, "F32", "pelton", "f32", run.f32)
        run.add(model, "F32", "llama.cpp", "own", run.llama_f32, to_our_f32=asdict(divergence(run.f32, run.llama_f32)))
        if shuffle:
            logits = pelton_logits(base, run.tokens, run.threads, dtype="f32", kv_cache_dtype="bf16")
            run.add(model, "F32", "pelton", "KV bf16", logits)
        else:
            path = resolve_model("")
            run.pelton(model, "Q4_1", path)
            run.llama_cpp(model, "Q4_1", path)
        for name in types:
            if name in ON_LOAD and (shuffle or name in ON_THE_GRID):
                run.pelton(model, name, base, quantization=name, dtype="f32")
            elif name not in ON_LOAD and shuffle:
                path = folder / f"{model}-{name}.gguf"
                write_quantized(base, path, name, run.threads)
                run.pelton(model, name, path)
                run.llama_cpp(model, name, path)
                path.unlink()
            shutil.rmtree(folder / "cache", ignore_errors=True)
        base.unlink()


def measure_groups(run: Run, folder: Path) -> None:
    """Types that no choice of --quantization names, with float and int8 activations."""
    from pelton.graph import F16, F32, GroupQuant
    from pelton.quantize import recipes

    base = folder / "shuffled-f32.gguf"
    write_base(base, shuffle=True, pad=True)
    run.f32 = pelton_logits(base, run.tokens, run.threads, dtype="f32")
    bytes_in_32s = GroupQuant(8, 32, scale=F16)
    sizes = [(8, 16), (8, 32), (8, 64), (8, 128), (8, 256), (8, 0), (4, 16), (4, 32), (4, 64), (4, 128), (4, 0)]
    types = [GroupQuant(bits, group, scale=F16 if group else F32) for bits, group in sizes]
    for type in [*types, GroupQuant(4, 32, minimum=True, scale=F16), GroupQuant(4, 64, minimum=True, scale=F16)]:
        head = type if type.bits == 8 else bytes_in_32s
        with patch.dict(recipes._RECIPES, int8=type), patch.object(recipes, "_INT8", head):
            options: dict[str, Any] = {"dtype": "f32", "quantization": "int8", "packed_cache": False}
            plain, ints = (
                pelton_logits(base, run.tokens, run.threads, activations=kind, **options) for kind in ("float", "int8")
            )
        more: dict[str, Any] = {"bits": type.bits_per_weight, "output_layer": str(head)}
        run.add("shuffled", str(type), "pelton", "float", plain, **more)
        more["from_float_activations"] = asdict(divergence(plain, ints))
        run.add("shuffled", str(type), "pelton", "int8", ints, **more)


def measure_gpu(run: Run, folder: Path) -> None:
    """What the CUDA backend computes, but for the rounding of floats to 16 bits."""
    from pelton.graph import GroupQuant
    from pelton.quantize import recipes

    base = folder / "shuffled-f32.gguf"
    write_base(base, shuffle=True, pad=True)
    reference: dict[str, Any] = {"device": "reference", "dtype": "f32"}
    run.f32 = pelton_logits(base, run.tokens, run.threads, **reference)
    blocks = GroupQuant(8, 128, floating=True)  # as DeepSeek's, scales of weights by row
    for name, quantization, recipe in (
        ("fp8", "fp8", None), ("fp8 in 128s", "fp8", blocks), ("int8", "int8", None), ("w8a8", "w8a8", None),
        ("int4", "int4", None), ("nvfp4", "nvfp4", None),
    ):  # fmt: skip
        with patch.dict(recipes._RECIPES, {} if recipe is None else {quantization: recipe}):
            for choice in ("float", "int8" if quantization == "w8a8" else "auto"):
                logits = pelton_logits(
                    base, run.tokens, run.threads, quantization=quantization, **reference,
                    within=lambda executor, choice=choice: rounded_products(executor, choice),  # type: ignore[misc]
                )  # fmt: skip
                run.add("shuffled", name, "pelton", choice, logits)
    for cache in ("bf16", "int8", "fp8"):
        logits = pelton_logits(base, run.tokens, run.threads, **reference, kv_cache_dtype=cache)
        run.add("shuffled", "F32", "pelton", f"KV {cache}", logits)


def markdown(rows: list[dict[str, Any]], model: str) -> str:
    """A row per type. The last figures of Pelton are those with the activations that auto chooses."""
    found: dict[str, dict[str, Mapping[str, Any]]] = {}
    for row in rows:
        if row["model"] == model:
            found.setdefault(row["type"], {})[row["activations"]] = row
    lines = [
        "| weights | type | bits | KL, float | int8 | int8 beside float | auto | 99 % | same top | perplexity | "
        "llama.cpp: KL | perplexity |",
        "|---" * 12 + "|",
    ]
    order = sorted(found.items(), key=lambda item: next((r["bits"] for r in item[1].values() if "bits" in r), 32.0))
    for name, kinds in reversed(order):
        some = kinds[next(k for k in ("auto", "int8", "float", "f32") if k in kinds)]
        int8, own = kinds.get("int8"), kinds.get("own")
        beside = f"{int8['from_float_activations']['mean']:.4f}" if int8 else ""
        plain = kinds.get("float", kinds["f32"])
        cells = [
            name, f"`{some.get('weights', 'f32')}`", f"{some.get('bits', 32):.1f}", f"{plain['kl']['mean']:.4f}",
            f"{int8['kl']['mean']:.4f}" if int8 else "", beside, f"{some['kl']['mean']:.4f}",
            f"{some['kl']['p99']:.3f}", f"{100 * some['kl']['same_top']:.1f} %",
            f"{some['perplexity']:.2f}", f"{own['kl']['mean']:.4f}" if own else "",
            f"{own['perplexity']:.2f}" if own else "",
        ]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    every = [*GGUF_TYPES, *ON_LOAD]
    parser.add_argument("--types", nargs="+", choices=every, default=every, metavar="TYPE", help=", ".join(every))
    parser.add_argument("--groups", action="store_true", help="measure sizes of groups instead")
    parser.add_argument("--gpu", action="store_true", help="measure what GPUs compute instead")
    parser.add_argument("--tokens", type=int, default=512, help="of the text's start; at most 4,091")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/quality-<machine>.json")
    args = parser.parse_args()

    import llama_cpp

    from pelton.backends.cpu import _native
    from pelton.backends.cpu.executor import choose_isa
    from pelton.build import build
    from pelton.config import EngineConfig

    built = build(EngineConfig(max_num_seqs=1, max_model_len=64))
    tokens = built.tokenizer.encode(TEXT.read_text(encoding="utf-8"))[: args.tokens]
    built.close()
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=ROOT)
    run = Run(tokens, args.threads)
    with tempfile.TemporaryDirectory() as folder:
        # Packed weights of base models are used for several kinds of activations, and by nobody after that.
        os.environ["PELTON_CACHE"] = f"{folder}/cache"
        if args.groups:
            measure_groups(run, Path(folder))
        elif args.gpu:
            measure_gpu(run, Path(folder))
        else:
            measure(run, args.types, Path(folder))
    cpu = _native.cpu_features().get("model_name")
    results = {
        "command": "python -m " + " ".join(["benchmarks.quality", *sys.argv[1:]]),
        "date": date.today().isoformat(),
        "commit": commit.stdout.strip(),
        "cpu": cpu,
        "isa": choose_isa(None),
        "threads": args.threads,
        "python": platform.python_version(),
        "llama_cpp_python": llama_cpp.__version__,
        "model": "SmolLM2-135M-Instruct, Q4_1",
        "text": str(TEXT.relative_to(ROOT)),
        "tokens": len(tokens),
        "rows": run.rows,
    }
    machine = str(cpu).lower().replace(" ", "-")
    output = args.output or RESULTS / f"quality-{'groups-' * args.groups}{'gpu-' * args.gpu}{machine}.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(results, indent=1) + "\n")
    for model in () if args.groups or args.gpu else ("shuffled", "shipped"):
        print(f"\n{model}\n\n{markdown(run.rows, model)}")
    print(output)


if __name__ == "__main__":
    main()
