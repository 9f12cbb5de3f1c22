"""Judged completions -> figures for ``results.json`` and tables for people."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from nemo_aapo.evaluation.estimators import Estimate, average, majority, over_problems, pass_at, sampling_error
from nemo_aapo.evaluation.records import Record
from nemo_aapo.utils.tables import markdown


@dataclass(frozen=True, slots=True)
class Judged:
    """The completions of a benchmark's problems, all with the same number of samples."""

    problems: tuple[str, ...]
    """Ids of the P problems, in the benchmark's order."""
    records: tuple[tuple[Record, ...], ...]
    """[P][k], the completions of each problem."""

    @property
    def samples(self) -> int:
        """Completions of each problem (k)."""
        return len(self.records[0])

    @property
    def correct(self) -> np.ndarray:
        """float64 [P, k]: 1 right, 0 wrong, NaN for a completion that could not be judged."""
        return np.array([[math.nan if r.failed else float(r.correct) for r in row] for row in self.records])

    def part(self, rows: Sequence[int]) -> Judged:
        """These problems alone."""
        return Judged(tuple(self.problems[i] for i in rows), tuple(self.records[i] for i in rows))


def judged(records: Mapping[tuple[str, int], Record], problems: Iterable[str] | None = None) -> Judged:
    """Records by problem and sample, as a table.

    Args:
        problems: ids, in the wanted order; None: those that have all samples, in the order of the records.

    Raises:
        KeyError: a problem lacks a sample.
    """
    samples = 1 + max(sample for _, sample in records)
    if problems is None:
        seen = dict.fromkeys(problem for problem, _ in records)
        problems = [p for p in seen if all((p, k) in records for k in range(samples))]
    ids = tuple(problems)
    return Judged(ids, tuple(tuple(records[p, k] for k in range(samples)) for p in ids))


def figures(found: Judged) -> dict[str, Any]:
    """All figures of a benchmark, for ``results.json``."""
    correct, k = found.correct, found.samples
    answers = [[record.voted for record in row] for row in found.records]
    flat = [record for row in found.records for record in row]
    estimates = {f"avg@{k}": average(correct)}
    estimates |= {f"pass@{n}": pass_at(correct, n) for n in _powers_of_two(k)}
    if k > 1:
        estimates[f"maj@{k}"] = majority(answers, correct)
    return {
        "problems": len(found.problems),
        "samples": k,
        **{name: {"value": e.value, "stderr": e.stderr} for name, e in estimates.items()},
        "sampling_stderr": sampling_error(correct),
        "completion_length": float(np.mean([record.tokens for record in flat])),
        "truncated_fraction": float(np.mean([record.finish_reason == "length" for record in flat])),
        "unanswered_fraction": float(np.mean([record.voted is None for record in flat])),
        "failed_fraction": float(np.mean([record.failed for record in flat])),
        "unjudged_problems": int(np.isnan(correct).all(axis=1).sum()),
        **{f"by_{group}": _groups(found, group) for group in ("level", "subject") if _groups(found, group)},
    }


def _powers_of_two(k: int) -> list[int]:
    """2, 4, 8, ... below k, and k; none for a single sample, whose pass@1 is avg@1."""
    return [2**i for i in range(1, k.bit_length()) if 2**i < k] + ([k] if k > 1 else [])


def _groups(found: Judged, name: str) -> dict[str, dict[str, float]]:
    """avg@k of the problems of each level or subject; empty unless there are several."""
    rows: dict[str, list[int]] = {}
    for i, row in enumerate(found.records):
        if (group := getattr(row[0], name)) is not None:
            rows.setdefault(group, []).append(i)
    if len(rows) < 2:
        return {}
    estimates = {group: (len(rows[group]), average(found.part(rows[group]).correct)) for group in sorted(rows)}
    return {group: {"problems": n, "value": e.value, "stderr": e.stderr} for group, (n, e) in estimates.items()}


def macro_average(results: Mapping[str, Mapping[str, Any]]) -> Estimate | None:
    """The mean of the benchmarks' avg@k with equal weights, as in the paper's table; None for a single benchmark."""
    if len(results) < 2:
        return None
    averages = [figures[f"avg@{figures['samples']}"] for figures in results.values()]
    values = over_problems(np.array([entry["value"] for entry in averages])).value
    return Estimate(values, math.sqrt(sum(entry["stderr"] ** 2 for entry in averages)) / len(averages))


def tables(results: Mapping[str, Mapping[str, Any]]) -> str:
    """Markdown: a line for each benchmark, then tables by level and by subject. Percent, ± one standard error.

    Where completions could not be judged, a column says how many: the figures are of the others.
    """
    several = any(result["samples"] > 1 for result in results.values())
    header = ["benchmark", "problems", "k", "avg@k", *(["± sampling", "pass@k", "maj@k"] if several else [])]
    failed = any(result["failed_fraction"] for result in results.values())
    rows = [_line(name, result, several, failed) for name, result in results.items()]
    if mean := macro_average(results):
        rows.append(["**mean**", "", "", _percent(mean.value, mean.stderr), *([""] * (3 if several else 0))])
    header += ["tokens", "cut", "no answer", *(["not judged"] if failed else [])]
    rows = [row + [""] * (len(header) - len(row)) for row in rows]
    text = markdown(header, rows)
    for group in ("level", "subject"):
        for name, result in results.items():
            if by := result.get(f"by_{group}"):
                lines = [[key, str(e["problems"]), _percent(e["value"], e["stderr"])] for key, e in by.items()]
                text += f"\n{name}\n\n" + markdown([group, "problems", "avg@k"], lines)
    return text


def _line(name: str, result: Mapping[str, Any], several: bool, failed: bool) -> list[str]:
    k = result["samples"]
    cells = [name, str(result["problems"]), str(k), _percent(**result[f"avg@{k}"])]
    if several:
        many = k > 1
        cells.append(f"{100 * result['sampling_stderr']:.1f}" if many else "")
        cells += [_percent(**result[key]) if many else "" for key in (f"pass@{k}", f"maj@{k}")]
    return [
        *cells,
        f"{result['completion_length']:,.0f}",
        f"{result['truncated_fraction']:.1%}",
        f"{result['unanswered_fraction']:.1%}",
        *([f"{result['failed_fraction']:.1%}"] if failed else []),
    ]


def _percent(value: float, stderr: float | None) -> str:
    if not math.isfinite(value):  # nothing could be judged
        return "-"
    error = f" ± {100 * stderr:.1f}" if stderr is not None and math.isfinite(stderr) else ""
    return f"{100 * value:.1f}{error}"
