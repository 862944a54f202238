"""Low precision by name: what the engine is asked for, and which of the device's rates its products have."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from .part import OutOfTimeError, Part, Row

#: Weights by --quantization's name, and the rate of their products. The others are turned into bf16 as they are read.
_WEIGHTS = {"bf16": "bf16", "fp8": "fp8", "w8a8": "int8", "int8": "bf16", "int4": "bf16", "nvfp4": "bf16"}
_CACHES = ("kv-fp8", "kv-int8")
#: What ratios are to.
PLAIN = "bf16"


@dataclass(frozen=True)
class Precision:
    """weights: a key of ``_WEIGHTS``. cache: "fp8", "int8", or "auto", which is as wide as the activations. floats:
    activations are not quantized, whatever the weights are."""

    name: str
    weights: str = PLAIN
    cache: str = "auto"
    floats: bool = False

    @classmethod
    def parse(cls, name: str) -> Precision:
        """Of words between plus signs, such as fp8, kv-int8, fp8+float, int4+kv-fp8.

        Raises:
            ValueError: there is no such precision.
        """
        weights, cache, floats = [], [], 0
        for word in name.split("+"):
            if word in _WEIGHTS:
                weights.append(word)
            elif word in _CACHES:
                cache.append(word.removeprefix("kv-"))
            elif word == "float":
                floats += 1
            else:
                words = ", ".join((*_WEIGHTS, *_CACHES, "float"))
                raise ValueError(f"no precision is called {name!r}; give words of {words} with + between them")
        if max(len(weights), len(cache), floats) > 1:
            raise ValueError(f"precision {name!r} says a thing twice")
        return cls(name, (weights or [PLAIN])[0], (cache or ["auto"])[0], bool(floats))

    @property
    def options(self) -> dict[str, Any]:
        """Fields of an EngineConfig that are not the default."""
        found: dict[str, Any] = {} if self.weights == PLAIN else {"quantization": self.weights}
        if self.cache != "auto":
            found["kv_cache_dtype"] = self.cache
        if self.floats:
            found["activations"] = "float"
        return found

    @property
    def product(self) -> str:
        """The type that most of its products are meant to run in: "bf16", "fp8" or "int8"."""
        return PLAIN if self.floats else _WEIGHTS[self.weights]


def precisions(part: Part) -> list[Precision]:
    return [Precision.parse(name) for name in part.scale.precisions]


def each(part: Part, measure: Callable[[Precision, Callable[[], float]], None]) -> None:
    """Call ``measure(precision, left)`` for all of them; ``left()`` says how many seconds of the part's time remain
    for this one, if those that follow are to have as much. One that fails is a row; the others go on."""
    asked = precisions(part)
    part.data["precisions"] = [p.name for p in asked]
    for number, precision in enumerate(asked):
        end = time.monotonic() + part.left() / (len(asked) - number)
        try:
            part.check()
            measure(precision, lambda end=end: end - time.monotonic())  # type: ignore[misc]
        except OutOfTimeError:
            part.data["no_time_for"] = [p.name for p in asked[number:]]
            raise
        except Exception as error:
            part.row(precision=precision.name, failure=f"{type(error).__name__}: {error}".split("\n")[0][:300])
            if type(error).__module__ != "pelton.errors":  # those say in one line what the matter is
                part.data["error"] = part.data.get("error", "") + f"{precision.name}: {traceback.format_exc()}"
            if "CUDA error" in str(error):  # the context is lost: nothing that follows would say anything
                raise
    failed = [row["precision"] for row in part.data["rows"] if "failure" in row]
    if failed:
        part.data["problem"] = f"no figures of {', '.join(failed)}"


def with_ratios(rows: Sequence[Row], same: Iterable[str], keys: Iterable[str]) -> None:
    """Adds ``KEY_to_bf16`` to rows: the row's KEY over that of the bf16 row that has the same ``same``."""
    same, keys = tuple(same), tuple(keys)
    plain = {tuple(r.get(s) for s in same): r for r in rows if r["precision"] == PLAIN and "failure" not in r}
    for row in rows:
        base = plain.get(tuple(row.get(s) for s in same), {})
        for key in keys:
            if row.get(key) is not None and base.get(key):
                row[f"{key}_to_bf16"] = row[key] / base[key]


def with_earlier(data: Row, before: Row) -> Row:
    """A part's results with the rows of an earlier run, of precisions that this one has none of; ``earlier`` says
    which and when. So a machine that is lent for ten minutes at a time can measure them one after the other."""
    now = {row.get("precision") for row in data.get("rows", ())}
    kept = [row for row in before.get("rows", ()) if row.get("precision") not in (None, *now)]
    if not kept:
        return data
    names = list(dict.fromkeys(row["precision"] for row in kept))
    earlier = {name: before.get("earlier", {}).get(name, before.get("date", "")) for name in names}
    return {"budgets": before.get("budgets"), **data, "rows": [*kept, *data.get("rows", ())], "earlier": earlier}
