"""Many runs as one table: how far each is, how it fares, when it last gave a sign of life."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from nemo_aapo.errors import RunError, SlurmError
from nemo_aapo.launch.slurm.attempts import read_history
from nemo_aapo.launch.slurm.commands import job_states
from nemo_aapo.launch.slurm.paths import RunPaths, own_jobs
from nemo_aapo.run.directory import RECORD
from nemo_aapo.run.state import read_state
from nemo_aapo.utils.files import FINISHED, LOCK
from nemo_aapo.utils.tables import plain

DEPTH = 3
"""Runs are looked for so many folders below the one that is named: ``results/SWEEP/RUN`` is two."""
ALIVE = ("metrics.jsonl", "phase.json", RECORD, "logs/*.log", "rollouts", "checkpoints", FINISHED)
"""What a run at work writes."""
HEADER = ("run", "step", "reward", "accuracy", "state", "last sign of life")


@dataclass(frozen=True)
class Overview:
    """One run in a line."""

    step: int
    reward: float | None
    """Mean of the last step; None before the first, or where it was not finite."""
    accuracy: float | None
    """Of the last validation, greedy."""
    state: str
    """finished, running, pending (or another state of its Slurm job), how it ended, or ``damaged: ...``."""
    age_s: float | None
    """Seconds since the last sign of life; None: there was none."""


def runs_below(folder: Path) -> list[Path]:
    """The run directories in a folder, or the folder itself if it is one; sorted."""
    return sorted(_search(folder, DEPTH))


def is_run(folder: Path) -> bool:
    """Whether a run was started there, or submitted."""
    return (folder / RECORD).exists() or RunPaths(folder).frozen.exists()


def table(folder: Path, runs: Sequence[Path]) -> str:
    """The runs as a table for a screen, by their paths below the folder."""
    return plain(HEADER, [_row(_name(run, folder), overview) for run, overview in overviews(runs).items()])


def overviews(runs: Sequence[Path]) -> dict[Path, Overview]:
    """What is known of each; Slurm is asked once, and only for runs that were submitted to it."""
    jobs = {run: [job["id"] for job in own_jobs(RunPaths(run))] for run in runs}
    try:
        found = job_states([job for ids in jobs.values() for job in ids])
    except SlurmError:  # no Slurm here: the files have to do
        found = []
    states = {job.id: job.state.lower() for job in found if not job.is_over}
    return {run: _overview(run, [states[job] for job in jobs[run] if job in states]) for run in runs}


def active_in_slurm(run: Path) -> bool:
    """Whether a job of the run waits or runs."""
    return any(not state.is_over for state in job_states([job["id"] for job in own_jobs(RunPaths(run))]))


def is_locked(run: Path) -> bool:
    """Whether a process of this machine holds the run directory. Looks only: taking the lock would hold up a start."""
    try:
        inode = (run / LOCK).stat().st_ino
        locks = Path("/proc/locks").read_text()
    except OSError:
        return False
    return any(f":{inode} " in line and "FLOCK" in line for line in locks.splitlines())


def _search(folder: Path, depth: int) -> Iterator[Path]:
    if is_run(folder):
        yield folder
    elif depth and folder.is_dir():
        for path in folder.iterdir():
            if path.is_dir() and not path.is_symlink() and not path.name.startswith("."):
                yield from _search(path, depth - 1)


def _overview(run: Path, active: Sequence[str]) -> Overview:
    try:
        found = read_state(run)
        history = read_history(RunPaths(run).history)
    except (RunError, ValueError, TypeError, KeyError, AttributeError) as error:
        return Overview(0, None, None, f"damaged: {error}", _age(run))
    last: Mapping[str, float | None] = found.steps[-1] if found.steps else {}
    ended = [attempt.end for attempt in history.attempts[-1:] if attempt.end != "running"]
    if found.finished:
        state = "finished"
    elif active or is_locked(run):
        state = "running" if not active or "running" in active else active[0]
    else:
        state = "stopped" if history.stopped else ended[0] if ended else "interrupted" if found.step else "not begun"
    accuracy = (found.validation or {}).get("validation/accuracy_greedy")
    return Overview(found.step, last.get("reward/mean"), accuracy, state, _age(run))


def _age(run: Path) -> float | None:
    times = [path.stat().st_mtime for pattern in ALIVE for path in run.glob(pattern)]
    return max(0.0, time.time() - max(times)) if times else None


def _row(name: str, of: Overview) -> list[str]:
    numbers = ["-" if number is None else f"{number:.3f}" for number in (of.reward, of.accuracy)]
    return [name, str(of.step), *numbers, of.state, "-" if of.age_s is None else f"{_duration(of.age_s)} ago"]


def _name(run: Path, folder: Path) -> str:
    return str(run.relative_to(folder)) if run != folder else run.name


def _duration(seconds: float) -> str:
    """The largest unit: ``40 s``, ``7 min``, ``3 h``, ``2 d``."""
    for unit, size in (("d", 86_400), ("h", 3_600), ("min", 60)):
        if seconds >= size:
            return f"{int(seconds // size)} {unit}"
    return f"{int(seconds)} s"
