"""Starts all ranks of a run, here or by Slurm: ``python scripts/launch.py cluster=slurm KEY=VALUE ...``.

launch.py KEY=VALUE ...                                     start, or submit
launch.py sweep KEY=A,B KEY=VALUE ... [max_parallel=N]      one run for every combination of values
launch.py evaluate model.path=DIR KEY=VALUE ...             as evaluate.py, with cluster=slurm as a job
launch.py fill KEY=VALUE ...                                submit the array job that fills the reference store
launch.py status DIR                                        all runs below a folder, such as a sweep's or results/
launch.py status|logs [--follow]|cancel|requeue run.name=NAME   of a run that was submitted
launch.py cancel|requeue DIR                                of all runs below a folder, such as a sweep's
"""

from __future__ import annotations

import functools
import re
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from nemo_aapo.cli import evaluate
from nemo_aapo.cli.main import command_of_ranks, exit_code, run_command
from nemo_aapo.config import Config, build
from nemo_aapo.config.command_line import EVALUATION, CommandLine, read_command_line
from nemo_aapo.config.compose import compose
from nemo_aapo.config.schema.training import Run
from nemo_aapo.engines.remote.fleet_status import fleet_lines
from nemo_aapo.errors import FAILED, ConfigError, RunError
from nemo_aapo.launch import local, overview, sweep
from nemo_aapo.launch.slurm import control, logs, submit
from nemo_aapo.launch.slurm.paths import RunPaths, read_jobs
from nemo_aapo.launch.slurm.script import Site
from nemo_aapo.launch.world import World, of_launcher
from nemo_aapo.prepare import Job, prepare, prepare_fill
from nemo_aapo.prepare.evaluation import EvaluationJob, prepare_evaluation
from nemo_aapo.prepare.job import settings_of
from nemo_aapo.run.names import STORE

FOLLOW_S = 1.0
ASK_SLURM_S = 10.0


def main(words: Sequence[str] | None = None) -> int:
    """The command; its exit code."""
    words = list(sys.argv[1:] if words is None else words)
    action, rest = (words[0], words[1:]) if words else ("", [])
    if action in ("status", "logs", "cancel", "requeue"):
        return exit_code(lambda: control_run(action, rest))
    if action == "sweep":
        return exit_code(lambda: sweep_command(rest))
    if action == "evaluate":
        return evaluate_command(rest)
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
    command = _started("train", words)
    if config.dry_run:
        print(f"{config.trainer.devices} ranks of: {shlex.join(command)}")
        return 0
    return local.launch(config, command)


def _started(command: str, words: Sequence[str]) -> list[str]:
    """What is started with the given words; a dry run prints it, and who pastes that wants no other dry run."""
    return command_of_ranks(command, [word for word in words if not re.match(r"\+*dry_run=", word)])


def fill(job: Job) -> int:
    """Submit the filling of the reference store."""
    return submit.submit_fill(job.config, dict(job.tree), Site.here())


# ---------------------------------------------------------------- evaluations


def evaluate_command(words: Sequence[str]) -> int:
    """``launch.py evaluate``: the words of ``evaluate.py``, and ``cluster`` and ``dry_run`` of training."""
    launched = [word for word in words if re.match(r"\+*(cluster[.=]|dry_run=)", word)]
    own = [word for word in words if word not in launched]

    def prepare_it(command: CommandLine) -> EvaluationJob:
        job = prepare_evaluation(command, launched)
        submit.check_here(job.settings)
        return job

    task = functools.partial(_evaluate, words=own)
    return run_command(prepare_it, task, description=__doc__ or "", words=own, kind=EVALUATION)


def _evaluate(job: EvaluationJob, words: Sequence[str]) -> int:
    settings = job.settings
    if settings.cluster.kind != "local":
        return submit.submit_evaluation(settings, dict(job.tree), Site.here())
    if settings.dry_run:
        print(f"{settings.trainer.devices} ranks of: {shlex.join(command_of_ranks('evaluate', words))}")
        return 0
    return evaluate.evaluate(job, words)


# ---------------------------------------------------------------- sweeps


@dataclass(frozen=True)
class Sweep:
    """All runs of a sweep, each as it would be started alone."""

    directory: Path
    runs: list[tuple[CommandLine, Job]]
    max_parallel: int | None


def sweep_command(words: Sequence[str]) -> int:
    """``launch.py sweep``."""
    limits = [word.partition("=")[2] for word in words if word.startswith("max_parallel=")]
    if any(not limit.isdecimal() or int(limit) == 0 for limit in limits):
        raise ConfigError(f"max_parallel={limits[-1]}: a number of runs, at least 1")
    rest = [word for word in words if not word.startswith("max_parallel=")]
    prepare_all = functools.partial(_prepare_sweep, max_parallel=int(limits[-1]) if limits else None)
    return run_command(prepare_all, run_sweep, description=__doc__ or "", words=rest)


