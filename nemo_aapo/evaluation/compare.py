"""Two evaluations side by side: differences on the same problems, with a paired test."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nemo_aapo.errors import ConfigError
from nemo_aapo.evaluation.estimators import Difference, macro_difference, paired_difference, shares
from nemo_aapo.evaluation.records import Records, measured_benchmarks, read_identity
from nemo_aapo.evaluation.report import judged
from nemo_aapo.utils.tables import markdown

SEED = 0
"""Seed of bootstrap and permutation, fixed so that the same two evaluations give the same table."""
EXPECTED_DIFFERENCES = ("model", "seed")
"""Settings that two evaluations may differ in without a note."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """One benchmark in two evaluations A and B, or the mean over all benchmarks.

    Example:
        ``Comparison("math500", samples=(4, 4), a=0.41, b=0.47, left_out=0, difference=Difference(problems=500,
        value=0.06, ...))``
    """

    benchmark: str
    samples: tuple[int, int]
    """Completions of each problem (k) in A and in B."""
    a: float
    """A's avg@k on the problems that both have."""
    b: float
    """B's avg@k on the problems that both have."""
    left_out: int
    """Number of problems of which A or B has no, or not all, completions, or none that could be judged."""
    difference: Difference
    """B minus A, with its errors."""


def compare(a: Path, b: Path, benchmarks: Sequence[str] | None = None) -> tuple[list[Comparison], list[str]]:
    """B against A, on the problems that both measured, by per-problem means.

    Args:
        a, b: directories of evaluations, finished or not.
        benchmarks: None: all that both have.

    Returns:
        A line for each benchmark, and one for their mean if there are several; and notes on settings that differ
        between the two.

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
    lines: list[Comparison] = []
    strata: list[tuple[np.ndarray, np.ndarray]] = []
    for name in benchmarks or both:
        line, means = _benchmark(name, a, b)
        lines.append(line)
        strata.append(means)
    if len(lines) > 1:
        lines.append(_mean(lines, macro_difference(strata, seed=SEED)))
    return lines, notes


def _mean(lines: Sequence[Comparison], difference: Difference) -> Comparison:
    return Comparison(
        "**mean**",
        samples=(max(line.samples[0] for line in lines), max(line.samples[1] for line in lines)),
        a=float(np.mean([line.a for line in lines])),
        b=float(np.mean([line.b for line in lines])),
        left_out=sum(line.left_out for line in lines),
        difference=difference,
    )


def _benchmark(name: str, a: Path, b: Path) -> tuple[Comparison, tuple[np.ndarray, np.ndarray]]:
    kept = [Records(directory, name).read() for directory in (a, b)]
    if not all(kept):  # it was interrupted while it wrote the first line
        raise ConfigError(f"{name}: {b if kept[0] else a} has no whole completion yet; let it go on")
    tables = [judged(records) for records in kept]
    of_a, of_b = (dict(zip(table.problems, shares(table.correct), strict=True)) for table in tables)
    common = [p for p in of_a if p in of_b and not (np.isnan(of_a[p]) or np.isnan(of_b[p]))]
    if not common:
        raise ConfigError(f"{name}: {a} and {b} have no problem in common: are they of the same data?")
    means = (np.array([of_a[problem] for problem in common]), np.array([of_b[problem] for problem in common]))
    comparison = Comparison(
        name,
        (tables[0].samples, tables[1].samples),
        float(means[0].mean()),
        float(means[1].mean()),
        len({**of_a, **of_b}) - len(common),
        paired_difference(*means, seed=SEED),
    )
    return comparison, means


def table(lines: Sequence[Comparison]) -> str:
    """The comparison as a Markdown table, in percent."""
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
