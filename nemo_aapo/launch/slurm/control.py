"""A submitted run seen and steered from outside: status, cancel, requeue."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from nemo_aapo.errors import ConfigError, RunError
from nemo_aapo.launch.slurm.attempts import History, read_history, summary
from nemo_aapo.launch.slurm.commands import JobState, job_states, slurm
from nemo_aapo.launch.slurm.paths import RunPaths, is_same, original_of, own_jobs, read_jobs
from nemo_aapo.launch.slurm.script import Site
from nemo_aapo.launch.slurm.submit import submit_again
from nemo_aapo.run.metrics_file import number
from nemo_aapo.run.state import RunState, read_state

SHOWN_ATTEMPTS = 5


def status(paths: RunPaths, fleet_lines: Callable[[Path], Sequence[str]]) -> str:
    """How a run fares: jobs, step and reward, last checkpoint, time left, rollout servers, how attempts ended.

    Args:
        fleet_lines: a line for each server of a directory; asked only while a job runs.

    Raises:
        RunError: nothing was submitted from this run directory.
    """
    states = states_of(paths)
    servers = fleet_lines(paths.servers) if any(state.state == "RUNNING" for state in states) else ()
    lines = describe(states, read_state(paths.run_dir), read_history(paths.history), servers)
    return "\n".join([f"run         {paths.run_dir}", *_belonging(paths, states), *lines])


def describe(states: Sequence[JobState], run: RunState, history: History, servers: Sequence[str] = ()) -> list[str]:
    """``status`` as lines, of what was found."""
    lines = []
    for job in [state for state in states if not state.is_over] or states[-1:]:
        left = f", {job.time_left} left" if job.time_left else ""
        source = f"  ({job.source})" if job.source else "  (Slurm has forgotten it)"
        lines.append(f"job         {job.id} {job.state} {job.where}{left}{source}")
    last = run.steps[-1] if run.steps else {}
    scored = last.get("reward/mean") is not None  # null where not one completion could be scored
    reward = f", reward {number(last, 'reward/mean'):.3f}" if scored else ""
    speed = f", {number(last, 'tokens_per_second'):,.0f} tokens/s" if last else ""
    lines.append(f"step        {run.step}{reward}{speed}")
    if run.phase and not run.finished:
        lines.append(f"phase       {run.phase}")
    if run.validation:
        accuracy = number(run.validation, "validation/accuracy_greedy")
        lines.append(f"validation  accuracy {accuracy:.3f} greedy at step {run.validation['step']}")
    age = "" if run.checkpoint_age_s is None else f"step {run.checkpoint}, {_duration(run.checkpoint_age_s)} ago"
    lines.append(f"checkpoint  {age or 'none yet'}")
    lines += servers
    ended = [attempt for attempt in history.attempts if attempt.end != "running"]
    lines += [f"            {summary(attempt)}" for attempt in ended[-SHOWN_ATTEMPTS:]]
    if run.finished:
        lines.append("finished    yes")
    elif history.stopped:
        lines.append(f"stopped     {history.stopped}")
    return lines


def _belonging(paths: RunPaths, states: Sequence[JobState]) -> list[str]:
    """What is to be said where jobs and directory are not each other's."""
    lines = [f"copy        of {there}, which job {', '.join(ids)} belong{'s' * (len(ids) == 1)} to"
             for there, ids in _originals(paths).items()]  # fmt: skip
    return lines + [f"moved       {_advice(job, there)}" for job, there in _strays(paths, states).items()]


def cancel(paths: RunPaths) -> str:
    """Cancel all jobs of the run; those that wait first, or one of them would begin.

    Raises:
        RunError: nothing was submitted from this run directory, or only from the one that it is a copy of.
    """
    states = states_of(paths)
    active = [state for state in states if not state.is_over]
    if not states:
        there, ids = next(iter(_originals(paths).items()))
        raise RunError(
            f"{paths.run_dir}: nothing was submitted from here. It is a copy of {there}, which job {', '.join(ids)} "
            f"belongs to: {Site.here().launcher('cancel', there)}"
        )
    return _cancelled(active) if active else "no job of this run waits or runs"


