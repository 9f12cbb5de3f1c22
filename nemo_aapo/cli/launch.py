"""Starts all ranks of a run, here or by Slurm: ``python scripts/launch.py cluster=slurm KEY=VALUE ...``.

launch.py KEY=VALUE ...                                     start, or submit
launch.py fill KEY=VALUE ...                                submit the array job that fills the reference store
launch.py status|logs [--follow]|cancel|requeue run.name=NAME   of a run that was submitted
"""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from nemo_aapo.cli.main import command_of_ranks, exit_code, run_command
from nemo_aapo.config import Config
from nemo_aapo.config.command_line import CommandLine, read_command_line
from nemo_aapo.config.compose import compose
from nemo_aapo.engines.remote.fleet_status import fleet_lines
from nemo_aapo.errors import ConfigError
from nemo_aapo.launch import local
from nemo_aapo.launch.slurm import control, logs, submit
from nemo_aapo.launch.slurm.paths import RunPaths
from nemo_aapo.launch.slurm.script import Site
from nemo_aapo.launch.world import World, of_launcher
from nemo_aapo.prepare import Job, prepare, prepare_fill

FOLLOW_S = 1.0
ASK_SLURM_S = 10.0


def main(words: Sequence[str] | None = None) -> int:
    """The command; its exit code."""
    words = list(sys.argv[1:] if words is None else words)
    action, rest = (words[0], words[1:]) if words else ("", [])
    if action in ("status", "logs", "cancel", "requeue"):
        return exit_code(lambda: control_run(action, rest))
    if action == "fill":
        return run_command(_prepare_fill, fill, description="Fill the reference store.", words=rest)
    return run_command(_prepare, functools.partial(launch, words=words), description=__doc__ or "", words=words)


def _prepare(command: CommandLine) -> Job:
    job = prepare(command, of_launcher)
    submit.check_here(job.config)
    return job


def _prepare_fill(command: CommandLine) -> Job:
    job = prepare_fill(command, _world_of_array)
    submit.check_here(job.config)
    return job


def _world_of_array(config: Config) -> World:
    if config.cluster.kind != "slurm":
        raise ConfigError("launch.py fill submits an array job: it needs cluster=slurm")
    return of_launcher(config)


def launch(job: Job, words: Sequence[str]) -> int:
    """Start or submit the run; the ranks are given the same words."""
    config = job.config
    if config.cluster.kind == "slurm":
        return submit.submit_training(config, dict(job.tree), Site.here())
    if config.cluster.kind == "interactive":
        return submit.run_interactively(config, dict(job.tree), Site.here())
    command = command_of_ranks("train", words)
    if config.dry_run:
        print(f"{config.trainer.devices} ranks of: {' '.join(command)}")
        return 0
    return local.launch(config, command)


def fill(job: Job) -> int:
    """Submit the filling of the reference store."""
    return submit.submit_fill(job.config, dict(job.tree), Site.here())


# ---------------------------------------------------------------- runs that were submitted


def control_run(action: str, words: Sequence[str]) -> int:
    """One of the actions on a run that was submitted."""
    follow = "--follow" in words and action == "logs"
    words = [word for word in words if not (follow and word == "--follow")]
    paths = run_directory(words)
    if action == "logs":
        print(show_logs(paths, follow))
    elif action == "status":
        print(control.status(paths, fleet_lines))
    else:
        print({"cancel": control.cancel, "requeue": control.requeue}[action](paths))
    return 0


def run_directory(words: Sequence[str]) -> RunPaths:
    """Where the run is that the words name; they need not say all that a start needs."""
    return RunPaths(Path(compose(read_command_line(list(words)))["run"]["dir"]).absolute())


def show_logs(paths: RunPaths, follow: bool) -> str:
    """The end of all logs; with ``follow`` also what is added, until no job of the run is left."""
    tail = logs.Tail(paths.logs, from_end=True)
    text = "\n".join(logs.last_lines(paths.logs))
    if not follow:
        return text
    print(text)
    asked = 0.0
    while True:
        for line in tail.lines():
            print(line, flush=True)
        if time.monotonic() - asked > ASK_SLURM_S:
            asked = time.monotonic()
            if all(state.is_over for state in control.states_of(paths)):
                return "\n".join([*tail.lines(), "no job of this run is left; `status` says how it ended"])
        time.sleep(FOLLOW_S)
