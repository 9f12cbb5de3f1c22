"""The study as an SVG picture: learning curves on the left, differences paired by seed on the right.

Lines differ in colour, dash and marker, so that they can be told apart without colours and where they overlap.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple
from xml.sax.saxutils import escape

import numpy as np

from examples.study.analysis import Interval, Runs

WIDTH, HEIGHT = 980, 440
TOP, BOTTOM = 84, 58
TASK = "sums of two-digit numbers"
ALGORITHMS = {"aapo": "AAPO", "aapo_paper": "AAPO, as published", "gpg": "GPG", "grpo": "GRPO"}
"""Names for readers who know no setting."""


class Style(NamedTuple):
    """What tells a line of one colour from the others, besides the colour."""

    dash: str
    """SVG's ``stroke-dasharray``; ``none`` is a solid line."""
    marker: str
    """Points of a polygon around (0, 0), at most 5 pixels away."""


STYLES = {
    "#0072b2": Style("none", "-3,-3 3,-3 3,3 -3,3"),
    "#d55e00": Style("8 4", "0,-5 5,4 -5,4"),
    "#009e73": Style("2 3", "0,-5 5,0 0,5 -5,0"),
    "#cc79a7": Style("10 3 2 3", "0,5 5,-4 -5,-4"),
    "#e69f00": Style("5 2", "-4,-1 -1,-4 4,1 1,4"),
    "#56b4e9": Style("1 2", "-1,-4 1,-4 1,4 -1,4"),
}
"""By colour: Okabe and Ito's, which colour-blind readers tell apart."""
COLOURS = tuple(STYLES)
FONT = "font-family: Helvetica, Arial, sans-serif; font-size: 13px; fill: #222"

Line = tuple[str, str, Sequence[int], Sequence[Interval]]
"""Name, colour (of ``STYLES``), steps, and an interval at each."""


@dataclass(frozen=True, slots=True)
class Panel:
    """One pair of axes."""

    left: float
    right: float
    last: int
    """Step at the right end."""
    low: float
    high: float
    tick: float

    def at(self, step: float, value: float) -> tuple[float, float]:
        """The picture's coordinates."""
        x = self.left + (self.right - self.left) * step / self.last
        y = HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (value - self.low) / (self.high - self.low)
        return x, y


def learning_curves(runs: Mapping[str, Runs]) -> str:
    """The picture's text: sampled accuracy on held-out prompts over the training steps.

    Args:
        runs: by algorithm; the others are compared with the first.
    """
    first, *others = runs
    seeds = len(runs[first].sampled)
    names = {name: ALGORITHMS.get(name, name) for name in runs}
    colours = dict(zip(runs, COLOURS, strict=False))
    steps = runs[first].steps
    curves = [(names[name], colours[name], steps, _intervals(found.sampled)) for name, found in runs.items()]
    differences = [
        (
            f"{names[first]} minus {names[other]}",
            colours[other],
            steps,
            _intervals(runs[first].sampled - runs[other].sampled),
        )
        for other in others
    ]
    right = 470 if others else WIDTH - 20
    parts = [panel(curves, 64, right, "accuracy on held-out prompts", upper=1.0, title="Accuracy of sampled answers")]
    if differences:
        title = f"How much higher {names[first]}'s accuracy is"
        parts.append(panel(differences, 566, WIDTH - 20, "difference of runs with the same seed", title=title))
    return svg(f"Learning {TASK}: mean of {seeds} seeds, shaded: its 95 % interval", parts)


def svg(title: str, parts: Sequence[str]) -> str:
    """The picture's text, of its panels."""
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" style="{FONT}">\n'
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#fff"/>\n'
        f'<text x="{WIDTH / 2}" y="26" text-anchor="middle" font-size="15" font-weight="bold">{title}</text>\n'
        + "\n".join(parts)
        + "\n</svg>\n"
    )


def _intervals(values: np.ndarray) -> list[Interval]:
    """Over the seeds, of values [seeds, V]."""
    return [Interval.of(column) for column in values.T]


def panel(
    lines: Sequence[Line],
    left: float,
    right: float,
    what: str,
    upper: float | None = None,
    over: str = "training step",
    marks: int = 5,
    legend: str = "bottom right",
    title: str = "",
) -> str:
    """Lines with their intervals between two places of the picture.

    Args:
        what, over: the axes' names.
        upper: where the vertical axis ends; by default above the highest interval.
        marks: parts that the horizontal axis is cut into.
        legend: ``bottom right`` or ``top left``.
        title: what stands above.
    """
    last = lines[0][2][-1]
    low = min(i.mean - i.half for line in lines for i in line[3])
    high = upper if upper is not None else max(i.mean + i.half for line in lines for i in line[3])
    tick = _tick(high - low)
    axes = Panel(left, right, last, math.floor(low / tick) * tick, math.ceil(high / tick) * tick, tick)
    parts = [_axes(axes, what, over, marks)]
    parts += [_band(axes, line) for line in lines]
    parts += [_curve(axes, line) for line in lines]
    if title:
        parts.append(f'<text x="{(left + right) / 2}" y="{TOP - 18}" text-anchor="middle">{escape(title)}</text>')
    return "\n".join([*parts, _legend(axes, lines, legend)])