def cancel_all(runs: Sequence[Path]) -> str:
    """Cancel all jobs of many runs, those that wait first, or they would begin in the place of others.

    Raises:
        RunError: nothing was submitted from any of them.
    """
    jobs = [job["id"] for run in runs for job in own_jobs(RunPaths(run))]
    if not jobs:
        raise RunError(f"{len(runs)} runs, and none of them was submitted to Slurm: end what started them here instead")
    active = [state for state in job_states(jobs) if not state.is_over]
    return _cancelled(active) if active else f"no job of {len(runs)} runs waits or runs"


def _cancelled(active: Sequence[JobState]) -> str:
    ids = [state.id for state in sorted(active, key=lambda state: state.state == "RUNNING")]
    slurm("scancel", *ids)
    return f"cancelled {', '.join(ids)}"


def requeue(paths: RunPaths) -> str:
    """Have a run go on: a running job saves and starts anew; one that has ended is submitted again.

    A copy goes on by itself, with jobs of its own; a directory that was moved, from where it is now.

    Raises:
        RunError: nothing was submitted from this run directory, or the run is finished, or jobs of it still go by the
            place where it was.
    """
    states = states_of(paths)
    if read_state(paths.run_dir).finished:
        raise RunError(f"{paths.run_dir}: the run is finished")
    for job, there in _strays(paths, states).items():
        raise RunError(f"{paths.run_dir}: {_advice(job, there)}")
    running = [state.id for state in states if state.state == "RUNNING"]
    if running:
        slurm("scancel", "--batch", "--signal=USR1", running[0])
        return f"asked job {running[0]} to finish its step, save and start anew"
    waiting = [state.id for state in states if not state.is_over]
    if waiting:
        return f"job {waiting[0]} waits already"
    return f"submitted {submit_again(paths)}: {paths.script}"


def requeue_all(runs: Sequence[Path]) -> tuple[str, int]:
    """``requeue`` of many runs, but for those that are finished: a line each, and how many could not be."""
    lines, failed = [], 0
    for run in runs:
        try:
            done = read_state(run).finished
            lines.append(f"{run.name}: {'finished' if done else requeue(RunPaths(run))}")
        except (RunError, ConfigError) as error:
            failed += 1
            lines.append(f"{run.name}: {error}")
    return "\n".join(lines), failed


def states_of(paths: RunPaths) -> list[JobState]:
    """Slurm's view of all jobs of the run, oldest first; of a copy that has none of its own, nothing.

    Raises:
        RunError: nothing was ever submitted.
    """
    if not read_jobs(paths):
        raise RunError(f"{paths.run_dir}: nothing was submitted to Slurm from here; is it the run's directory?")
    return job_states([job["id"] for job in own_jobs(paths)])


def _originals(paths: RunPaths) -> dict[Path, list[str]]:
    """Directories that this one is a copy of -> the jobs in its list that are theirs."""
    found: dict[Path, list[str]] = {}
    for job in read_jobs(paths):
        if there := original_of(job, paths):
            found.setdefault(there, []).append(job["id"])
    return found


def _strays(paths: RunPaths, states: Sequence[JobState]) -> dict[str, Path]:
    """Jobs of this run that wait or run, and the place that it was moved from, which they still go by."""
    active = {state.id for state in states if not state.is_over}
    places = {job["id"]: Path(job.get("run_dir", paths.run_dir)) for job in own_jobs(paths) if job["id"] in active}
    return {job: there for job, there in places.items() if not is_same(there, paths.run_dir)}


def _advice(job: str, there: Path) -> str:
    return f"job {job} goes by {there}, from where this directory was moved: scripts/launch.py cancel, then requeue"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min {rest} s"
