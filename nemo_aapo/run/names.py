"""Names in a run directory that several parts know, such as those of checkpoints: ``checkpoints/step_000050``."""

from __future__ import annotations

import re
from pathlib import Path

PHASE = "phase.json"
"""Name of the file that says what the run is at while it makes no step."""
CHECKPOINTS = "checkpoints"
"""Name of the directory that holds a run's checkpoints."""
STORE = "reference_rewards.sqlite"
"""Name of the file with a run's reference rewards, or with those of all runs of a sweep."""
ROLLOUTS = "rollouts"
"""Name of the directory that holds completions: ``step_000050.jsonl`` those of a validation, ``train_000050.jsonl``
those of a training step that were kept, ``train_000050.safetensors`` their tokens."""
TRACES = "trace"
"""Name of the directory that holds traces of steps: ``step_000010.json``."""
REPORT = "report.html"
"""Name of the page that shows a run."""


def step_name(step: int) -> str:
    """What belongs to a step is called so: ``step_000050``."""
    return f"step_{step:06d}"


def kept_name(step: int) -> str:
    """What was kept of a training step's rollouts is called so: ``train_000050``."""
    return f"train_{step:06d}"


def newest_step(run_dir: Path) -> int:
    """The step of the newest checkpoint in a run directory, 0 without one; names tell, nothing is read."""
    return max((step_of(path.name) or 0 for path in (run_dir / CHECKPOINTS).glob("step_*")), default=0)


def step_of(name: str, kind: str = "step") -> int | None:
    """The step that a name says; None for any other name.

    >>> step_of("step_000050"), step_of(".step_000050.partial"), step_of("train_000007", "train")
    (50, None, 7)
    """
    match = re.fullmatch(rf"{kind}_(\d{{6,}})", name)
    return int(match.group(1)) if match else None
