"""How the cost of a training step grows: group size, completion length, vocabulary, model, layout; and a run's start.

Costs are CPU seconds of this process for a step of GPG; a step of AAPO with stored reference rewards costs the same.
The sizes of one dimension take turns, so that other load on the machine affects all of them alike.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import ranks, start
from benchmarks.measure import Figure, in_turns, ratio
from benchmarks.workload import Workload, make_input, make_trainer
from nemo_aapo.utils.tables import markdown, plain

FACTORS = (1, 2, 4, 8)
BASE = Workload(
    hidden_size=128,
    layers=2,
    vocabulary=1024,
    prompts_per_step=8,
    new_tokens=16,
    max_tokens_per_microbatch=2048,
    algorithm="gpg",
)
WIDTHS = {1: 128, 2: 184, 4: 256, 8: 368}
"""Factor -> the hidden size, divisible by 8, that multiplies the parameters of a layer by about it."""
SUPER_LINEAR = 1.1
"""Growth is called super-linear if the exponent of cost in size, over the last doubling, exceeds this."""
LAYOUTS: dict[str, dict[str, int]] = {
    "1 x 1 x 1": {"world": 1, "tp": 1, "pp": 1},
    "2 x 1 x 1": {"world": 2, "tp": 2, "pp": 1},
    "1 x 2 x 1": {"world": 2, "tp": 1, "pp": 2},
    "1 x 1 x 2": {"world": 2, "tp": 1, "pp": 1},
    "2 x 2 x 1": {"world": 4, "tp": 2, "pp": 2},
}
"""Layouts by name: tensor x pipeline x data parallel."""


@dataclass(frozen=True, slots=True)
class Plan:
    """Sizes of the measurement."""

    dimensions: tuple[str, ...] = ("group size", "completion length", "vocabulary", "layers", "width")
    factors: tuple[int, ...] = FACTORS
    steps: int = 5
    """Measured steps of each size."""
    layouts: tuple[str, ...] = tuple(LAYOUTS)
    starts: int = 4
    """Number of starts, of which the first is not counted."""


QUICK = Plan(dimensions=("group size", "layers"), factors=(1, 2), steps=2, layouts=("1 x 1 x 1", "2 x 1 x 1"), starts=1)


def _sizes(factor: int) -> dict[str, Workload]:
    """The base workload with one dimension so many times as large."""
    return {
        "group size": dataclasses.replace(BASE, group_size=BASE.group_size * factor),
        "completion length": dataclasses.replace(BASE, new_tokens=BASE.new_tokens * factor),
        "vocabulary": dataclasses.replace(BASE, vocabulary=BASE.vocabulary * factor),
        "layers": dataclasses.replace(BASE, layers=BASE.layers * factor),
        "width": dataclasses.replace(BASE, hidden_size=WIDTHS[factor]),
    }


PER_TOKEN = ("group size", "completion length")
"""Dimensions that multiply the tokens of a step; the others raise the cost of each token, at most by their factor."""


@dataclass(frozen=True, slots=True)
class Row:
    """One size of one dimension."""

    dimension: str
    factor: int
    size: int
    tokens: int
    """Completion tokens of a step."""
    cost: Figure
    """CPU microseconds of a completion token."""
    ratio: Figure
    """Cost of a token over that of factor 1, turn by turn."""
    rollout_share: float
    """The rollout's fraction of the CPU time."""


@dataclass(frozen=True, slots=True)
class LayoutRow:
    """The cost of a step on one layout."""

    layout: str
    ranks: int
    cpu_ms: Figure
    """CPU milliseconds of a step, all ranks together."""
    communication: float
    """Fraction of a step's wall time in which gloo worked or waited for another rank; the ranks' mean."""
    collectives: int
    """Collectives, sends and receives of a step, on the busiest rank."""


# ------------------------------------------------------------------ growth


