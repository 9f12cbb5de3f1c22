"""Every start of a run's jobs, why it ended, and whether the run goes on: kept in the run directory as JSON."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

from nemo_aapo.config.build import build
from nemo_aapo.errors import RunError
from nemo_aapo.run.state import RunState
from nemo_aapo.utils.files import read_json, to_json, write_atomic

End = Literal["running", "finished", "saved", "cancelled", "refused", "failed", "unstarted", "lost"]
"""How an attempt ended. ``saved``: stopped before the run was complete, with a checkpoint. ``unstarted``: no trainer
could be started, as while Slurm does not answer. ``lost``: Slurm ended the job and has requeued it itself, as after the
loss of a node."""


@dataclass(frozen=True)
class Attempt:
    """One start of a job, up to the end of its trainer."""

    job: str
    restart: int
    """How often Slurm had requeued the job before."""
    began: float
    """Unix time."""
    checkpoint_before: int
    """Step of the newest checkpoint at the start, 0 without one."""
    end: End = "running"
    ended: float | None = None
    checkpoint_after: int = 0
    step: int = 0
    """Training steps done when it ended; the one after it was at work."""
    tokens: int = 0
    """Completion tokens of this attempt's steps."""
    why: str = ""
    """What happened, for people, in one line."""

    @property
    def made_progress(self) -> bool:
        """Whether it left a newer checkpoint."""
        return self.checkpoint_after > self.checkpoint_before

    def closed(self, end: End, why: str, state: RunState) -> Attempt:
        """As it has just ended, with what the run has by now."""
        return replace(
            self,
            end=end,
            why=why,
            ended=time.time(),
            checkpoint_after=state.checkpoint,
            step=state.step,
            tokens=state.tokens_after(self.checkpoint_before),
        )


@dataclass(frozen=True)
class Decision:
    """What becomes of the job."""

    requeue: bool
    why: str
    """Why a run that is not requeued stops, for people."""


@dataclass(frozen=True)
class History:
    """All attempts of a run, oldest first."""

    attempts: tuple[Attempt, ...] = ()
    counts_from: int = 0
    """Attempts before this one were before the last submission: they are not held against the run."""
    stopped: str | None = None
    """Why the run was given up, after which jobs that still wait end at once; a new submission clears it."""

    def begin(self, attempt: Attempt) -> History:
        """With a new attempt; one that has no end by now had no chance to write it."""
        before = tuple(_ended_silently(old, attempt) if old.end == "running" else old for old in self.attempts)
        return replace(self, attempts=(*before, attempt))

    def end(self, attempt: Attempt) -> History:
        """With the last attempt's end."""
        return replace(self, attempts=(*self.attempts[:-1], attempt))

    def submitted_again(self) -> History:
        """A person wants the run to go on."""
        return replace(self, counts_from=len(self.attempts), stopped=None)


def decide(attempts: Sequence[Attempt], max_requeues: int) -> Decision:
    """Whether the job is requeued after the last of these attempts.

    Args:
        attempts: since the run was submitted, at least one.
        max_requeues: so often in a row without a new checkpoint.
    """
    last = attempts[-1]
    if last.end == "finished":
        return Decision(False, "the run is complete")
    if last.end == "cancelled":
        return Decision(False, f"not requeued: {last.why}")
    if last.end == "refused":
        return Decision(False, "the run stops: it would be refused again")
    earlier = [attempt for attempt in attempts[:-1] if (attempt.end, attempt.step) == ("failed", last.step)]
    if last.end == "failed" and earlier:
        return Decision(
            False,
            f"the run stops: step {last.step + 1} failed twice (before: job {earlier[-1].job}, {earlier[-1].why}). "
            "Look at the logs; `scripts/launch.py requeue` has it tried again",
        )
    in_vain = 0
    for attempt in reversed(attempts):
        if attempt.made_progress:
            break
        in_vain += 1
    if in_vain > max_requeues:
        return Decision(
            False, f"the run stops: {in_vain} attempts in a row without a new checkpoint (max_requeues={max_requeues})"
        )
    return Decision(True, "requeued")


def summary(attempt: Attempt) -> str:
    """One attempt for people: steps, tokens, time, why it ended."""
    before = attempt.checkpoint_before
    steps = f"steps {before} -> {attempt.step}" if attempt.step > before else f"no step after {before}"
    minutes, seconds = divmod(round((attempt.ended or attempt.began) - attempt.began), 60)
    saved = f"checkpoint of step {attempt.checkpoint_after}" if attempt.checkpoint_after else "no checkpoint"
    return (
        f"attempt {attempt.restart} of job {attempt.job}: {steps}, {attempt.tokens:,} tokens, {minutes} min "
        f"{seconds} s, {saved}; {attempt.end}: {attempt.why}"
    )


def read_history(path: Path) -> History:
    """What is kept in the file; empty without one.

    Raises:
        RunError: it is damaged.
    """
    remedy = "Remove it: what the run itself has done is kept elsewhere"
    return read_json(path, lambda tree: build(History, tree), RunError, remedy) or History()


def write_history(path: Path, history: History) -> None:
    """Keep it."""
    write_atomic(path, to_json(asdict(history)) + "\n")


def _ended_silently(old: Attempt, new: Attempt) -> Attempt:
    """Slurm ended the job together with its script: a lost node, or no time left to save."""
    why = "the job's script was ended with its node, or before it could say anything"
    return replace(old, end="lost", ended=new.began, checkpoint_after=new.checkpoint_before, why=why)
