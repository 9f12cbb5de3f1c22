"""A submitted run seen and steered from outside: status, cancel, requeue."""

from __future__ import annotations

from collections.abc import Sequence

from nemo_aapo.errors import RunError
from nemo_aapo.launch.slurm.attempts import History, read_history, summary, write_history
from nemo_aapo.launch.slurm.commands import JobState, job_states, slurm
from nemo_aapo.launch.slurm.paths import RunPaths, add_jobs, read_jobs
from nemo_aapo.launch.slurm.submit import sbatch
from nemo_aapo.run.metrics_file import number
from nemo_aapo.run.state import RunState, read_state

SHOWN_ATTEMPTS = 5


def status(paths: RunPaths) -> str:
    """How a run fares: its jobs, its step and reward, its last checkpoint, the time left, how attempts ended.

    Raises:
        RunError: nothing was submitted from this run directory.
    """
    lines = describe(states_of(paths), read_state(paths.run_dir), read_history(paths.history))
    return "\n".join([f"run         {paths.run_dir}", *lines])


def describe(states: Sequence[JobState], run: RunState, history: History) -> list[str]:
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
    ended = [attempt for attempt in history.attempts if attempt.end != "running"]
    lines += [f"            {summary(attempt)}" for attempt in ended[-SHOWN_ATTEMPTS:]]
    if run.finished:
        lines.append("finished    yes")
    elif history.stopped:
        lines.append(f"stopped     {history.stopped}")
    return lines


def cancel(paths: RunPaths) -> str:
    """Cancel all jobs of the run; those that wait first, or one of them would begin.

    Raises:
        RunError: nothing was submitted from this run directory.
    """
    active = [state for state in states_of(paths) if not state.is_over]
    if not active:
        return "no job of this run waits or runs"
    ids = [state.id for state in sorted(active, key=lambda state: state.state == "RUNNING")]
    slurm("scancel", *ids)
    return f"cancelled {', '.join(ids)}"


def requeue(paths: RunPaths) -> str:
    """Have a run go on: a running job saves and starts anew; one that has ended is submitted again.

    Raises:
        RunError: nothing was submitted from this run directory, or the run is finished.
    """
    states = states_of(paths)
    if read_state(paths.run_dir).finished:
        raise RunError(f"{paths.run_dir}: the run is finished")
    running = [state.id for state in states if state.state == "RUNNING"]
    if running:
        slurm("scancel", "--batch", "--signal=USR1", running[0])
        return f"asked job {running[0]} to finish its step, save and start anew"
    waiting = [state.id for state in states if not state.is_over]
    if waiting:
        return f"job {waiting[0]} waits already"
    write_history(paths.history, read_history(paths.history).submitted_again())
    job = sbatch(paths.script)
    add_jobs(paths, [{"id": job, "what": "train"}])
    return f"submitted {job}: {paths.script}"


def states_of(paths: RunPaths) -> list[JobState]:
    """Slurm's view of all jobs of the run, oldest first.

    Raises:
        RunError: there are none.
    """
    jobs = read_jobs(paths)
    if not jobs:
        raise RunError(f"{paths.run_dir}: nothing was submitted to Slurm from here; is it the run's directory?")
    return job_states([job["id"] for job in jobs])


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min {rest} s"
