"""Time as the engine sees it: the machine's own, or a virtual one for exact tests."""

from __future__ import annotations

import time
from typing import Protocol

SPIN_S = 2e-4
"""The last stretch of a wait is spent spinning, since sleeping overshoots by up to this much."""


class Clock(Protocol):
    """What transfers and computing are timed with."""

    def now(self) -> float:
        """Return seconds since some fixed start."""
        ...

    def sleep_until(self, time_s: float) -> None:
        """Return no earlier than `time_s`, in seconds of this clock."""
        ...

    def spend(self, seconds: float) -> None:
        """Take account of computing that has a known cost."""
        ...


class RealClock:
    """The machine's clock; computing takes the time it takes."""

    def now(self) -> float:
        """Return seconds of a monotonic clock."""
        return time.perf_counter()

    def sleep_until(self, time_s: float) -> None:
        """Return within microseconds after `time_s`."""
        left = time_s - time.perf_counter()
        if left > SPIN_S:
            time.sleep(left - SPIN_S)
        while time.perf_counter() < time_s:
            pass

    def spend(self, seconds: float) -> None:
        """Do nothing: real computing has already passed on this clock."""


class VirtualClock:
    """A clock that moves only by what is spent and waited for: every run takes the same time."""

    def __init__(self) -> None:
        """Start at zero."""
        self._now = 0.0

    def now(self) -> float:
        """Return the virtual seconds passed."""
        return self._now

    def sleep_until(self, time_s: float) -> None:
        """Move on to `time_s` if it is later than now."""
        self._now = max(self._now, time_s)

    def spend(self, seconds: float) -> None:
        """Move on by the cost of some computing."""
        self._now += seconds
