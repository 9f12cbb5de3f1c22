"""A sweep: one run for every combination of values, each in a directory of its own below the sweep's.

    <sweep>/  reference_rewards.sqlite  learning_rate-1e-6_seed-1/  learning_rate-1e-6_seed-2/  ...  slurm/

All of its runs read and fill one reference store. What is finished is left alone, so that the same command goes on.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
import re
import shlex
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from nemo_aapo.config import Config
from nemo_aapo.config.command_line import CommandLine
from nemo_aapo.errors import ConfigError, one_line
from nemo_aapo.launch.slurm import submit
from nemo_aapo.launch.slurm.attempts import read_history, write_history
from nemo_aapo.launch.slurm.paths import RunPaths, add_jobs
from nemo_aapo.launch.slurm.script import Site, batch_header, directives, render_training
from nemo_aapo.utils.files import FINISHED, write_atomic

POLL_S = 0.2
NAMED = 40
"""A value's part of a name is no longer than this."""
MOST_RUNS = 1000
"""Of one sweep; Slurm's arrays have no more unless its administrator says otherwise."""
RUNS = "runs.txt"
"""The directories of an array's tasks, one a line."""


@dataclass(frozen=True)
class Point:
    """One run of a sweep.

    Example: ``Point("seed-1", ["experiment=quickstart", "seed=1"])``
    """

    name: str
    """By the values that make it another one; the name of its directory."""
    overrides: list[str]
    """``KEY=VALUE`` words with one value for each key."""

    def command(self, given: CommandLine, name: str, directory: Path, store: str | None) -> CommandLine:
        """What would start this run alone.

        Args:
            name, directory: the sweep's.
            store: the reference store of the whole sweep; None: its runs have none, or one that the words name.
        """
        own = [f"run.name={quoted(f'{name}-{self.name}')}", f"run.dir={quoted(str(directory / self.name))}"]
        own += [f"algorithm.reference_store={quoted(store)}"] if store else []
        return replace(given, overrides=[*self.overrides, *own])


def points(overrides: Sequence[str]) -> list[Point]:
    """Every combination of values, in the order of the words; the last key changes fastest.

    Args:
        overrides: words in Hydra's grammar: ``seed=1,2``, ``seed=range(1,4)``, ``seed=choice(1,2)``.

    Raises:
        ConfigError: no key has several values, a word can't be read, or a key has several values that can't be swept.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    keys: list[str] = []
    fixed: list[str] = []
    swept: dict[str, list[str]] = {}
    for word in overrides:
        try:
            parsed = OverridesParser.create().parse_override(word)
            keys.append(parsed.key_or_group)
            if not parsed.is_sweep_override():
                fixed.append(word)
                continue
            values = list(dict.fromkeys(parsed.sweep_string_iterator()))
        except (HydraException, ValueError, NotImplementedError) as error:
            raise ConfigError(f"{word}: {one_line(error)}. A sweep takes A,B, range(A,B) and choice(A,B)") from None
        _check_swept(keys[-1])
        swept[parsed.get_key_element()] = values
    if not swept:
        raise ConfigError("launch.py sweep: no key has several values; write KEY=A,B (seed=1,2), or leave `sweep` out")
    for key in (key.lstrip("+~") for key in swept):
        if keys.count(key) > 1:
            raise ConfigError(f"launch.py sweep: {key} is given twice")
    count = math.prod(map(len, swept.values()))
    if not 0 < count <= MOST_RUNS:
        raise ConfigError(f"launch.py sweep: these values make {count} runs; a sweep has 1 to {MOST_RUNS}")
    chosen = [dict(zip(swept, values, strict=True)) for values in itertools.product(*swept.values())]
    names = _names(chosen)
    return [Point(name, [*fixed, *(f"{key}={value}" for key, value in values.items())])
            for name, values in zip(names, chosen, strict=True)]  # fmt: skip


def quoted(text: str) -> str:
    """A value of Hydra's grammar that stands for just this text."""
    # a backslash means something before a quote only
    escaped = re.sub(r"(\\*)('|\Z)", lambda found: 2 * found[1] + ("\\'" if found[2] else ""), text)
    return f"'{escaped}'"


def _check_swept(key: str) -> None:
    if key.startswith(("run.", "cluster", "exp_manager.explicit_log_dir", "dry_run", "hydra")) or key == "run":
        raise ConfigError(f"launch.py sweep: {key} can't have several values: runs are named by the others' values")


def _names(chosen: Sequence[dict[str, str]]) -> list[str]:
    """``lr-1e-6_seed-2``: by the last part of each key where that is enough, unique in any case and on any disk."""
    keys = [key.lstrip("+") for key in chosen[0]]
    leaves = [key.rsplit(".", 1)[-1] for key in keys]
    shown = leaves if len(set(leaves)) == len(leaves) else keys
    names = ["_".join(f"{key}-{_slug(value)}" for key, value in zip(shown, values.values(), strict=True))[:200]
             for values in chosen]  # fmt: skip
    lower = [name.lower() for name in names]
    return [f"{name}_{_digest(values)}" if lower.count(name.lower()) > 1 else name
            for name, values in zip(names, chosen, strict=True)]  # fmt: skip


def _slug(value: str) -> str:
    return re.sub(r"[^A-Za-z0-9.+-]+", "_", value).strip("_.")[:NAMED] or "empty"


def _digest(values: Mapping[str, str]) -> str:
    """What a name ends in that two combinations would share; the same whatever else the sweep holds."""
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()[:6]


