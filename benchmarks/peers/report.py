"""The figures as Markdown tables, as docs/results/benchmarks.md has them."""

from __future__ import annotations

import dataclasses
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from benchmarks.measure import Figure
from benchmarks.peers.compare import Cell, Found
from benchmarks.peers.plan import LABELS, MEMORY_TARGET, Comparison
from nemo_aapo.utils.tables import markdown

PHASES = ("rollout", "score", "reference", "train", "refit")


@dataclass(frozen=True, slots=True)
class Ratio:
    """A comparison under one model and number of threads: CPU seconds a step, ours over TRL's."""

    comparison: Comparison
    model: str
    threads: int
    cpu: float
    """Ratio of the medians of CPU seconds."""
    low: float
    """Lowest ratio of a single turn."""
    high: float
    """Highest ratio of a single turn."""
    wall: float
    """Ratio of the medians of seconds of the clock."""


def ratios(found: Found) -> list[Ratio]:
    """Every comparison for which both sides were measured."""
    cells = {(c.model, c.arm, c.threads, c.contestant): c for c in found.cells}
    made = []
    for comparison in found.comparisons:
        for model, threads in dict.fromkeys((c.model, c.threads) for c in found.cells):
            key = (model, comparison.arm, threads)
            ours, theirs = cells.get((*key, comparison.ours)), cells.get((*key, comparison.theirs))
            if ours is None or theirs is None:
                continue
            turns = [a.cpu / b.cpu for a, b in zip(ours.steps, theirs.steps, strict=True)]
            cpu = _median(ours, "cpu") / _median(theirs, "cpu")
            wall = _median(ours, "wall") / _median(theirs, "wall")
            made.append(Ratio(comparison, model, threads, cpu, min(turns), max(turns), wall))
    return made


def _over_arms(found: Found) -> list[Cell]:
    """The cells with all steps of a contestant in one, whatever the comparison."""
    whole: dict[tuple[Any, ...], Cell] = {}
    for c in found.cells:
        key = (c.model, c.lengths, c.threads, c.contestant)
        before = whole[key].steps if key in whole else ()
        whole[key] = dataclasses.replace(c, arm="", steps=(*before, *c.steps))
    return list(whole.values())


def _median(cell: Cell, clock: str) -> float:
    return median(getattr(step, clock) for step in cell.steps)


def tables(found: Found, load: Sequence[float], *, judged: bool = True) -> str:
    """All tables, as Markdown.

    Args:
        load: the machine's load average before and after.
        judged: include whether targets were met, which hold for the sizes of the whole plan.
    """
    return "\n".join(
        [
            f"TRL {found.trl}, {platform.machine()}, Python {platform.python_version()}; load average "
            f"{load[0]:.1f} at the start and {load[1]:.1f} at the end.",
            "\nCPU seconds of a step, ours over TRL's: ratio of the medians (lowest to highest of single turns).\n",
            _ratio_table(found, judged),
            "Seconds of a step: median (lowest to highest).\n",
            _step_table(found),
            "Where a step's time goes: seconds of the clock, medians. TRL's weights need no refit.\n",
            _phase_table(found),
            "Peak memory of the process, imports included.\n",
            _memory_table(found, judged),
            "The same completions of TRL's, trained on by both from the same checkpoint before anything is measured.\n",
            _agreement_table(found),
            "Stored reference rewards were drawn once, before the first step (CPU seconds): "
            + "; ".join(f"{where}: {seconds:.1f}" for where, seconds in found.fill_cpu.items())
            + ".\n",
        ]
    )


def verdict(value: float, target: float | None) -> str:
    """The target, and whether it was met; empty without one."""
    return "" if target is None else f"{target:.2f} {'met' if value <= target else 'missed'}"


def _ratio_table(found: Found, judged: bool) -> str:
    rows = [
        [
            r.comparison.arm,
            f"{LABELS[r.comparison.ours]} / {LABELS[r.comparison.theirs]}",
            r.model,
            str(r.threads),
            f"{r.cpu:.2f} ({r.low:.2f} to {r.high:.2f})",
            f"{r.wall:.2f}",
            verdict(r.cpu, r.comparison.target if judged else None),
        ]
        for r in ratios(found)
    ]
    return markdown(["arm", "what", "model", "threads", "CPU", "by the clock", "target"], rows)


def _step_table(found: Found) -> str:
    rows = [
        [
            f"{cell.lengths}, {LABELS[cell.contestant]}",
            cell.model,
            str(cell.threads),
            Figure.of([step.cpu for step in cell.steps]).text(3),
            Figure.of([step.wall for step in cell.steps]).text(3),
            f"{median(step.tokens for step in cell.steps):,.0f}",
            f"{median(step.longest_over_mean for step in cell.steps):.1f}",
            _signed(median(step.loss for step in cell.steps), 4),
        ]
        for cell in _over_arms(found)
    ]
    header = ["lengths, what", "model", "threads", "CPU", "clock", "completion tokens", "max/mean length", "loss"]
    return markdown(header, rows)


def _signed(value: float, digits: int) -> str:
    """The value with its sign, but never a minus before zeros."""
    return f"{round(value, digits) + 0.0:+.{digits}f}"


def _phase_table(found: Found) -> str:
    rows = [
        [
            f"{cell.lengths}, {LABELS[cell.contestant]}",
            cell.model,
            str(cell.threads),
            *(f"{median(step.phases[phase] for step in cell.steps):.3f}" for phase in PHASES),
        ]
        for cell in _over_arms(found)
    ]
    return markdown(["lengths, what", "model", "threads", *PHASES], rows)


def _memory_table(found: Found, judged: bool) -> str:
    theirs = {(m.model, m.lengths): m.peak_bytes for m in found.memory if m.contestant == "trl"}
    rows = []
    for m in found.memory:
        ratio = m.peak_bytes / theirs[m.model, m.lengths]  # TRL's takes part in each kind of lengths
        has_target = judged and m.model == found.large_vocabulary and m.contestant == "ours"
        rows.append(
            [
                f"{m.lengths}, {LABELS[m.contestant]}",
                m.model,
                f"{m.peak_bytes / 2**20:,.0f}",
                f"{ratio:.2f}",
                verdict(ratio, MEMORY_TARGET if has_target else None),
            ]
        )
    return markdown(["lengths, what", "model", "MiB", "over TRL's", "target"], rows)


def _agreement_table(found: Found) -> str:
    rows = [
        [
            f"{a.model}, {a.lengths}",
            f"{a.logprobs:.1e}",
            _signed(a.loss, 6),
            _signed(a.trl_loss, 6),
            f"{a.gradient_norm:.6f}",
            f"{a.trl_gradient_norm:.6f}",
        ]
        for a in found.agreements
    ]
    header = ["model, lengths", "log-probs' mean difference", "loss, ours", "TRL's", "gradient norm, ours", "TRL's"]
    return markdown(header, rows)
