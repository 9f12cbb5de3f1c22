"""Compares a training step's counts with a committed file, as counts repeat where seconds do not.

Growth has to be explained: if it is intended, write the file anew (``--update``) and commit it with the change.
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
"""Unit -> growth that passes: a fraction of the old count, plus an absolute number that forgives one more call of
something rare. Collectives get none, as each is a wait on every rank; costly calls get little, as a copy in each layer
is cheap here but much memory traffic in a real model."""
GROUPS = {
    "copies": ("copy_", "cat", "index_copy_"),
    "matrix products": ("mm", "addmm", "addmm_", "bmm", "baddbmm", "_scaled_dot_product_flash_attention_for_cpu"),
    "values read": ("_local_scalar_dense",),
}
"""The operators that cost most: bytes, FLOPs, and (values read) a wait for the GPU."""
TOP = 12
"""Number of the most frequent operators that are listed, without being judged."""

Counts = dict[str, dict[str, int]]
"""Layout and phase (``TP 2, rollout``) -> figure (``operators, calls``) -> count."""


class GuardError(RunError):
    """A step does more than before; or the file is missing, broken, or made with other libraries."""


# ------------------------------------------------------------------ counting


def count(folder: str, layout: Mapping[str, int], prepare: Callable[[Any], None] | None = None) -> profile.Step:
    """This rank's counts of one step with the files of ``make_input``. Collective.

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
    """The counts that are judged, and the most frequent operators; summed over the ranks.

    Peak memory is counted on one rank only: with several, gloo's threads free sent buffers at varying times.
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
    """Versions of the libraries whose operators are counted."""
    return {name: version(name) for name in ("torch", "megatron-core")}


def write(path: Path, counts: Counts) -> None:
    """Write the counts that later ones are compared with."""
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
        """Whether it has grown by more than its unit's tolerance."""
        if not self.judged:
            return False
        share, calls = TOLERANCE[self.what.rpartition(", ")[2]]
        return self.now > self.before * (1 + share) + calls


def compare(before: Counts, now: Counts) -> list[Row]:
    """A row for each figure of either; a missing one counts as 0. Of the most frequent operators, those in both."""
    rows = []
    for place in dict.fromkeys([*before, *now]):
        old, new = before.get(place, {}), now.get(place, {})
        rows += [Row(place, what, old.get(what, 0), new.get(what, 0)) for what in dict.fromkeys([*old, *new])]
    return [row for row in rows if row.judged or (row.before and row.now)]


def report(rows: Sequence[Row]) -> str:
    """The table of counts before and now, and their ratio; figures that have grown are marked."""
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
    """The message about rows that have grown."""
    named = "".join(f"  {row.place}: {row.what} {row.before:,} -> {row.now:,}\n" for row in grown)
    return (
        f"a training step does more than before:\n{named}If the change means it, python scripts/benchmark.py guard "
        "--update writes the file anew: commit it with the change, and say why. If not, "
        "docs/results/benchmarks.md says how to find the cause"
    )
