"""Two evaluations side by side: differences on the same problems, with a paired test."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nemo_aapo.errors import ConfigError
from nemo_aapo.evaluation.estimators import Difference, macro_difference, paired_difference
from nemo_aapo.evaluation.records import Records, measured_benchmarks, read_identity
from nemo_aapo.evaluation.report import judged
from nemo_aapo.utils.tables import markdown

SEED = 0
"""Of bootstrap and permutation: the same two evaluations give the same table."""
EXPECTED_DIFFERENCES = ("model", "seed")


@dataclass(frozen=True, slots=True)
class Comparison:
    """One benchmark in both, or the mean over all of them."""

    benchmark: str
    samples: tuple[int, int]
    """k in A and in B."""
    a: float
    b: float
    """avg@k on the problems that both have."""
    left_out: int
    """Problems that only one of them has, or has whole."""
    difference: Difference


def compare(a: Path, b: Path, benchmarks: Sequence[str] | None = None) -> tuple[list[Comparison], list[str]]:
    """B against A, on the problems that both measured, by per-problem means.

    Args:
        a, b: directories of evaluations, finished or not.
        benchmarks: None: all that both have.

    Returns:
        A line for each benchmark, and one for their mean if there are several; and what else differs between the two,
        for people.

    Raises:
        ConfigError: nothing to compare.
    """
    identities = [read_identity(directory) for directory in (a, b)]
    notes = [
        f"{key}: {identities[0].get(key)!r} in {a}, {identities[1].get(key)!r} in {b}"
        for key in identities[0]
        if key not in EXPECTED_DIFFERENCES and identities[0][key] != identities[1].get(key)
    ]
    both = [name for name in measured_benchmarks(a) if name in measured_benchmarks(b)]
    missing = [name for name in benchmarks or () if name not in both]
    if missing or not both:
        raise ConfigError(f"{a} and {b} do not both have completions of {', '.join(missing) or 'one benchmark'}")
    lines, strata = [], []
    for name in benchmarks or both:
        line, means = _benchmark(name, a, b)
        lines.append(line)
        strata.append(means)
    if len(lines) > 1:
        samples = tuple(max(line.samples[i] for line in lines) for i in range(2))
        values = [float(np.mean([getattr(line, side) for line in lines])) for side in "ab"]
        left_out = sum(line.left_out for line in lines)
        lines.append(Comparison("**mean**", samples, *values, left_out, macro_difference(strata, seed=SEED)))
    return lines, notes


def _benchmark(name: str, a: Path, b: Path) -> tuple[Comparison, tuple[np.ndarray, np.ndarray]]:
    kept = [Records(directory, name).read() for directory in (a, b)]
    if not all(kept):  # interrupted in the first line
        raise ConfigError(f"{name}: {b if kept[0] else a} has no whole completion yet; let it go on")
    tables = [judged(records) for records in kept]
    there = [set(table.problems) for table in tables]
    common = [problem for problem in tables[0].problems if problem in there[1]]
    if not common:
        raise ConfigError(f"{name}: {a} and {b} have no problem in common: are they of the same data?")
    parts = [table.part([table.problems.index(problem) for problem in common]) for table in tables]
    means = tuple(part.correct.mean(axis=1) for part in parts)
    comparison = Comparison(
        name,
        (parts[0].samples, parts[1].samples),
        float(means[0].mean()),
        float(means[1].mean()),
        len(there[0] ^ there[1]),
        paired_difference(*means, seed=SEED),
    )
    return comparison, means


def table(lines: Sequence[Comparison]) -> str:
    """Markdown, in percent."""
    header = ["benchmark", "problems", "k", "A", "B", "B - A", "95 % interval", "p"]
    rows = []
    for line in lines:
        d = line.difference
        k = str(line.samples[0]) if line.samples[0] == line.samples[1] else "{} / {}".format(*line.samples)
        interval = f"{100 * d.low:+.1f} to {100 * d.high:+.1f}"
        difference = f"{100 * d.value:+.1f} ± {100 * d.stderr:.1f}"
        p = f"{d.p_value:.4f}" if d.p_value >= 0.0001 else "< 0.0001"
        cells = [line.benchmark, str(d.problems), k, f"{100 * line.a:.1f}", f"{100 * line.b:.1f}"]
        rows.append([*cells, difference, interval, p])
    return markdown(header, rows)
