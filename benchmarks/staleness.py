"""Seconds of a step by ``rollout.async_depth``, measured on paced servers beside what the simulation says."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.paced import Pace, planned, step_seconds
from nemo_aapo.planning.simulation.schedule import Outcome, schedule

SEED = 0
Table = tuple[tuple[str, ...], list[list[str]]]


@dataclass(frozen=True)
class Plan:
    """The pace of both sides, and the depths that are compared."""

    pace: Pace = field(default_factory=Pace)
    depths: tuple[int, ...] = (0, 1, 2, 4)
    balanced: bool = True
    """The learner takes as long as a server does on average, as on the best split of GPUs."""


QUICK = Plan(Pace(servers=2, prompts=4, group_size=2, mean_tokens=4, tail_factor=2, token_s=0.005, steps=3), (0, 1))


@dataclass(frozen=True)
class Row:
    """One depth."""

    depth: int
    step_s: float
    simulated: Outcome


def measure(plan: Plan, folder: Path, log: Callable[[str], None]) -> list[Row]:
    """A run for each depth, one after the other, on servers that are started anew. This process has joined the ranks.

    Args:
        folder: an empty one.
        log: told of each run that has ended.
    """
    pace = balanced(plan.pace) if plan.balanced else plan.pace
    seconds, rows = planned(pace, SEED), []
    for depth in plan.depths:
        place = folder / f"depth_{depth}"
        place.mkdir(parents=True)
        step_s = step_seconds(pace, place, f"rollout.async_depth={depth}", f"seed={SEED}")
        rows.append(Row(depth, step_s, schedule(seconds, depth)))
        log(f"async_depth {depth}: {step_s:.2f} s a step, {rows[-1].simulated.step_s:.2f} s simulated")
    return rows


def balanced(pace: Pace) -> Pace:
    """The same with a learner that takes as long for a step as a server does on average."""
    seconds = planned(pace, SEED)
    generated = sum(map(sum, seconds.generate)) / pace.servers
    return dataclasses.replace(pace, train_token_s=pace.train_token_s * generated / sum(seconds.train))


def table(rows: Sequence[Row]) -> Table:
    """The rows for people."""
    header = ("async_depth", "seconds a step", "simulated", "times as fast as 0", "trainer busy", "servers busy", "lag")
    lines = [
        [
            str(row.depth),
            f"{row.step_s:.2f}",
            f"{row.simulated.step_s:.2f}",
            f"{rows[0].step_s / row.step_s:.2f}",
            f"{row.simulated.trainer_busy * row.simulated.step_s / row.step_s:.0%}",
            f"{row.simulated.engines_busy * row.simulated.step_s / row.step_s:.0%}",
            f"{row.simulated.lag:.1f}",
        ]
        for row in rows
    ]
    return header, lines


def picture(rows: Sequence[Row]) -> str:
    """Measured and simulated seconds of a step by depth, as SVG."""
    from examples.study.picture import COLOURS, WIDTH, panel, svg
    from examples.study.statistics import Interval

    depths = [row.depth for row in rows]

    def curve(name: str, colour: str, values: Sequence[float]) -> Any:
        return name, colour, depths, [Interval(value, 0.0) for value in values]

    measured, simulated = [row.step_s for row in rows], [row.simulated.step_s for row in rows]
    speed = [measured[0] / value for value in measured], [simulated[0] / value for value in simulated]
    over = "rollout.async_depth"
    left = [curve("measured", COLOURS[0], measured), curve("simulated", COLOURS[1], simulated)]
    right = [curve("measured", COLOURS[0], speed[0]), curve("simulated", COLOURS[1], speed[1])]
    return svg(
        "A step by how far rollouts run ahead: paced servers, lengths with a long tail",
        [
            panel(left, 64, 470, "seconds of a step", 1.4 * max(measured), over=over, marks=4, legend="top left"),
            panel(right, 566, WIDTH - 20, "times as fast as depth 0", over=over, marks=4),
        ],
    )
