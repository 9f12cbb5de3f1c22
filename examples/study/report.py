"""Finished runs -> tables (Markdown), a record (JSON) and pictures (SVG) of the study."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from examples.study import picture
from examples.study.design import ALGORITHMS, ARMS, AXES, COMPARISONS, GROUP_SIZE, PROMPTS_PER_STEP, Comparison, Run
from examples.study.runs import COST
from examples.study.statistics import Curve, Interval, common_budget, difference, holds
from examples.study.tasks import PROMPTS, TASKS
from nemo_aapo.run.metrics_file import read_metrics
from nemo_aapo.utils.files import FINISHED, to_json, write_atomic
from nemo_aapo.utils.tables import markdown

ACCURACY, LENGTH = "validation/accuracy_sampled", "validation/completion_length"
Arms = Mapping[tuple[str, str], Sequence[Curve]]
"""(task, arm) -> a curve for each seed."""


def read_curve(metrics: Path, *, reference: bool) -> Curve:
    """A run's curve from its ``metrics.jsonl``.

    Args:
        reference: it also sampled as many completions of the reference for each prompt as of the policy, once.
    """
    records = read_metrics(metrics)
    validations = [record for record in records if ACCURACY in record]
    lengths = {record["step"]: record["completion_length/mean"] for record in records if "loss" in record}
    steps = np.array([record["step"] for record in validations], dtype=np.float64)
    per_step = PROMPTS_PER_STEP * GROUP_SIZE
    own = np.array([sum(lengths[k + 1] for k in range(int(step))) * per_step for step in steps])
    drawn = np.minimum(steps * PROMPTS_PER_STEP, PROMPTS) * GROUP_SIZE * reference
    spent = {"steps": steps, "completions": steps * per_step + drawn, "tokens": own + drawn * validations[0][LENGTH]}
    return Curve(np.array([record[ACCURACY] for record in validations]), spent)


def read_arms(runs: Sequence[Run], study: Path) -> dict[tuple[str, str], list[Curve]]:
    """The curves of every arm of which all seeds are finished."""
    found: dict[tuple[str, str], list[Curve]] = {}
    for task, arm in dict.fromkeys((run.task.name, run.arm) for run in runs):
        places = [run.directory(study) for run in runs if (run.task.name, run.arm) == (task, arm)]
        if all((place / FINISHED).exists() for place in places):
            reference = "algorithm=aapo" in ARMS[arm]
            found[task, arm] = [read_curve(place / "metrics.jsonl", reference=reference) for place in places]
    return found


def write(runs: Sequence[Run], study: Path) -> str:
    """``study.json``, ``tables.md`` and the pictures, of what is finished; the tables' text."""
    arms = read_arms(runs, study)
    results = compare(arms)
    seeds = ", ".join(str(seed) for seed in dict.fromkeys(run.seed for run in runs))
    text = "\n".join([f"Seeds {seeds}.\n", _curves_table(arms), _comparisons_table(results)])
    record = {
        "comparisons": [{**asdict(c), "mean": i.mean, "half": i.half, "found": i.verdict} for c, i in results],
        "curves": {
            f"{task}: {arm}": [
                {"accuracy": curve.accuracy, **{axis: curve.spent[axis] for axis in AXES}} for curve in curves
            ]
            for (task, arm), curves in arms.items()
        },
        "cpu_s": _cpu_seconds(runs, study),
    }
    write_atomic(study / "study.json", to_json(record) + "\n")
    write_atomic(study / "tables.md", text)
    algorithms = {key: curves for key, curves in arms.items() if key[1] in ALGORITHMS}
    if algorithms:
        write_atomic(study / "learning_curves.svg", picture.learning_curves(algorithms))
    if results:
        write_atomic(study / "differences.svg", picture.differences(results))
    return text


def compare(arms: Arms) -> list[tuple[Comparison, Interval]]:
    """Every comparison of the design whose two arms are there."""
    found = []
    for comparison in COMPARISONS:
        pair = [arms.get((comparison.task, arm)) for arm in (comparison.arm, comparison.other)]
        if pair[0] is not None and pair[1] is not None:
            budget = common_budget([pair[0], pair[1]], comparison.axis)
            found.append((comparison, difference(pair[0], pair[1], comparison.axis, budget)))
    return found


def _curves_table(arms: Arms) -> str:
    """Each arm by itself: its mean along the curve at each budget that its task's algorithms share, and its end."""
    rows = []
    for (task, arm), curves in arms.items():
        peers = [found for (name, other), found in arms.items() if name == task and other in ALGORITHMS]
        budgets = {axis: common_budget([*peers, curves], axis) for axis in AXES}
        means: list[list[Any]] = [
            [curve.mean_until(axis, budget) for curve in curves] for axis, budget in budgets.items()
        ]
        ends = [[curve.at(axis, budgets[axis]) for curve in curves] for axis in ("steps", "completions")]
        rows.append([TASKS[task].title, arm, *(Interval.of(values).text() for values in (*means, *ends))])
    header = [*(f"mean, equal {axis}" for axis in AXES), "end, equal steps", "end, equal completions"]
    return markdown(["task", "arm", *header], rows)


def _comparisons_table(results: Sequence[tuple[Comparison, Interval]]) -> str:
    rows = [
        [
            TASKS[c.task].title,
            f"{c.arm} \N{MINUS SIGN} {c.other}",
            c.axis,
            found.text(signed=True),
            c.expected,
            found.verdict,
            "" if holds(c.expected, found) else "no",
        ]
        for c, found in results
    ]
    return markdown(["task", "difference", "equal", "mean accuracy", "expected", "found", "as expected"], rows)


def _cpu_seconds(runs: Sequence[Run], study: Path) -> float:
    costs = [run.directory(study) / COST for run in runs]
    return sum(json.loads(path.read_text())["cpu_s"] for path in costs if path.exists())
