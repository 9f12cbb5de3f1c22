"""Seconds of a step in order and in flight, measured on paced servers beside what the simulation says."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.paced import Pace, engine_of, lengths_of, planned
from benchmarks.paced_run import step_seconds
from nemo_aapo.planning.simulation.in_flight import in_flight
from nemo_aapo.planning.simulation.schedule import Outcome, schedule

SEED = 0
OVER = 1.5
Table = tuple[tuple[str, ...], list[list[str]]]


Mode = tuple[int, bool, float | None]
"""Steps of staleness; whether in flight; ``rollout.oversample``."""
IN_ORDER: tuple[Mode, ...] = tuple((depth, False, None) for depth in (0, 1, 2, 4))
OTHERS: tuple[Mode, ...] = ((2, True, None), (4, True, None), (2, False, OVER), (2, True, OVER))


@dataclass(frozen=True)
class Plan:
    """The pace of both sides, and what is compared."""

    pace: Pace = field(default_factory=Pace)
    modes: tuple[Mode, ...] = IN_ORDER + OTHERS
    balanced: bool = True
    """The learner takes as long as a server does on average, as on the best split of GPUs."""
    after: int = 6
    """Steps that are not counted: the first rollouts are all of one version, and wait for nothing."""


QUICK = Plan(
    Pace(servers=2, prompts=4, group_size=2, mean_tokens=4, tail_factor=2, token_s=0.005, steps=4),
    ((0, False, None), (1, False, None), (1, True, None)),
    after=1,
)


@dataclass(frozen=True)
class Row:
    """One way to run."""

    mode: Mode
    step_s: float
    lag: float
    """Mean over the tokens that were trained on, in versions."""
    simulated: Outcome

    @property
    def name(self) -> str:
        """As it is set."""
        depth, moving, over = self.mode
        return f"{'max_lag' if moving else 'async_depth'}={depth}" + (f" oversample={over:g}" if over else "")


def measure(plan: Plan, folder: Path, log: Callable[[str], None]) -> list[Row]:
    """A run for each mode, one after the other, on servers that are started anew. This process has joined the ranks.

    Args:
        folder: an empty one.
        log: told of each run that has ended.
    """
    pace = balanced(plan.pace) if plan.balanced else plan.pace
    rows = []
    for number, mode in enumerate(plan.modes):
        place = folder / str(number)
        place.mkdir(parents=True)
        step_s, lag = step_seconds(pace, place, *words(mode), f"seed={SEED}", after=plan.after)
        rows.append(Row(mode, step_s, lag, simulated(pace, mode, plan.after)))
        log(f"{rows[-1].name}: {step_s:.2f} s a step, {rows[-1].simulated.step_s:.2f} s simulated, lag {lag:.2f}")
    return rows


def words(mode: Mode) -> list[str]:
    """The settings of a mode."""
    depth, moving, over = mode
    oversampled = [] if over is None else [f"rollout.oversample={over}"]
    return [f"rollout.{'max_lag' if moving else 'async_depth'}={depth}", *oversampled]


def simulated(pace: Pace, mode: Mode, after: int) -> Outcome:
    """What is known beforehand of a run; more prompts than a step needs are generated and not trained on."""
    depth, moving, over = mode
    lengths = lengths_of(pace, SEED, math.ceil(pace.prompts * (over or 1)))
    train_token_s = pace.train_token_s * pace.prompts / len(lengths[0])
    if moving:
        return in_flight(engine_of(pace), pace.servers, lengths, train_token_s, depth, after=after)
    return schedule(planned(pace, lengths, train_token_s), depth, after)


def balanced(pace: Pace) -> Pace:
    """The same with a learner that takes as long for a step as a server does on average."""
    seconds = planned(pace, lengths_of(pace, SEED), pace.train_token_s)
    generated = sum(map(sum, seconds.generate)) / pace.servers
    return dataclasses.replace(pace, train_token_s=pace.train_token_s * generated / sum(seconds.train))


def table(rows: Sequence[Row]) -> Table:
    """The rows for people."""
    header = (
        "rollout.",
        "seconds a step",
        "simulated",
        "times as fast as 0",
        "trainer busy",
        "servers busy",
        "lag of a token",
    )
    lines = [
        [
            row.name,
            f"{row.step_s:.2f}",
            f"{row.simulated.step_s:.2f}",
            f"{rows[0].step_s / row.step_s:.2f}",
            f"{row.simulated.trainer_busy * row.simulated.step_s / row.step_s:.0%}",
            f"{row.simulated.engines_busy * row.simulated.step_s / row.step_s:.0%}",
            f"{row.lag:.1f}",
        ]
        for row in rows
    ]
    return header, lines


def picture(rows: Sequence[Row]) -> str:
    """Measured and simulated seconds of a step by staleness, in order and in flight, as SVG."""
    from examples.study.picture import COLOURS, WIDTH, panel, svg
    from examples.study.statistics import Interval

    plain = [row for row in rows if row.mode[2] is None]
    ordered, moving = ([row for row in plain if row.mode[1] is kind] for kind in (False, True))

    def curve(name: str, colour: int, of: Sequence[Row], value: Callable[[Row], float]) -> Any:
        depths = [row.mode[0] for row in of]
        return name, COLOURS[colour], depths, [Interval(value(row), 0.0) for row in of]

    def curves(value: Callable[[float, float], float]) -> list[Any]:
        measured = lambda row: value(row.step_s, rows[0].step_s)  # noqa: E731
        said = lambda row: value(row.simulated.step_s, rows[0].simulated.step_s)  # noqa: E731
        return [
            curve("in order, measured", 0, ordered, measured),
            curve("simulated", 1, ordered, said),
            *(
                [curve("in flight, measured", 2, moving, measured), curve("simulated", 3, moving, said)]
                if moving
                else []
            ),
        ]

    over, most = "steps of staleness", 1.4 * max(row.step_s for row in rows)
    seconds, speed = curves(lambda own, _: own), curves(lambda own, first: first / own)
    return svg(
        "A step by how far rollouts run ahead: paced servers, lengths with a long tail",
        [
            panel(seconds, 64, 470, "seconds of a step", most, over=over, marks=4, legend="top left"),
            panel(speed, 566, WIDTH - 20, "times as fast as on policy", over=over, marks=4),
        ],
    )
