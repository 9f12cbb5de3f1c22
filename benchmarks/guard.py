"""A training step's counts against a committed file: what is stable where seconds are not.

Growth has to be explained: whoever means it writes the file anew (``--update``) and commits it with the change.
"""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks import profile
from benchmarks.workload import Workload, make_trainer
from nemo_aapo.errors import RunError
from nemo_aapo.utils.files import write_atomic
from nemo_aapo.utils.tables import plain

LAYOUTS: dict[str, dict[str, int]] = {
    "1 rank": {"world": 1, "tp": 1},
    "TP 2": {"world": 2, "tp": 2},
    "DP 2": {"world": 2, "tp": 1},
}
WARM_UP = 2
"""Steps before the one that is counted."""
TOLERANCE = {"calls": (0.10, 4), "KiB": (0.10, 16), "costly calls": (0.02, 4), "collectives": (0.0, 0)}
"""Growth that passes, by unit: a share of what was, and so much on top, as one more call of something rare is no tenth
of a step. One more collective is a wait more on every rank, and one more copy in each layer is a tenth of nothing here
but much memory traffic in a real model."""
GROUPS = {
    "copies": ("copy_", "cat", "index_copy_"),
    "matrix products": ("mm", "addmm", "addmm_", "bmm", "baddbmm", "_scaled_dot_product_flash_attention_for_cpu"),
    "values read": ("_local_scalar_dense",),
}
"""Operators that cost most: by bytes, by FLOPs, and by the wait for a GPU that each is there."""
TOP = 12
"""Operators that are listed with their counts and not judged."""

Counts = dict[str, dict[str, int]]
"""By name of the figure's place (``TP 2, rollout``), then by figure (``operators, calls``)."""


class GuardError(RunError):
    """A step does more than before; or the file can't be compared with: missing, broken, or of other libraries."""


# ------------------------------------------------------------------ counting


def count(folder: str, layout: Mapping[str, int], prepare: Callable[[Any], None] | None = None) -> profile.Step:
    """This rank's counts of one step on what ``make_input`` left there. Collective.

    Args:
        prepare: called with the trainer before its first step.
    """
    with contextlib.ExitStack() as stack:
        trainer = make_trainer(Workload(), Path(folder), stack, **layout)
        if prepare:
            prepare(trainer)
        for _ in range(WARM_UP):
            trainer.train_step()
        return profile.profile_step(trainer)


def figures(layout: str, ranks: Sequence[profile.Step]) -> Counts:
    """What is judged, and the most frequent operators; summed over the ranks.

    The peak is one rank's alone: among several, gloo's threads free what was sent a little sooner or later.
    """
    found: Counts = {}
    for name in profile.PHASES:
        phases = [step.phases[name] for step in ranks]
        operators = sum((phase.operators for phase in phases), Counter())
        place = found[f"{layout}, {name}"] = {"operators, calls": operators.total()}
        for group, members in GROUPS.items():
            place[f"{group}, costly calls"] = sum(operators[member] for member in members)
        place["allocations, calls"] = sum(phase.allocations for phase in phases)
        place["allocated, KiB"] = sum(phase.allocated_bytes for phase in phases) // 1024
        for kind, calls in sorted(sum((phase.collectives for phase in phases), Counter()).items()):
            place[f"{kind}, collectives"] = calls
    if len(ranks) == 1:
        found[f"{layout}, step"] = {"peak, KiB": ranks[0].peak_bytes // 1024}
    everything = sum((phase.operators for step in ranks for phase in step.phases.values()), Counter())
    found[f"{layout}, top operators"] = dict(sorted(everything.items(), key=lambda item: (-item[1], item[0]))[:TOP])
    return found


# ------------------------------------------------------------------ the file


def versions() -> dict[str, str]:
    """Of the libraries whose operators are counted."""
    return {name: version(name) for name in ("torch", "megatron-core")}


def write(path: Path, counts: Counts) -> None:
    """Make these the counts to compare with."""
    write_atomic(path, json.dumps({"versions": versions(), "counts": counts}, indent=1) + "\n")


def read(path: Path) -> Counts:
    """The committed counts.

    Raises:
        GuardError: missing, broken, or of other versions of torch or mcore.
    """
    remedy = "python scripts/benchmark.py guard --update writes it anew: look at the table, then commit it"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        counted_with, counts = content["versions"], content["counts"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise GuardError(f"{path}: can't be read ({type(error).__name__}: {error}); {remedy}") from error
    if counted_with != versions():
        raise GuardError(f"{path}: counted with {counted_with}, here are {versions()}; {remedy}")
    return counts


# ------------------------------------------------------------------ judging


@dataclass(frozen=True, slots=True)
class Row:
    """One figure, before and now."""

    place: str
    what: str
    before: int
    now: int

    @property
    def judged(self) -> bool:
        """Whether it can fail."""
        return ", " in self.what

    @property
    def grown(self) -> bool:
        """By more than its unit's tolerance."""
        if not self.judged:
            return False
        share, calls = TOLERANCE[self.what.rpartition(", ")[2]]
        return self.now > self.before * (1 + share) + calls


def compare(before: Counts, now: Counts) -> list[Row]:
    """Every figure of either; what one of them lacks is 0 there. Most frequent operators: those listed in both."""
    rows = []
    for place in dict.fromkeys([*before, *now]):
        old, new = before.get(place, {}), now.get(place, {})
        rows += [Row(place, what, old.get(what, 0), new.get(what, 0)) for what in dict.fromkeys([*old, *new])]
    return [row for row in rows if row.judged or (row.before and row.now)]


def report(rows: Sequence[Row]) -> str:
    """The table: before, now, ratio; what has grown is marked."""
    lines = [
        (
            f"{row.place}: {row.what}",
            f"{row.before:,}",
            f"{row.now:,}",
            f"{row.now / row.before:.2f}" if row.before else "new",
            "GROWN" if row.grown else "",
        )
        for row in rows
        if row.before or row.now
    ]
    return plain(("a training step's", "before", "now", "ratio", ""), lines)


def complaint(grown: Sequence[Row]) -> str:
    """What to say of rows that have grown."""
    named = "".join(f"  {row.place}: {row.what} {row.before:,} -> {row.now:,}\n" for row in grown)
    return (
        f"a training step does more than before:\n{named}If the change means it, python scripts/benchmark.py guard "
        "--update writes the file anew: commit it with the change, and say why. If not, "
        "docs/results/benchmarks.md says how to find the cause"
    )