def is_done(config: Config) -> bool:
    """Whether the run has made all steps that it is now asked for."""
    try:
        step = json.loads((Path(config.run.dir) / FINISHED).read_text(encoding="utf-8"))["step"]
        return bool(step >= config.trainer.max_steps)
    except (OSError, ValueError, TypeError, KeyError):
        return False


# ---------------------------------------------------------------- here


def run_here(commands: Sequence[tuple[Path, Sequence[str]]], max_parallel: int, say: Callable[[str], None]) -> int:
    """Run commands, so many at a time; each writes to ``logs/sweep.log`` of its run directory.

    A signal is handed on to those that run, which save and end; no other is started then.

    Args:
        commands: run directory -> what starts it.

    Returns:
        0, or the exit code of the first that failed; the others go on.
    """
    received: list[int] = []
    handled = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    previous = {number: signal.signal(number, lambda signum, frame: received.append(signum)) for number in handled}
    waiting, running, failed = list(commands), dict[Path, subprocess.Popen[bytes]](), 0
    stopping = False
    try:
        while (waiting and not stopping) or running:
            while waiting and not stopping and len(running) < max_parallel:
                directory, command = waiting.pop(0)
                running[directory] = _start(directory, command)
                say(f"{directory.name}: started, {len(waiting)} to come")
            for directory in [directory for directory, process in running.items() if process.poll() is not None]:
                code = running.pop(directory).returncode
                failed = failed or code
                say(
                    f"{directory.name}: {'ended' if code == 0 else f'exit code {code}; see {directory}/logs/sweep.log'}"
                )
            while received:
                number, stopping = received.pop(0), True
                for process in running.values():
                    process.send_signal(number)
            time.sleep(POLL_S)
    finally:
        for process in running.values():
            process.kill()
        for number, handler in previous.items():
            signal.signal(number, handler)
    return 128 - failed if failed < 0 else failed


def _start(directory: Path, command: Sequence[str]) -> subprocess.Popen[bytes]:
    log = directory / "logs" / "sweep.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as file:
        return subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=file, stderr=file, start_new_session=True, env=dict(os.environ)
        )


# ---------------------------------------------------------------- Slurm


def submit_array(jobs: Sequence[tuple[Config, dict[str, Any]]], site: Site, directory: Path, limit: int | None) -> str:
    """Submit an array with a task for each run, which is a run's own job in every other respect; the array's id.

    Args:
        jobs: configuration and resolved tree of each.
        directory: the sweep's, absolute.
        limit: so many tasks run at a time; None: as many as Slurm lets.

    Raises:
        ConfigError: as ``render_array`` and ``submit_training``.
    """
    script = render_array([config for config, _ in jobs], site, directory, limit)
    runs = []
    for config, tree in jobs:
        runs.append(submit.freeze(config, tree, site))
        write_atomic(runs[-1].script, render_training(config, site))
        write_history(runs[-1].history, read_history(runs[-1].history).submitted_again())
    place = RunPaths(directory)
    place.logs.mkdir(parents=True, exist_ok=True)
    write_atomic(place.folder / RUNS, "".join(f"{run.run_dir}\n" for run in runs))
    write_atomic(place.folder / "sweep.sbatch", script)
    array = submit.sbatch(place.folder / "sweep.sbatch")
    for task, run in enumerate(runs):
        add_jobs(run, [{"id": f"{array}_{task}", "what": "train"}], site.directory)
    return array


def render_array(configs: Sequence[Config], site: Site, directory: Path, limit: int | None) -> str:
    """The array's script: each task becomes the script of its run, which requeues itself.

    Raises:
        ConfigError: runs that are no array: other resources for each, parts of a heterogeneous job, a chain.
    """
    cluster = configs[0].cluster
    if cluster.servers.nodes or cluster.chain > 1 or cluster.launcher != "sbatch":
        raise ConfigError(
            "launch.py sweep: an array has no heterogeneous jobs and no chains: cluster.servers.nodes=0 "
            "cluster.chain=1 cluster.launcher=sbatch (each task requeues itself at its time limit)"
        )
    own = ("job-name", "output", "dependency")
    headers = [{k: v for k, v in batch_header(config, site).items() if k not in own} for config in configs]
    if any(header != headers[0] for header in headers):
        raise ConfigError("launch.py sweep: the tasks of an array have the same nodes, ranks and flags; sweep others")
    place = RunPaths(directory)
    header = {
        "job-name": f"sweep-{re.sub(r'[^A-Za-z0-9._-]+', '_', directory.name)}",
        **headers[0],
        # under one name, singleton would let one task run at a time
        "dependency": None if cluster.dependency == "singleton" else cluster.dependency,
        "array": f"0-{len(configs) - 1}" + (f"%{limit}" if limit else ""),
        "output": str(place.logs).replace("%", "%%") + "/slurm_%A_%a.log",
    }
    body = [
        "set -euo pipefail",
        "trap '' USR1  # a warning of the time limit must not end what has no handler yet",
        f"mapfile -t runs <{shlex.quote(str(place.folder / RUNS))}",
        "run=${runs[$SLURM_ARRAY_TASK_ID]}",
        'exec bash "$run/slurm/job.sbatch" >>"$run/logs/slurm_$SLURM_JOB_ID.log" 2>&1',
    ]
    return "\n".join(["#!/bin/bash", *directives(header), "", *body]) + "\n"
