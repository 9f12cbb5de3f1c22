"""Where a launched run keeps what the launcher, the job and its ranks tell each other.

    <run.dir>/slurm/          0700
        frozen.yaml           the resolved configuration of the last submission, without secrets
        job.sbatch            the script as it was submitted; `sbatch` takes it again
        env.sh                0600: cluster.env, for the script to read
        jobs.json             what was submitted, and for which directory: this one may be a copy, or was moved
        history.json          every attempt of the jobs, and why it ended
    <run.dir>/servers/        0700: addresses of rollout servers and their token
    <run.dir>/logs/           rank_N.log, server_N.log, slurm_JOB.log

All of it is written by the run's owner; the ranks only read.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_aapo.config.command_line import FROZEN
from nemo_aapo.errors import RunError
from nemo_aapo.utils.files import fitting, read_json, to_json, write_atomic
from nemo_aapo.utils.token import make_token

_JOB = re.compile(r"\d+(_\d+)?")  # a job's number, and in an array the task's


@dataclass(frozen=True)
class RunPaths:
    """The paths in one run directory."""

    run_dir: Path
    """Absolute."""

    @property
    def folder(self) -> Path:
        """What belongs to the launcher."""
        return self.run_dir / "slurm"

    @property
    def script(self) -> Path:
        return self.folder / "job.sbatch"

    @property
    def frozen(self) -> Path:
        return self.folder / f"{FROZEN}.yaml"

    @property
    def environment(self) -> Path:
        return self.folder / "env.sh"

    @property
    def jobs(self) -> Path:
        return self.folder / "jobs.json"

    @property
    def history(self) -> Path:
        return self.folder / "history.json"

    @property
    def logs(self) -> Path:
        return self.run_dir / "logs"

    @property
    def servers(self) -> Path:
        return self.run_dir / "servers"

    def make(self) -> None:
        """The directories, with the rights that they need."""
        self.logs.mkdir(parents=True, exist_ok=True)
        for folder in (self.folder, self.servers):
            folder.mkdir(exist_ok=True)
            folder.chmod(0o700)

    def make_token(self) -> None:
        """The servers' bearer token, unless there is one: jobs that already run use it."""
        make_token(self.servers)


def read_jobs(paths: RunPaths) -> list[dict[str, Any]]:
    """What was submitted for the run, oldest first.

    Example: ``{"id": "41", "what": "train" | "fill" | "merge", "run_dir": "/runs/sums", "cwd": "/shared/nemo_aapo"}``,
    where ``run_dir`` is the directory that the job was submitted for, and ``cwd`` what relative paths refer to.

    Raises:
        RunError: the file is damaged.
    """
    remedy = "Remove it, after a look at `squeue --me`: it names the jobs of this run"
    return read_json(paths.jobs, _as_jobs, RunError, remedy) or []


def _as_jobs(tree: Any) -> list[dict[str, Any]]:
    jobs: list[dict[str, Any]] = fitting(tree, list)
    for job in jobs:
        if not _JOB.fullmatch(fitting(job["id"], str)):
            raise ValueError(f"{job['id']!r} is no number of a job")
    return jobs


def add_jobs(paths: RunPaths, jobs: Sequence[dict[str, Any]], cwd: Path) -> None:
    """Remember submitted jobs."""
    place = {"run_dir": str(paths.run_dir), "cwd": str(cwd)}
    write_atomic(paths.jobs, to_json([*read_jobs(paths), *({**job, **place} for job in jobs)]) + "\n")


def original_of(job: Mapping[str, Any], paths: RunPaths) -> Path | None:
    """The run directory that a job belongs to, if this one is a copy of it; None: it belongs to this one.

    A directory that was moved keeps its jobs: where they were submitted for, nobody knows them any more.
    """
    there = RunPaths(Path(job.get("run_dir", paths.run_dir)))
    if not there.jobs.exists() or is_same(there.run_dir, paths.run_dir):
        return None
    return there.run_dir if any(other["id"] == job["id"] for other in read_jobs(there)) else None


def own_jobs(paths: RunPaths) -> list[dict[str, Any]]:
    """``read_jobs`` without those of the run that this directory was copied from."""
    return [job for job in read_jobs(paths) if original_of(job, paths) is None]


def is_same(one: Path, other: Path) -> bool:
    """Whether two paths name the same directory, by whatever way they reach it."""
    return one == other or (one.exists() and other.exists() and one.samefile(other))