def dimensions(plan: Plan, folder: Path) -> list[Row]:
    """Measure the plan's dimensions at every factor, on one rank. Needs Megatron's process groups."""
    rows = []
    for dimension in plan.dimensions:
        with contextlib.ExitStack() as stack:
            workloads = {factor: _sizes(factor)[dimension] for factor in plan.factors}
            trainers = {}
            for factor, workload in workloads.items():
                path = folder / dimension.replace(" ", "_") / str(factor)
                make_input(workload, path)
                trainers[str(factor)] = make_trainer(workload, path, stack)
            rollouts = {name: _Clock(trainer.rollouts) for name, trainer in trainers.items()}
            timings = in_turns({name: trainer.train_step for name, trainer in trainers.items()}, plan.steps)
        base = timings[str(plan.factors[0])]
        for factor, workload in workloads.items():
            mine, tokens = timings[str(factor)], workload.tokens
            rows.append(
                Row(
                    dimension=dimension,
                    factor=factor,
                    size=_size(workload, dimension),
                    tokens=tokens,
                    cost=Figure.of([1e6 * timing.cpu / tokens for timing in mine]),
                    ratio=_scaled(ratio(mine, base, "cpu"), workloads[plan.factors[0]].tokens / tokens),
                    rollout_share=sum(rollouts[str(factor)].seconds[1:]) / sum(timing.cpu for timing in mine),
                )
            )
    return rows


class _Clock:
    """CPU seconds of each rollout of a pipeline."""

    def __init__(self, rollouts: Any) -> None:
        self.seconds: list[float] = []
        self._generate, rollouts.generate = rollouts.generate, self._timed

    def _timed(self, step: int) -> Any:
        began = time.process_time()
        try:
            return self._generate(step)
        finally:
            self.seconds.append(time.process_time() - began)


def _size(workload: Workload, dimension: str) -> int:
    field = {"completion length": "new_tokens", "width": "hidden_size"}.get(dimension, dimension.replace(" ", "_"))
    return getattr(workload, field)


def _scaled(figure: Figure, by: float) -> Figure:
    return Figure(figure.median * by, figure.low * by, figure.high * by)


def exponent(rows: Sequence[Row]) -> float:
    """The exponent of a dimension's total cost in its size, over the last doubling: 1 is linear.

    Args:
        rows: the rows of one dimension, by factor.
    """
    *_, before, last = rows
    more = last.factor / before.factor if last.dimension in PER_TOKEN else 1.0
    growth = last.ratio.median / before.ratio.median * more
    return math.log(growth) / math.log(last.factor / before.factor)


# ------------------------------------------------------------------ layouts


def layouts(plan: Plan, folder: Path) -> list[LayoutRow]:
    """Measure a step of the base workload on each layout, each with its own processes."""
    make_input(BASE, folder)
    rows = []
    for name in plan.layouts:
        layout = LAYOUTS[name]
        found = ranks.run(_rank, str(folder), layout, plan.steps, **layout)
        rows.append(
            LayoutRow(
                layout=name,
                ranks=layout["world"],
                cpu_ms=Figure.of([1e3 * sum(step) for step in zip(*(rank[0] for rank in found), strict=True)]),
                communication=sum(rank[1] for rank in found) / len(found),
                collectives=max(rank[2] for rank in found),
            )
        )
    return rows


def _rank(folder: str, layout: dict[str, int], steps: int) -> tuple[list[float], float, int]:
    """CPU seconds of each step, the fraction of communication, and collectives of a step, on this rank."""
    from benchmarks import profile

    with contextlib.ExitStack() as stack:
        trainer = make_trainer(BASE, Path(folder), stack, **layout)
        timings = in_turns({"step": trainer.train_step}, steps)["step"]
        counted = profile.profile_step(trainer)  # also warms up the profiler
        share = Figure.of([profile.communication_share(trainer) for _ in range(3)]).median
    collectives = sum(phase.collectives.total() for phase in counted.phases.values())
    return [timing.cpu for timing in timings], share, collectives


# ------------------------------------------------------------------ all of it


