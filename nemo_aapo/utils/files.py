"""Files that are whole or not there, and JSON that any reader takes."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

FINISHED = "finished"
"""Name of the file in the run directory that says that the run is complete; its JSON sums the run up."""
LOCK = ".lock"
"""Name of the file in the run directory that the process which writes there holds locked."""


def write_atomic(path: Path, text: str, mode: int = 0o666) -> None:
    """Write a whole file or none: a reader, or a run that starts after a crash, never sees half of it.

    Args:
        mode: permissions of the new file, less the umask.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with open(partial, "w", encoding="utf-8", opener=lambda name, flags: os.open(name, flags, mode)) as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def to_json(value: Any) -> str:
    """One line of strict JSON: numpy becomes plain, and what is not finite becomes null (``NaN`` is no JSON)."""
    return json.dumps(_plain(value), allow_nan=False, ensure_ascii=False)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
