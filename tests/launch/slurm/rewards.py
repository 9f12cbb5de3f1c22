"""A reward that holds its run up on the attempts that the environment names, and else just scores."""

from __future__ import annotations

import os
import time
from pathlib import Path

LONGEST_HOLD_S = 600.0


def custom(prompt: str, completion: str, answer: str, **info: object) -> float:
    """Half a point for an even sum of characters, half for one that is divisible by three."""
    attempt = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
    if attempt < int(os.environ.get("HELD_ATTEMPTS", "0")):
        until = Path(os.environ["HOLD_UNTIL"])
        if _steps(until.with_name("metrics.jsonl")) >= int(os.environ.get("HELD_AFTER_STEP", "0")):
            _hold(until)
    total = sum(map(ord, completion))
    return 0.5 * (total % 2 == 0) + 0.5 * (total % 3 == 0)


def _steps(metrics: Path) -> int:
    """Training steps that are done."""
    return metrics.read_text().count('"loss"') if metrics.exists() else 0


def _hold(until: Path) -> None:
    """Until the file is there: by default the run's stop file, so that a held step ends when the run is asked to."""
    deadline = time.monotonic() + LONGEST_HOLD_S
    if not until.exists():
        until.with_name("held").touch()
    while not until.exists() and time.monotonic() < deadline:
        time.sleep(0.1)
