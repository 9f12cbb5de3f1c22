"""Run directories of the demonstration -> report.md, results.json and curves.svg."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from examples.real_model.runs import ALGORITHMS, COMPARED, SAVED_AT, STEPS, VALIDATION_PROMPTS
from examples.study.picture import COLOURS, NAMES, WIDTH, Line, panel, svg
from examples.study.statistics import Interval
from nemo_aapo.run.metrics_file import read_metrics
from nemo_aapo.utils.files import FINISHED, to_json, write_atomic
from nemo_aapo.utils.tables import markdown

GREEDY = "validation/accuracy_greedy"
PHASES = ("rollout", "reward", "reference", "train", "refit")
NOT_OF_THE_RESULT = ("time/", "tokens_per_second", "rollout/tokens_per_second", "rollout/idle", "memory/", "tflops/")
"""Metrics of the machine and its pace, which no two runs have in common."""
SHOWN = 6
"""Completions that are shown before and after."""
Record = Mapping[str, Any]


def write(directory: Path) -> str:
    """Sum up what is finished; the report's text."""
    names = [name for name in (*ALGORITHMS, "killed", "two_stages") if (directory / name / FINISHED).exists()]
    metrics = {name: read_metrics(directory / name / "metrics.jsonl") for name in names}
    runs = {name: lines for name, lines in metrics.items() if name in ALGORITHMS}
    twins = {name: lines for name, lines in metrics.items() if name not in ALGORITHMS}
    costs = json.loads((directory / "costs.json").read_text(encoding="utf-8"))
    parts = [accuracy_table(runs), time_table(runs, costs), *(completions(directory / name) for name in runs)]
    if "aapo" in runs:
        parts += [twin_table(runs["aapo"], name, lines) for name, lines in twins.items()]
        write_atomic(directory / "curves.svg", curves(runs))
    text = "\n".join(parts)
    record = {"metrics": {**runs, **twins}, "costs": costs}
    write_atomic(directory / "results.json", to_json(record) + "\n")
    write_atomic(directory / "report.md", text)
    return text


def validations(lines: Sequence[Record]) -> list[Record]:
    """The records of a run's validations; of a run that went on longer, those that the others have, too."""
    return [line for line in lines if GREEDY in line and line["step"] <= STEPS]


def steps(lines: Sequence[Record]) -> list[Record]:
    """The records of its training steps."""
    return [line for line in lines if "loss" in line]


def accuracy_table(runs: Mapping[str, Sequence[Record]]) -> str:
    """Greedy accuracy at each validation, and the rewards of training in blocks of as many steps."""
    at = sorted({line["step"] for lines in runs.values() for line in validations(lines)})
    rows = []
    for name, lines in runs.items():
        greedy = {line["step"]: f"{line[GREEDY]:.3f}" for line in validations(lines)}
        rows.append([f"{NAMES[name]}, greedy, held out", *(greedy.get(step, "") for step in at)])
        sampled = [f"{mean:.3f}" for mean in block_rewards(lines)]
        rows.append([f"{NAMES[name]}, sampled, in training", "", *sampled, *[""] * (len(at) - 1 - len(sampled))])
    return markdown(["accuracy", *(f"step {step}" for step in at)], rows)


def block_rewards(lines: Sequence[Record]) -> list[float]:
    """Mean reward of the training completions between two validations."""
    rewards = [line["reward/mean"] for line in steps(lines)][:STEPS]
    return [fmean(rewards[i : i + SAVED_AT]) for i in range(0, len(rewards), SAVED_AT)]


def time_table(runs: Mapping[str, Sequence[Record]], costs: Mapping[str, Mapping[str, float]]) -> str:
    """Seconds of each phase, summed over the steps; the rest is starts, reference rewards, validations, checkpoints."""
    rows = []
    for name, cost in costs.items():
        made = steps(runs.get(name, ()))
        known = [*(sum(line[f"time/{phase}"] for line in made) for phase in PHASES)]
        known.append(cost["wall_s"] - sum(line["time/step"] for line in made))
        cells = [f"{seconds:.0f}" for seconds in known] if made else [""] * len(known)
        whole = [f"{cost[key]:.0f}" for key in ("wall_s", "cpu_s", "starts")]
        rows.append([name, f"{len(made) or ''}", *cells, *whole])
    return markdown(["seconds", "steps", *PHASES, "the rest", "wall clock", "CPU", "starts"], rows)


def completions(directory: Path) -> str:
    """The greedy answers to the first held-out questions, before and after training."""
    paths = [directory / "rollouts" / f"step_{step:06d}.jsonl" for step in (0, STEPS)]
    lines = [path.read_text("utf-8").split("\n")[:-1] for path in paths]
    before, after = ([json.loads(line) for line in of[:SHOWN]] for of in lines)
    rows = [
        [str(old["answer"]), *(f"{row['completion']!r}{' ✓' * (row['reward'] == 1)}" for row in (old, new))]
        for old, new in zip(before, after, strict=True)
    ]
    return markdown([f"{NAMES[directory.name]}: answer", "before", "after"], rows)


def twin_table(whole: Sequence[Record], name: str, lines: Sequence[Record]) -> str:
    """A twin beside the run that nothing disturbed: equal metrics, and the largest differences."""
    pairs = [(a, b) for a, b in zip(steps(whole), steps(lines), strict=False) if a["step"] <= COMPARED]
    rows = []
    for a, b in pairs:
        known = [key for key in a if not key.startswith(NOT_OF_THE_RESULT) and key in b]
        equal = sum(a[key] == b[key] for key in known)
        cells = [f"{b[key]:.6f}, {a[key]:.6f}" for key in ("reward/mean", "loss", "grad_norm")]
        rows.append([f"{name}, step {a['step']}", f"{equal} of {len(known)}", *cells])
    return markdown(["beside AAPO undisturbed", "metrics equal to the bit", "reward", "loss", "gradient norm"], rows)


def curves(runs: Mapping[str, Sequence[Record]]) -> str:
    """Greedy accuracy on held-out sums, and rewards in training, over the steps."""
    held_out: list[Line] = []
    training: list[Line] = []
    for (name, lines), colour in zip(runs.items(), COLOURS, strict=False):
        found = validations(lines)
        values = [line[GREEDY] for line in found]
        spread = [Interval(p, 1.96 * math.sqrt(p * (1 - p) / VALIDATION_PROMPTS)) for p in values]
        held_out.append((NAMES[name], colour, [line["step"] for line in found], spread))
        blocks = [Interval(mean, 0.0) for mean in block_rewards(lines)]
        ends = [(i + 1) * SAVED_AT for i in range(len(blocks))]
        training.append((NAMES[name], colour, ends, blocks))
    top = "top left"
    parts = [
        panel(held_out, 64, 470, "greedy accuracy", legend=top, marks=2, title=f"{VALIDATION_PROMPTS} held-out sums"),
        panel(training, 566, WIDTH - 20, "share of right completions", legend=top, marks=2, title="in training"),
    ]
    return svg("SmolLM2-135M-Instruct learns sums of two-digit numbers; shaded: 95 % interval of the sums", parts)
