"""Damaged headers by the thousand: a CheckpointError or values in range, never anything else.

Seeded, so that a failure repeats; the seed of a failing case is in its message.
"""

import json
import random
import struct
import time
import tracemalloc

import numpy as np
import pytest
import safetensors.numpy

from pelton.checkpoint import open_checkpoint
from pelton.errors import CheckpointError
from pelton.graph.quantized import QuantizedArray

from .gguf_files import Kind, llama_metadata, random_blocks, write

SECONDS = 3.0  # at most, per test
CASES = 3000
HUGE = [0, 1, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**40, 2**61, 2**63 - 1, 2**63, 2**64 - 1]
PEAK = 32 << 20  # bytes; the files are 10 kB


def mutate(data: bytes, rng: random.Random, header: int) -> bytes:
    result = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 5))):
        if len(result) <= 8:
            break
        at = rng.randrange(min(header, len(result) - 8))
        match rng.randrange(6):
            case 0:
                result[at] ^= 1 << rng.randrange(8)
            case 1:
                result[at] = rng.randrange(256)
            case 2:
                result[at : at + 8] = struct.pack("<Q", rng.choice(HUGE))
            case 3:
                result[at : at + 4] = struct.pack("<I", rng.choice(HUGE) & 0xFFFFFFFF)
            case 4:
                del result[at : at + rng.randrange(1, 20)]
            case 5:
                result = (
                    result[: rng.randrange(len(result) + 1)] if rng.random() < 0.2 else result + result[at : at + 9]
                )
    return bytes(result)


def use(path) -> int:
    """Open, read everything; the number of tensors read."""
    checkpoint = open_checkpoint(path)
    for tensor in checkpoint.tensors.values():
        value = tensor.read()
        if isinstance(value, QuantizedArray):
            value = value.dequantize()
        assert value.shape == tensor.type.shape
        value.astype(np.float32).sum()  # touches every byte: a view beyond the file would crash
    return len(checkpoint.tensors)


def fuzz(target, path, make) -> None:
    outcomes = {"opened": 0, "refused": 0}
    end = time.monotonic() + SECONDS
    tracemalloc.start()
    try:
        for seed in range(CASES):
            if time.monotonic() > end:
                break
            target.write_bytes(make(random.Random(seed)))
            start = time.monotonic()
            try:
                with np.errstate(all="ignore"):
                    use(path)
                outcomes["opened"] += 1
            except CheckpointError as error:
                assert "\n" not in str(error)
                outcomes["refused"] += 1
            except Exception as error:
                raise AssertionError(f"seed {seed}: {type(error).__name__}: {error}") from error
            assert time.monotonic() - start < 2, f"seed {seed} is slow"
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < PEAK
    assert min(outcomes.values()) > 20, outcomes  # the mutations reach both sides


@pytest.mark.parametrize("arch", ["llama", "gemma3", "bloom"])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_mutated_gguf(arch, tmp_path):
    path = tmp_path / "m.gguf"
    metadata = {k.replace("llama.", f"{arch}."): v for k, v in llama_metadata().items()}
    metadata[f"{arch}.attention.layer_norm_epsilon"] = 1e-5
    metadata[f"{arch}.rope.scaling.type"] = "yarn"
    tensors = {
        "token_embd.weight": np.ones((3, 32), np.float32),
        "output_norm.weight": np.ones(32, np.float32),
        "blk.0.attn_q.weight": (random_blocks(Kind.Q4_1, (32, 32)), Kind.Q4_1),
        "blk.0.attn_qkv.weight": (random_blocks(Kind.Q8_0, (96, 32)), Kind.Q8_0),
        "blk.0.ffn_down.weight": (random_blocks(Kind.Q6_K, (2, 256)), Kind.Q6_K),
        "blk.0.ffn_up.weight": (random_blocks(Kind.IQ4_NL, (2, 64)), Kind.IQ4_NL),
    }
    data = write(path, arch, metadata, tensors).read_bytes()
    assert use(path) == len(tensors)
    header = len(data) - sum(t[0].nbytes if isinstance(t, tuple) else t.nbytes for t in tensors.values())
    fuzz(path, path, lambda rng: mutate(data, rng, header))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_mutated_safetensors(tmp_path):
    tensors = {"layers.0.w": np.ones((8, 4), np.float32), "b": np.ones(5, np.float16), "c": np.ones(3, np.int8)}
    path = tmp_path / "model.safetensors"
    safetensors.numpy.save_file(tensors, path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    data = path.read_bytes()
    header = 8 + struct.unpack("<Q", data[:8])[0]
    assert use(tmp_path) == 3

    def make(rng: random.Random) -> bytes:
        if rng.random() < 0.5:
            return mutate(data, rng, header)
        fields = json.loads(data[8:header])  # valid JSON with a wrong value somewhere
        tensor = fields[rng.choice(sorted(fields))]
        wrong = rng.choice([*HUGE, -1, 1.5, None, True, "F64", "", [], {}, [1] * 99, [2**62, 2**62], float("inf")])
        key = rng.choice(sorted(tensor))
        if isinstance(tensor[key], list) and rng.random() < 0.7:
            tensor[key][rng.randrange(len(tensor[key]))] = wrong
        else:
            tensor[key] = wrong
        text = json.dumps(fields).encode()
        return struct.pack("<Q", len(text)) + text + data[header:]

    fuzz(path, tmp_path, make)
