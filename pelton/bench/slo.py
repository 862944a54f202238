"""Service level objectives, which share of the requests meets them, and the highest rate at which enough do."""

from __future__ import annotations

import math
import re
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict, dataclass

from ..errors import PeltonError
from ..metrics import RequestMetrics, meets

_NAMES = ("ttft", "tpot", "e2e")
_LIMIT = re.compile(r"\s*([a-z0-9]+)\s*[=:]\s*([0-9]*\.?[0-9]+)\s*(ms|s|)\s*", re.IGNORECASE)
#: Of the normal distribution: 95 % lie within so many standard deviations.
_Z95 = 1.959964


def parse_limits(text: str) -> dict[str, float]:
    """Seconds by name, of ``ttft=500,tpot=50ms,e2e=2s``: milliseconds unless a unit says otherwise.

    Raises:
        PeltonError: another name, no number above 0, or a name twice.
    """
    limits: dict[str, float] = {}
    for part in text.split(","):
        found = _LIMIT.fullmatch(part)
        name = found.group(1).lower() if found else ""
        if not found or name not in _NAMES or name in limits or float(found.group(2)) <= 0:
            raise PeltonError(f"--slo is {text!r}", "give limits like ttft=500,tpot=50,e2e=2s, milliseconds or s")
        limits[name] = float(found.group(2)) / (1 if found.group(3).lower() == "s" else 1000)
    return limits


@dataclass(frozen=True, slots=True)
class Slo:
    """Limits of one request in seconds, and the share of all requests that must keep them."""

    ttft: float = math.inf
    tpot: float = math.inf
    e2e: float = math.inf
    attainment: float = 0.9

    @classmethod
    def parse(cls, text: str, attainment: float) -> Slo:
        """text: as for :func:`parse_limits`.

        Raises:
            PeltonError: see :func:`parse_limits`; or an attainment outside (0, 1].
        """
        if not 0 < attainment <= 1:
            raise PeltonError(f"--slo-attainment is {attainment:g}", "give a share above 0 and up to 1, e.g. 0.9")
        return cls(**parse_limits(text), attainment=attainment)

    @property
    def limits_ms(self) -> dict[str, float]:
        return {name: 1e3 * getattr(self, name) for name in _NAMES if math.isfinite(getattr(self, name))}

    def met_by(self, request: RequestMetrics) -> bool:
        return meets(request, ttft=self.ttft, tpot=self.tpot, e2e=self.e2e)

    def __str__(self) -> str:
        limits = ", ".join(f"{name.upper()} ≤ {limit:g} ms" for name, limit in self.limits_ms.items())
        return f"{limits} for {self.attainment:.4g} of the requests"


def wilson(met: int, total: int) -> tuple[float, float]:
    """The 95 % confidence interval of a share of which ``met`` of ``total`` is a sample (E. B. Wilson, 1927)."""
    if not total:
        return 0.0, 1.0
    share, z2 = met / total, _Z95**2
    middle = share + z2 / (2 * total)
    half = _Z95 * math.sqrt(share * (1 - share) / total + z2 / (4 * total**2))
    low, high = (middle - half) / (1 + z2 / total), (middle + half) / (1 + z2 / total)
    return (0.0 if met == 0 else low), (1.0 if met == total else high)


@dataclass(frozen=True, slots=True)
class Trial:
    """A run at a rate: how many of its requests met the SLO, and how many of those in its later half.

    A server that is offered more than it can do is within its limits at first; the later half shows it.
    """

    rate: float
    met: int
    total: int
    late_met: int
    late_total: int

    @classmethod
    def of(cls, rate: float, met: Sequence[bool]) -> Trial:
        """met: for each request in the order in which they were due."""
        late = met[len(met) // 2 :]
        return cls(rate, sum(met), len(met), sum(late), len(late))

    @property
    def attainment(self) -> float:
        return self.met / self.total if self.total else 0.0

    def passes(self, needed: float) -> bool:
        return bool(self.total) and self.met >= needed * self.total and self.late_met >= needed * self.late_total

    def verdict(self, needed: float) -> str:
        """``sure`` where the 95 % interval of the attainment lies on one side of what is needed, else ``likely``."""
        low, high = wilson(self.met, self.total)
        if self.passes(needed):
            return "sure" if low >= needed else "likely"
        return "sure" if high < needed else "likely"


@dataclass(frozen=True, slots=True)
class FoundRate:
    """The highest rate that met the SLO, and the lowest above it that did not (None: none was seen).

    trials: in the order of the runs. reason: why the search ended.
    """

    highest: float | None
    lowest_failed: float | None
    trials: tuple[Trial, ...]
    attainment: float
    reason: str

    def row(self) -> dict[str, object]:
        trials = [
            {
                **asdict(t),
                "attainment": t.attainment,
                "interval_95": wilson(t.met, t.total),
                "passes": t.passes(self.attainment),
                "verdict": t.verdict(self.attainment),
            }
            for t in self.trials
        ]
        return {
            "highest_rate": self.highest,
            "lowest_failed_rate": self.lowest_failed,
            "needed_attainment": self.attainment,
            "reason": self.reason,
            "trials": trials,
        }


async def find_rate(
    measure: Callable[[float], Awaitable[Trial | None]],
    start: float,
    *,
    needed: float,
    max_runs: int,
    precision: float = 0.05,
) -> FoundRate:
    """Double or halve the rate until it lies between one that passes and one that does not, then bisect.

    Args:
        measure: runs at a rate; None: it was stopped, and so is the search.
        start: requests per second of the first run.
        needed: share of the requests that must meet the SLO.
        max_runs: at most so many.
        precision: the search ends when the two rates differ by less than this share.
    """
    trials: list[Trial] = []
    low: float | None = None
    high: float | None = None
    rate, reason = start, f"{max_runs} runs are done"
    while len(trials) < max_runs:
        trial = await measure(rate)
        if trial is None:
            reason = "it was stopped"
            break
        trials.append(trial)
        if trial.passes(needed):
            low = rate
        else:
            high = rate
        if low is None:
            rate /= 2
        elif high is None:
            rate *= 2
        elif high - low <= precision * low:
            reason = f"the two rates differ by less than {precision:.0%}"
            break
        else:
            rate = math.sqrt(low * high)
    return FoundRate(low, high, tuple(trials), needed, reason)
