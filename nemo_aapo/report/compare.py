"""What tells runs apart, and which differ by their seed alone."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nemo_aapo.report.completions import read_verdicts, validated_steps

OF_NO_ACCOUNT = (
    "run.",
    "rollout.keep_",
    "exp_manager.",
    "rollout.remote.directory",
    "rollout.server.directory",
    "algorithm.reference_store",
)
"""Settings that are another's in every run, and say nothing of it."""

Run = Mapping[str, Any]


def differing_settings(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """The settings that are not the same in all runs.

    Example: ``[{"key": "model.optim.lr", "values": ["1.0e-06", "5.0e-06"]}]``, a value (None: unknown) for each run.
    """
    of = [{key: value for key, value, _ in run["settings"]} for run in runs]
    keys = dict.fromkeys(key for settings in of for key in settings if not key.startswith(OF_NO_ACCOUNT))
    rows = [{"key": key, "values": [settings.get(key) for settings in of]} for key in keys]
    return [row for row in rows if len(set(row["values"])) > 1]


def seeds_alike(runs: Sequence[Run]) -> list[list[int]]:
    """The runs by their settings but the seed, as indices: those that are shown as one mean with a band."""
    found: dict[tuple[Any, ...], list[int]] = {}
    rows = [row for row in differing_settings(runs) if row["key"] != "seed"]
    for index in range(len(runs)):
        found.setdefault(tuple(row["values"][index] for row in rows), []).append(index)
    return list(found.values())


def paired_differences(runs: Sequence[Run]) -> list[dict[str, Any] | None]:
    """How each run's held-out accuracy differs from the first one's, prompt by prompt, at their last common validation.

    It is that of the sampled completions, of all prompts; of the greedy ones where one of the two runs samples none.
    Pairing leaves out how hard a prompt is, which both runs share: the standard error is that of the mean over prompts
    of the differences, and smaller than what the two accuracies' own errors suggest.

    Returns:
        ``{"difference", "stderr", "step", "prompts"}`` for each run; None for the first, and where nothing is common.

    Raises:
        RunError: a file is damaged.
    """
    return [None, *(_paired(runs[0], run) for run in runs[1:])]


def _paired(one: Run, other: Run) -> dict[str, Any] | None:
    common = set.intersection(*(set(validated_steps(Path(run["directory"]))) for run in (one, other)))
    if not common:
        return None
    step = max(common)
    verdicts = [read_verdicts(Path(run["directory"]), step, str(run["verdict"])) for run in (one, other)]
    sampled = all(len(right) > 1 for of_run in verdicts for right in of_run.values())
    counted = slice(1, None) if sampled else slice(1)
    first, second = ({source: statistics.fmean(of[source][counted]) for source in of} for of in verdicts)
    differences = [second[source] - first[source] for source in first.keys() & second.keys()]
    if len(differences) < 2:
        return None
    error = statistics.stdev(differences) / len(differences) ** 0.5
    return {
        "difference": statistics.fmean(differences),
        "stderr": error,
        "step": step,
        "prompts": len(differences),
    }