def _prepare_sweep(command: CommandLine, max_parallel: int | None) -> Sweep:
    """Every run is refused before any begins."""
    points = sweep.points(command.overrides)
    first, _ = settings_of(replace(command, overrides=points[0].overrides))
    if first.cluster.kind == "interactive":
        raise ConfigError("launch.py sweep starts runs here (cluster=local) or as an array of jobs (cluster=slurm)")
    submit.check_here(first)
    directory = Path(first.run.dir)
    if run := next(filter(overview.is_run, (directory, *directory.parents)), None):
        raise ConfigError(
            f"run.dir={directory}: {run} is a run, below which no other is looked for: give the sweep another name "
            "(run.name=NAME)"
        )
    runs = [_prepare_point(point, command, first.run.name, directory) for point in points]
    return Sweep(directory, runs, max_parallel)


def _prepare_point(point: sweep.Point, given: CommandLine, name: str, directory: Path) -> tuple[CommandLine, Job]:
    try:
        command = point.command(given, name, directory, None)
        config, _ = settings_of(command)
        if config.algorithm.reference_store == f"{config.run.dir}/{STORE}":  # a run's own, and not asked for
            command = point.command(given, name, directory, str(directory / STORE))
        return command, prepare(command, of_launcher)
    except ConfigError as error:
        raise ConfigError(f"{point.name}: {error}") from None


def run_sweep(given: Sweep) -> int:
    """Start or submit what is not finished; show all of them."""
    site = Site.here()
    directory = site.directory / given.directory
    runs = [Path(job.config.run.dir).absolute() for _, job in given.runs]
    missing = [i for i, (_, job) in enumerate(given.runs) if not sweep.is_done(job.config)]
    config = given.runs[0][1].config
    if config.cluster.kind == "slurm":
        missing = [i for i in missing if config.dry_run or not overview.active_in_slurm(runs[i])]
        jobs = [(job.config, dict(job.tree)) for _, job in (given.runs[i] for i in missing)]
        return _submit_sweep(jobs, site, directory, given.max_parallel)
    commands = [(runs[i], _started("launch", given.runs[i][0].words())) for i in missing]
    if config.dry_run:
        print("\n".join(shlex.join(command) for _, command in commands))
        return 0
    code = sweep.run_here(commands, given.max_parallel or 1, lambda text: print(text, flush=True))
    print(f"\n{overview.table(directory, runs)}")
    return code


def _submit_sweep(jobs: list[tuple[Config, dict[str, Any]]], site: Site, directory: Path, limit: int | None) -> int:
    if not jobs:
        print("nothing is missing: every run is finished, or a job of it waits or runs")
    elif jobs[0][0].dry_run:
        print(sweep.render_array([config for config, _ in jobs], site, directory, limit), end="")
        return 0
    else:
        print(f"submitted {sweep.submit_array(jobs, site, directory, limit)} (array of {len(jobs)})")
    print(f"how they fare: {site.launcher('status', directory)}")
    return 0


# ---------------------------------------------------------------- runs that were started


def control_run(action: str, words: Sequence[str]) -> int:
    """One of the actions on a run that was submitted."""
    if {"-h", "--help"} & set(words):
        print(__doc__)
        return 0
    follow = "--follow" in words and action == "logs"
    words = [word for word in words if not (follow and word == "--follow")]
    paths = run_directory(words)
    if action == "logs":
        print(show_logs(paths, follow))
    elif action == "status" and (runs := listed(paths)):
        print("\n".join([overview.table(paths.run_dir, runs), *(fleet_lines(paths.servers) if len(runs) == 1 else ())]))
    elif action == "status":
        print(control.status(paths, fleet_lines))
    elif not overview.is_run(paths.run_dir) and (runs := overview.runs_below(paths.run_dir)):
        return control_runs(action, runs)
    else:
        print({"cancel": control.cancel, "requeue": control.requeue}[action](paths))
    return 0


def control_runs(action: str, runs: Sequence[Path]) -> int:
    """``cancel`` or ``requeue`` of all runs of a sweep, or of another folder."""
    said, failed = (control.cancel_all(runs), 0) if action == "cancel" else control.requeue_all(runs)
    print(said)
    return FAILED if failed else 0


def run_directory(words: Sequence[str]) -> RunPaths:
    """Where the run is that the words name, by settings or by its path; they need not say all that a start needs."""
    if len(words) == 1 and words[0] and Path(words[0]).is_dir():  # its name may have a "=" in it
        return RunPaths(Path(words[0]).absolute())
    if len(words) == 1 and "=" not in words[0] and not words[0].startswith("-"):
        raise ConfigError(f"{words[0]}: no such directory")
    run = build(Run, compose(read_command_line(list(words)))["run"], "run")
    return RunPaths(Path(run.dir).absolute())


def listed(paths: RunPaths) -> list[Path]:
    """The runs that ``status`` shows as a table: a folder's, or one that was never submitted."""
    if overview.is_run(paths.run_dir):
        return [] if read_jobs(paths) else [paths.run_dir]
    return overview.runs_below(paths.run_dir)


def show_logs(paths: RunPaths, follow: bool) -> str:
    """The end of all logs; with ``follow`` also what is added, until no job of the run is left.

    Raises:
        RunError: nothing was started or submitted there.
    """
    if not paths.logs.is_dir() and not overview.is_run(paths.run_dir):
        raise RunError(f"{paths.run_dir}: no run is there; is it the run's directory?")
    tail = logs.Tail(paths.logs, from_end=True)
    text = "\n".join(logs.last_lines(paths.logs)) or f"{paths.logs}: no logs yet"
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
