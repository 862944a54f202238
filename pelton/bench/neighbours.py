"""What else kept the machine busy while something was measured: on a shared machine it explains most surprises."""

from __future__ import annotations

import os
import time
from pathlib import Path

#: Of the machine's cores: less than this is the system's own business.
NOTICEABLE = 0.05


class Neighbours:
    """CPU time of others from its creation on."""

    def __init__(self) -> None:
        self._others, self._time = _others_seconds(), time.monotonic()

    def cores(self) -> float | None:
        """Cores that others kept busy on average; None where the system does not tell."""
        now, seconds = _others_seconds(), time.monotonic() - self._time
        if now is None or self._others is None or seconds <= 0:
            return None
        return max(0.0, (now - self._others) / seconds)


def noticeable(cores: float | None) -> bool:
    return cores is not None and cores > NOTICEABLE * (os.cpu_count() or 1)


def _others_seconds(file: Path = Path("/proc/stat")) -> float | None:
    """CPU seconds since boot of everything but this process, time that a virtual machine was refused included."""
    try:
        line = file.read_text().partition("\n")[0].split()
        user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, line[1:9])
        ticks = os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, AttributeError):  # not Linux
        return None
    own = os.times()
    return (user + nice + system + irq + softirq + steal) / ticks - own.user - own.system
