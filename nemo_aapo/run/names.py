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


def step_name(step: int) -> str:
    """What belongs to a step is called so: ``step_000050``."""
    return f"step_{step:06d}"


def newest_step(run_dir: Path) -> int:
    """The step of the newest checkpoint in a run directory, 0 without one; names tell, nothing is read."""
    return max((step_of(path.name) or 0 for path in (run_dir / CHECKPOINTS).glob("step_*")), default=0)


def step_of(name: str) -> int | None:
    """The step that a name says; None for any other name.

    >>> step_of("step_000050"), step_of(".step_000050.partial")
    (50, None)
    """
    match = re.fullmatch(r"step_(\d{6,})", name)
    return int(match.group(1)) if match else None
