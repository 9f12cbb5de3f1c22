"""The names of checkpoints in a run directory: ``checkpoints/step_000050``."""

from __future__ import annotations

import re

CHECKPOINTS = "checkpoints"
"""Name of the directory that holds a run's checkpoints."""


def step_name(step: int) -> str:
    """What belongs to a step is called so: ``step_000050``."""
    return f"step_{step:06d}"


def step_of(name: str) -> int | None:
    """The step that a name says; None for any other name.

    >>> step_of("step_000050"), step_of(".step_000050.partial")
    (50, None)
    """
    match = re.fullmatch(r"step_(\d{6,})", name)
    return int(match.group(1)) if match else None
