"""How far a run is, by what it left in its directory."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_aapo.errors import RunError
from nemo_aapo.run.metrics_file import read_metrics
from nemo_aapo.run.names import CHECKPOINTS, step_of
from nemo_aapo.utils.files import FINISHED


@dataclass(frozen=True)
class RunState:
    """One look at a run directory."""

    finished: bool
    steps: tuple[dict[str, Any], ...]
    """The lines of ``metrics.jsonl`` that are training steps."""
    validation: dict[str, Any] | None
    """The last line that is a validation."""
    checkpoint: int
    """Step of the newest checkpoint, 0 without one."""
    checkpoint_age_s: float | None

    @property
    def step(self) -> int:
        """Training steps done, 0 at the start."""
        return self.steps[-1]["step"] if self.steps else 0

    def tokens_after(self, step: int) -> int:
        """Completion tokens of the training steps after this one."""
        return round(sum(s["tokens_per_second"] * s["time/step"] for s in self.steps if s["step"] > step))


def look(run_dir: Path) -> RunState:
    """Read a run directory; it may be empty.

    Raises:
        RunError: ``metrics.jsonl`` is damaged.
    """
    path = run_dir / "metrics.jsonl"
    try:
        lines = read_metrics(path) if path.exists() else []
    except ValueError as error:
        raise RunError(str(error)) from None
    checkpoints = {step: path for path in (run_dir / CHECKPOINTS).glob("step_*") if (step := step_of(path.name))}
    newest = max(checkpoints, default=0)
    validations = [line for line in lines if "validation/accuracy_greedy" in line]
    return RunState(
        finished=(run_dir / FINISHED).exists(),
        steps=tuple(line for line in lines if "loss" in line),
        validation=validations[-1] if validations else None,
        checkpoint=newest,
        checkpoint_age_s=time.time() - checkpoints[newest].stat().st_mtime if newest else None,
    )
