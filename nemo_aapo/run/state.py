"""The state of a run, read from the files in its directory: steps, validations, checkpoints, whether it is finished."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from nemo_aapo.config.build import build
from nemo_aapo.errors import RunError
from nemo_aapo.run.metrics_file import is_validation, number, read_metrics
from nemo_aapo.run.names import CHECKPOINTS, PHASE, newest_step, step_name
from nemo_aapo.utils.files import FINISHED, read_json
from nemo_aapo.utils.tables import time_left

SILENCE_S = 90.0
"""A run at work writes its phase much more often."""


@dataclass(frozen=True)
class Phase:
    """Work between steps, such as filling reference rewards.

    Example: ``Phase("reference rewards", done=120, total=4800, began=1765432100.0)``
    """

    phase: str
    done: int
    total: int
    """0 where nobody knows."""
    began: float
    """Unix time."""
    age_s: float = 0.0
    """Seconds since the run said so."""

    def __str__(self) -> str:
        count = f" {self.done} of {self.total}" if self.total else ""
        seconds = time.time() - self.age_s - self.began
        said = f" (said {round(self.age_s / 60)} min ago)" if self.age_s > SILENCE_S else ""
        return f"{self.phase}{count}{time_left(seconds, self.done, self.total)}{said}"


@dataclass(frozen=True)
class RunState:
    """What a run directory held at the moment it was read.

    Example:
        ``RunState(finished=False, steps=({"step": 1, "loss": 0.2, ...}, {"step": 2, ...}), validation={"step": 0, ...},
        checkpoint=2, checkpoint_age_s=41.0)``, of which ``step`` is 2.
    """

    finished: bool
    """The run has made all its steps."""
    steps: tuple[dict[str, Any], ...]
    """The lines of ``metrics.jsonl`` that are training steps, oldest first."""
    validation: dict[str, Any] | None
    """The last line of ``metrics.jsonl`` that is a validation; None without one."""
    checkpoint: int
    """Step of the newest checkpoint, 0 without one."""
    checkpoint_age_s: float | None
    """Seconds since the newest checkpoint was written; None without one."""
    phase: Phase | None = None
    """What the run is at, where that is no step; of a run that was killed, what it was at."""

    @property
    def step(self) -> int:
        """Training steps done, 0 at the start."""
        return self.steps[-1]["step"] if self.steps else 0

    def tokens_after(self, step: int) -> int:
        """Completion tokens of the training steps after this one."""
        steps = [s for s in self.steps if s["step"] > step]
        return round(sum(number(s, "tokens_per_second") * number(s, "time/step") for s in steps))


def read_state(run_dir: Path) -> RunState:
    """Read a run directory, which may be empty.

    Raises:
        RunError: a file of it is damaged.
    """
    path = run_dir / "metrics.jsonl"
    lines = read_metrics(path) if path.exists() else []
    newest = newest_step(run_dir)
    validations = [line for line in lines if is_validation(line)]
    return RunState(
        finished=(run_dir / FINISHED).exists(),
        steps=tuple(line for line in lines if "loss" in line),
        validation=validations[-1] if validations else None,
        checkpoint=newest,
        phase=_phase(run_dir / PHASE),
        checkpoint_age_s=time.time() - (run_dir / CHECKPOINTS / step_name(newest)).stat().st_mtime if newest else None,
    )


def _phase(path: Path) -> Phase | None:
    found = read_json(path, lambda tree: build(Phase, tree), RunError, "Remove it: the run writes it anew")
    if found is None:
        return None
    try:
        return replace(found, age_s=max(0.0, time.time() - path.stat().st_mtime))
    except FileNotFoundError:  # it ended just now
        return None