def starting(plan: Plan, folder: Path) -> start.Start:
    """Measure the start of one rank."""
    make_input(BASE, folder)
    settings = [
        "experiment=quickstart",
        "algorithm=gpg",
        "trainer.val_check_interval=0",
        "trainer.devices=1",
        f"model.path={folder / 'model'}",
        f"data.train={folder / 'train.jsonl'}",
        f"data.validation={folder / 'validation.jsonl'}",
    ]
    return start.measure(settings, folder / "runs", plan.starts)


def report(rows: Sequence[Row], by_layout: Sequence[LayoutRow], begun: start.Start) -> list[tuple[str, Any, Any]]:
    """Title, header and lines of each table."""
    of = {row.dimension: [other for other in rows if other.dimension == row.dimension] for row in rows}
    growth = [
        (
            row.dimension if row.factor == of[row.dimension][0].factor else "",
            f"{row.size:,}",
            row.cost.text(),
            row.ratio.text(2),
            f"{row.rollout_share:.2f}",
            _judged(of[row.dimension]) if row is of[row.dimension][-1] else "",
        )
        for row in rows
    ]
    spread = [
        (
            row.layout,
            str(row.ranks),
            row.cpu_ms.text(),
            f"{row.cpu_ms.median / by_layout[0].cpu_ms.median:.2f}",
            f"{row.communication:.2f}",
            f"{row.collectives:,}",
        )
        for row in by_layout
    ]
    return [
        (
            "Cost of a completion token in a training step",
            ("dimension", "size", "CPU µs a token", "over the smallest", "rollout's share", "total cost grows as"),
            growth,
        ),
        (
            "Layouts (tensor x pipeline x data)",
            (
                "layout",
                "ranks",
                "CPU ms a step, all ranks",
                "over one rank",
                "share of time in communication",
                "collectives a rank",
            ),
            spread,
        ),
        ("Start of one rank", ("what", "CPU seconds"), start.report(begun)),
    ]


def _judged(rows: Sequence[Row]) -> str:
    found = exponent(rows)
    return f"size^{found:.2f}" + (" (super-linear)" if found > SUPER_LINEAR else "")


def load_line() -> str:
    """A line about the machine and its load."""
    return f"{os.cpu_count()} cores, load average at the end {os.getloadavg()[0]:.1f}, one thread a rank"


def as_text(tables: Sequence[tuple[str, Any, Any]]) -> str:
    """The tables as text for a terminal."""
    return "\n\n".join(f"{title}\n{plain(header, lines)}" for title, header, lines in tables)


def as_markdown(tables: Sequence[tuple[str, Any, Any]]) -> str:
    """The tables as Markdown for a page."""
    parts = [f"**{title}**\n\n{markdown(header, lines)}" for title, header, lines in tables]
    return "\n".join([*parts, f"({load_line()})"])


def picture(rows: Sequence[Row]) -> str:
    """Costs of a token over the smallest size's, as SVG."""
    from examples.study.picture import COLOURS, WIDTH, panel, svg
    from examples.study.statistics import Interval

    def lines(per_token: bool) -> list[Any]:
        names = [name for name in dict.fromkeys(row.dimension for row in rows) if (name in PER_TOKEN) == per_token]
        curves = []
        for name, colour in zip(names, COLOURS, strict=False):
            mine = [row for row in rows if row.dimension == name]
            spread = [
                Interval(r.ratio.median, max(r.ratio.high - r.ratio.median, r.ratio.median - r.ratio.low)) for r in mine
            ]
            curves.append((name, colour, [row.factor for row in mine], spread))
        return curves

    what, over = "cost of a token over the smallest size's", "times the size"
    parts = [
        panel(lines(True), 64, 470, what, upper=1.2, over=over, marks=4, legend="top left"),
        panel(lines(False), 566, WIDTH - 20, what, over=over, marks=4, legend="top left"),
    ]
    return svg("CPU time of a completion token: median and spread", parts)