def _curve(panel: Panel, line: Line) -> str:
    """The means: a line, and a marker at each."""
    _, colour, steps, intervals = line
    points = [panel.at(step, i.mean) for step, i in zip(steps, intervals, strict=True)]
    markers = [_marker(colour, x, y) for x, y in points]
    return "\n".join([f'<polyline points="{_points(points)}" fill="none" {_stroke(colour)}/>', *markers])


def _stroke(colour: str) -> str:
    return f'stroke="{colour}" stroke-width="2" stroke-dasharray="{STYLES[colour].dash}"'


def _marker(colour: str, x: float, y: float) -> str:
    return f'<polygon points="{STYLES[colour].marker}" transform="translate({x:.1f} {y:.1f})" fill="{colour}"/>'


def _tick(span: float) -> float:
    """A round distance that gives five to ten marks."""
    power = 10.0 ** math.floor(math.log10(max(span, 1e-6)))
    return next(power * factor for factor in (0.1, 0.2, 0.5, 1.0) if span / (power * factor) <= 10)


def _axes(panel: Panel, what: str, over: str, marks: int) -> str:
    """Grid, numbers, and what the axes mean."""
    parts = [grid(panel, what)]
    for part in range(marks + 1):
        x, y = panel.at(panel.last * part / marks, panel.low)
        parts.append(f'<line x1="{x:.1f}" y1="{y:.1f}" x2="{x:.1f}" y2="{y + 5:.1f}" stroke="#222"/>')
        parts.append(f'<text x="{x:.1f}" y="{y + 20:.1f}" text-anchor="middle">{panel.last * part / marks:g}</text>')
    x, y = panel.at(panel.last / 2, panel.low)
    parts.append(f'<text x="{x:.1f}" y="{y + 42:.1f}" text-anchor="middle">{over}</text>')
    return "\n".join(parts)


def grid(panel: Panel, what: str) -> str:
    """The vertical axis: lines, numbers, and what it means."""
    parts = []
    digits = max(1, -math.floor(math.log10(panel.tick)))
    for i in range(round((panel.high - panel.low) / panel.tick) + 1):
        value = panel.low + i * panel.tick
        x, y = panel.at(0, value)
        colour = "#888" if abs(value) < panel.tick / 2 else "#ddd"
        parts.append(f'<line x1="{x:.1f}" y1="{y:.1f}" x2="{panel.right}" y2="{y:.1f}" stroke="{colour}"/>')
        parts.append(f'<text x="{x - 8:.1f}" y="{y + 4:.1f}" text-anchor="end">{value + 0.0:.{digits}f}</text>')
    x, y = panel.left - 50, (TOP + HEIGHT - BOTTOM) / 2
    parts.append(f'<text x="{x}" y="{y}" text-anchor="middle" transform="rotate(-90 {x} {y})">{what}</text>')
    return "\n".join(parts)


def _band(panel: Panel, line: Line) -> str:
    _, colour, steps, intervals = line
    upper = [panel.at(step, min(i.mean + i.half, panel.high)) for step, i in zip(steps, intervals, strict=True)]
    lower = [panel.at(step, max(i.mean - i.half, panel.low)) for step, i in zip(steps, intervals, strict=True)]
    return f'<polygon points="{_points([*upper, *lower[::-1]])}" fill="{colour}" fill-opacity="0.15"/>'


def _legend(panel: Panel, lines: Sequence[Line], place: str) -> str:
    parts = []
    for i, (name, colour, _, _) in enumerate(lines):
        if place == "top left":
            x, y = panel.left + 24, TOP + 18 + 20 * i
        else:
            x, y = panel.right - 170, HEIGHT - BOTTOM - 18 - 20 * (len(lines) - 1 - i)
        parts.append(f'<line x1="{x}" y1="{y}" x2="{x + 30}" y2="{y}" {_stroke(colour)}/>')
        parts.append(_marker(colour, x + 15, y))
        parts.append(f'<text x="{x + 38}" y="{y + 4}">{escape(name)}</text>')
    return "\n".join(parts)


def _points(points: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
