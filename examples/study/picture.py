"""The study as SVG pictures: learning curves of each task, and all differences with their intervals.

Lines differ in colour, dash and marker, so that they can be told apart without colours and where they overlap.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple
from xml.sax.saxutils import escape

import numpy as np

from examples.study.design import ALGORITHMS, Comparison
from examples.study.statistics import Curve, Interval, common_budget
from examples.study.tasks import TASKS

WIDTH, HEIGHT = 980, 440
TOP, BOTTOM = 84, 58
NAMES = {"aapo": "AAPO", "gpg": "GPG", "grpo": "GRPO", "dapo": "DAPO", "gspo": "GSPO"}
"""For readers who know no setting."""
POINTS = 13
"""Of a curve, the first of which is the base model."""


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

Line = tuple[str, str, Sequence[float], Sequence[Interval]]
"""Name, colour (of ``STYLES``), steps, and an interval at each."""


@dataclass(frozen=True, slots=True)
class Panel:
    """One pair of axes."""

    left: float
    right: float
    last: float
    """Step at the right end."""
    low: float
    high: float
    tick: float

    def at(self, step: float, value: float) -> tuple[float, float]:
        """The picture's coordinates."""
        x = self.left + (self.right - self.left) * step / self.last
        y = HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (value - self.low) / (self.high - self.low)
        return x, y


def learning_curves(arms: Mapping[tuple[str, str], Sequence[Curve]]) -> str:
    """A panel for each task: accuracy of sampled answers over the completions spent, the reference's included.

    Args:
        arms: (task, algorithm) -> a curve for each seed.
    """
    tasks = list(dict.fromkeys(task for task, _ in arms))
    width = (WIDTH - 20) / len(tasks)
    parts = []
    for place, task in enumerate(tasks):
        found = {arm: curves for (name, arm), curves in arms.items() if name == task}
        budget = common_budget(list(found.values()), "completions")
        spent = np.linspace(0, budget, POINTS)
        lines: list[Line] = []
        for arm, curves in found.items():
            values = np.array([curve.at("completions", spent) for curve in curves])
            colour = COLOURS[ALGORITHMS.index(arm)]
            lines.append((NAMES[arm], colour, list(spent / 1000), [Interval.of(column) for column in values.T]))
        left = place * width + 64
        right = (place + 1) * width
        over, title = "completions sampled, thousands", TASKS[task].title
        parts.append(
            panel(lines, left, right, "accuracy on held-out prompts", upper=1.0, over=over, marks=2, title=title)
        )
    seeds = len(next(iter(arms.values())))
    return svg(f"At equal completions: mean of {seeds} seeds, shaded: its 95 % interval", parts)


def differences(results: Sequence[tuple[Comparison, Interval]]) -> str:
    """A line for each comparison: the difference and its interval; hollow where it is not what was expected."""
    row, left, right = 18, 430, WIDTH - 30
    height = TOP + row * len(results) + 50
    low = min(0.0, *(i.mean - i.half for _, i in results))
    high = max(0.0, *(i.mean + i.half for _, i in results))
    scale = (right - left) / max(high - low, 1e-6)
    tick = _tick(max(high - low, 1e-6))
    parts = []
    for k in range(math.ceil(low / tick), math.floor(high / tick) + 1):
        x, colour = left + scale * (k * tick - low), "#888" if k == 0 else "#ddd"
        parts.append(f'<line x1="{x:.1f}" y1="{TOP - 20}" x2="{x:.1f}" y2="{height - 40}" stroke="{colour}"/>')
        parts.append(f'<text x="{x:.1f}" y="{height - 22}" text-anchor="middle">{k * tick:+.2f}</text>')
    for k, (c, i) in enumerate(results):
        y, colour = TOP + row * k, COLOURS[list(TASKS).index(c.task)]
        start, end, x = (left + scale * (value - low) for value in (i.mean - i.half, i.mean + i.half, i.mean))
        fill = colour if i.verdict == c.expected else "#fff"
        name = escape(f"{c.task}, equal {c.axis}: {c.arm} \N{MINUS SIGN} {c.other}")
        parts.append(f'<text x="{left - 12}" y="{y + 4}" text-anchor="end" font-size="12">{name}</text>')
        parts.append(f'<line x1="{start:.1f}" y1="{y}" x2="{end:.1f}" y2="{y}" stroke="{colour}" stroke-width="2"/>')
        parts.append(f'<circle cx="{x:.1f}" cy="{y}" r="4.5" fill="{fill}" stroke="{colour}" stroke-width="2"/>')
    return svg("Differences of mean accuracy with 95 % intervals; hollow: other than expected", parts, height)


def svg(title: str, parts: Sequence[str], height: int = HEIGHT) -> str:
    """The picture's text, of its panels."""
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" style="{FONT}">\n'
        f'<rect width="{WIDTH}" height="{height}" fill="#fff"/>\n'
        f'<text x="{WIDTH / 2}" y="26" text-anchor="middle" font-size="15" font-weight="bold">{title}</text>\n'
        + "\n".join(parts)
        + "\n</svg>\n"
    )


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
