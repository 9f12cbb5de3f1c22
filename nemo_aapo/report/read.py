"""A run directory as plain data: all that the page says of a run but its completions."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from nemo_aapo.config import without_secrets
from nemo_aapo.config.command_line import TRAINING, config_directory
from nemo_aapo.config.schema.config_file import entries_of
from nemo_aapo.errors import ConfigError, RunError
from nemo_aapo.launch.overview import is_run, overviews
from nemo_aapo.launch.slurm.attempts import read_history
from nemo_aapo.launch.slurm.paths import RunPaths
from nemo_aapo.report.series import Column, columns, with_clocks
from nemo_aapo.run.directory import read_record
from nemo_aapo.run.metrics_file import is_validation, number, read_metrics
from nemo_aapo.run.names import CHECKPOINTS, step_of
from nemo_aapo.utils.files import bytes_of

TIME_METRICS = ("time/rollout", "time/reward", "time/reference", "time/train", "time/refit")
MOST_STARTS = 100
LONGEST_FACT = 100
"""Characters of what ``run.json`` says of a start."""
DECIDED_HERE = ("null", "auto", "???")
"""Defaults that leave a value to the machine, or to the user."""


def read_run(directory: Path, state: str | None = None) -> dict[str, Any]:
    """What a run is and how it went, as plain data for the page.

    Args:
        state: what it is doing; None asks its files, its lock and Slurm.

    Raises:
        ConfigError: no run is there; ``run.json`` is damaged.
        RunError: another file of it is damaged.
    """
    if not directory.is_dir() or not is_run(directory):
        raise ConfigError(f"{directory}: no run is there. Name the directory of a run, as results/quickstart")
    path = directory / "metrics.jsonl"
    records = read_metrics(path) if path.exists() else []
    steps = with_clocks([_with_shares(record) for record in records if "loss" in record])
    validations = [record for record in records if is_validation(record)]
    tree, record = _config(directory), read_record(directory)
    settings = _settings(tree)
    if state is None:
        (overview,) = overviews([directory]).values()
        state = overview.state
    return {
        "name": directory.name,
        "directory": str(directory),
        "state": state,
        "max_steps": _at(tree, "trainer.max_steps"),
        "verdict": _at(tree, "validation.reward"),
        "settings": settings,
        "changed": [row for row in settings if row[1] != row[2]],
        "starts": [_start(start) for start in record["starts"][-MOST_STARTS:]] if record else [],
        "attempts": _attempts(directory),
        "checkpoints": _checkpoints(directory, steps, validations),
        "steps": columns(steps),
        "validations": columns(_at_clocks(validations, steps)),
    }


def _with_shares(record: Mapping[str, Any]) -> dict[str, Any]:
    """A step with what follows from its metrics: the time of no phase, and the groups of each kind."""
    more: dict[str, float] = {}
    if "time/step" in record:
        known = sum(number(record, name) for name in TIME_METRICS)
        more["time/other"] = max(0.0, number(record, "time/step") - known)
    if record.get("groups/zero_std") is not None:
        more["groups/by_margin"] = number(record, "groups/zero_std") - number(record, "groups/zero_advantage")
    if record.get("groups/all_right") is not None:
        judged = 1.0 - number(record, "groups/failed")
        shares = {name: judged * number(record, name) for name in ("groups/all_right", "groups/all_wrong")}
        more |= {**shares, "groups/mixed": max(0.0, judged - sum(shares.values()))}
    return {**record, **more}


def _at_clocks(validations: Sequence[Mapping[str, Any]], steps: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Validations with the clocks of the steps that they come after."""
    clocks = {step["step"]: {key: step[key] for key in ("tokens", "hours")} for step in steps}
    return [{**record, **clocks.get(record["step"], {"tokens": 0, "hours": 0.0})} for record in validations]


# ---------------------------------------------------------------- settings


def _config(directory: Path) -> dict[str, Any]:
    try:
        tree = yaml.safe_load((directory / "config.yaml").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise RunError(
            f"{directory}/config.yaml: can't be read ({type(error).__name__}). Restore or remove it"
        ) from None
    return without_secrets(tree) if isinstance(tree, dict) else {}


def _settings(tree: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """(key, value, default) of every setting, as YAML writes them; a default that is worked out equals the value."""
    defaults = _defaults()
    found = []
    for key, value in _flat(tree):
        shown, default = _shown(value), defaults.get(key, "")
        worked_out = "${" in default or (default in DECIDED_HERE and default != "???") or key not in defaults
        found.append((key, shown, shown if worked_out else default))
    return found


@functools.cache
def _defaults() -> dict[str, str]:
    """Dotted key -> the default, as YAML writes it."""
    text = (config_directory() / f"{TRAINING.name}.yaml").read_text(encoding="utf-8")
    return {
        key: entry.value if "${" in entry.value or entry.value == "???" else _shown(yaml.safe_load(entry.value))
        for key, entry in entries_of(text).items()
        if entry.value
    }


def _shown(value: object) -> str:
    return (
        yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=10**6).removesuffix("\n...\n").strip()
    )


def _flat(tree: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for key, value in tree.items():
        found += _flat(value, f"{prefix}{key}.") if isinstance(value, dict) and value else [(f"{prefix}{key}", value)]
    return found


def _at(tree: Mapping[str, Any], key: str) -> Any:
    return dict(_flat(tree)).get(key)


# ---------------------------------------------------------------- starts and checkpoints


def _start(start: Mapping[str, Any]) -> dict[str, Any]:
    plain = {
        key: str(start[key])[:LONGEST_FACT] for key in ("time", "host", "world_size", "instruction_set") if key in start
    }
    versions = start.get("versions")
    versions = versions if isinstance(versions, dict) else {}
    return {**plain, "versions": {str(name)[:LONGEST_FACT]: str(v)[:LONGEST_FACT] for name, v in versions.items() if v}}


def _attempts(directory: Path) -> list[dict[str, Any]]:
    history = read_history(RunPaths(directory).history)
    return [
        {"job": a.job, "began": a.began, "ended": a.ended, "end": a.end, "step": a.step, "why": a.why}
        for a in history.attempts
    ]


def _checkpoints(
    directory: Path, steps: Sequence[Mapping[str, Any]], validations: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    rewards = {step["step"]: step.get("reward/mean") for step in steps}
    accuracy = {v["step"]: v.get("validation/accuracy_sampled", v["validation/accuracy_greedy"]) for v in validations}
    found = [
        (step, path) for path in (directory / CHECKPOINTS).glob("step_*") if (step := step_of(path.name)) is not None
    ]
    return [
        {
            "step": step,
            "written": path.stat().st_mtime,
            "bytes": bytes_of(path),
            "reward": rewards.get(step),
            "accuracy": accuracy.get(step),
        }
        for step, path in sorted(found)
    ]


def column(run: Mapping[str, Any], metric: str) -> Column:
    """A metric of a run that ``read_run`` read, of its steps or its validations; empty where it has none."""
    return run["validations" if metric.startswith("validation/") else "steps"].get(metric, [])
