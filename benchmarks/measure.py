"""Comparisons on a machine that has other load as well: contestants take turns, and ratios are compared."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median


@dataclass(frozen=True, slots=True)
class Timing:
    """One run of one contestant."""

    wall: float
    """Seconds of the clock."""
    cpu: float
    """CPU seconds of this process, which other processes hardly change."""


def in_turns(contestants: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, list[Timing]]:
    """Run A, B, A, B, ..., so that load on the machine affects all alike.

    Before that, each runs once without being measured.
    """
    for run in contestants.values():
        run()
    timings: dict[str, list[Timing]] = {name: [] for name in contestants}
    for _ in range(repeats):
        for name, run in contestants.items():
            wall, cpu = time.perf_counter(), time.process_time()
            run()
            timings[name].append(Timing(time.perf_counter() - wall, time.process_time() - cpu))
    return timings


@dataclass(frozen=True, slots=True)
class Figure:
    """A number that was measured several times."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Figure:
        """The figure of one or more values."""
        return cls(median(values), min(values), max(values))

    def text(self, digits: int = 0) -> str:
        """``median (low to high)``"""
        return f"{self.median:,.{digits}f} ({self.low:,.{digits}f} to {self.high:,.{digits}f})"


def ratio(slow: Sequence[Timing], fast: Sequence[Timing], clock: str) -> Figure:
    """Time of one over the time of the other, turn by turn. clock: ``wall`` or ``cpu``."""
    return Figure.of([getattr(a, clock) / getattr(b, clock) for a, b in zip(slow, fast, strict=True)])
