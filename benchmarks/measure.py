"""Comparing things on a machine that is never quite quiet: in turns, and by ratios."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median


@dataclass(frozen=True, slots=True)
class Timing:
    """One run of one contestant."""

    wall: float
    """Seconds of the clock: what a user waits."""
    cpu: float
    """Seconds of this process on a core: what is left of it when others are taken out."""


def in_turns(contestants: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, list[Timing]]:
    """A, B, A, B, ...: what slows the machine down for a while hits all alike.

    Each runs once before, unmeasured.
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
        """Of at least one value."""
        return cls(median(values), min(values), max(values))

    def text(self, digits: int = 0) -> str:
        """``median (low to high)``"""
        return f"{self.median:,.{digits}f} ({self.low:,.{digits}f} to {self.high:,.{digits}f})"


def ratio(slow: Sequence[Timing], fast: Sequence[Timing], clock: str) -> Figure:
    """Time of one over the time of the other, turn by turn. clock: ``wall`` or ``cpu``."""
    return Figure.of([getattr(a, clock) / getattr(b, clock) for a, b in zip(slow, fast, strict=True)])
