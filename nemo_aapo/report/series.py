"""The metrics of a run as columns: one list a metric, which the page thins where a run is long."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from nemo_aapo.run.metrics_file import number

POINTS = 2_000
"""At most so many points of a curve are on the page: more than a screen has."""
MINIMA = ("negative_advantage_logprob",)
"""Metrics of which a thinned curve shows the lowest value; of all others it shows the mean."""
CLOCKS = ("step", "tokens", "hours")
"""Columns of which it shows the last value."""
DIGITS = 5
"""Significant digits of a value on the page."""

Column = list[float | None]


def columns(records: Sequence[Mapping[str, Any]]) -> dict[str, Column]:
    """Name of a metric -> its values, None where it is missing, beside ``step``.

    Example: ``columns([{"step": 1, "loss": 0.5}, {"step": 2}])`` is ``{"step": [1, 2], "loss": [0.5, None]}``.
    """
    names = dict.fromkeys(name for record in records for name in record)
    return {name: [record.get(name) for record in records] for name in names}


def thinned(table: Mapping[str, Column], points: int = POINTS) -> dict[str, Column]:
    """The columns of at most so many points, each of so many steps after one another, in a page's digits."""
    rows = max(map(len, table.values()), default=0)
    stride = max(1, math.ceil(rows / points))
    return {
        name: [_one(name, column[start : start + stride]) for start in range(0, rows, stride)]
        for name, column in table.items()
    }


def with_clocks(records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Training steps with two more clocks: ``tokens``, completion tokens so far, and ``hours`` spent in steps."""
    tokens = seconds = 0.0
    found = []
    for record in records:
        seconds += (step := number(record, "time/step"))
        tokens += number(record, "tokens_per_second") * step
        found.append({**record, "tokens": round(tokens), "hours": seconds / 3600})
    return found


def values(column: Sequence[float | None]) -> list[float]:
    """Those that are there."""
    return [value for value in column if value is not None]


def mean(column: Sequence[float | None]) -> float | None:
    """Of those that are there; None where none is."""
    there = values(column)
    return sum(there) / len(there) if there else None


def rounded(value: float) -> float:
    """To the digits that a page shows; whole numbers stay whole."""
    return value if isinstance(value, int) else float(f"{value:.{DIGITS}g}")


def _one(name: str, part: Column) -> float | None:
    there = values(part[-1:] if name in CLOCKS else part)
    if not there:
        return None
    return rounded(there[0] if len(there) == 1 else min(there) if name in MINIMA else sum(there) / len(there))
