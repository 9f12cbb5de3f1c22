"""Tables as text: columns aligned, the first one to the left, the others to the right."""

from __future__ import annotations

import datetime
from collections.abc import Sequence


def plain(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Lines for a screen, without a newline at the end."""
    widths = _widths(header, rows)
    lines = [header, ["-" * width for width in widths], *rows]
    return "\n".join("  ".join(_aligned(line, widths)).rstrip() for line in lines)


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of Markdown, whose source is aligned, too."""
    widths = [max(3, width) for width in _widths(header, rows)]
    ruler = ["-" * width if i == 0 else "-" * (width - 1) + ":" for i, width in enumerate(widths)]
    return "".join(f"| {' | '.join(_aligned(line, widths))} |\n" for line in [header, ruler, *rows])


def _widths(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[int]:
    return [max(map(len, column)) for column in zip(header, *rows, strict=True)]


def _aligned(cells: Sequence[str], widths: Sequence[int]) -> list[str]:
    first, *others = zip(cells, widths, strict=True)
    return [first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in others)]


def time_left(seconds: float, done: int, total: int) -> str:
    """``, 0:05:00 left`` of work of which so much was done in so many seconds; empty where nobody can know."""
    if not 0 < done < total or seconds < 1:
        return ""
    return f", {datetime.timedelta(seconds=round(seconds / done * (total - done)))} left"
