"""``metrics.jsonl``: one JSON object a training step and one a validation, without gap or repeat over resumes."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from types import NoneType
from typing import Any

from nemo_aapo.errors import MetricsError
from nemo_aapo.utils.files import fitting, sync, to_json, write_atomic


class MetricsFile:
    """An append-only file of records, each with its ``step``. One process writes it; others may read it meanwhile.

    Example:
        ``{"step": 3, "loss": -0.02, "reward/mean": 0.41, "time/step": 1.7, ...}`` is one line.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a", encoding="utf-8")

    def append(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Append one line, which readers see at once. Numbers that are not finite are written as null."""
        self._file.write(to_json({"step": step, **metrics}) + "\n")
        self._file.flush()

    def sync(self) -> None:
        """Return when all lines, and the file's name, are on the disk, where a crash of the machine leaves them."""
        sync(self.path)
        sync(self.path.parent)

    def truncate_after(self, step: int, *, validated: bool = True) -> int:
        """Remove the lines of later steps, which an interrupted part of the run made after its last checkpoint.

        A last line that was cut off in the middle is removed as well; where the step is not ``validated`` yet, so is
        the line of its validation.

        Returns:
            The step of the last line that stays; -1 without any.

        Raises:
            MetricsError: a line before the last is not JSON or has no step.
        """
        kept = [
            (line, record["step"])
            for line, record in _read(self.path)
            if record["step"] < step or (record["step"] == step and (validated or not is_validation(record)))
        ]
        self._file.close()
        write_atomic(self.path, "".join(line + "\n" for line, _ in kept))
        self._file = self.path.open("a", encoding="utf-8")
        return kept[-1][1] if kept else -1

    def close(self) -> None:
        """Close the file; nothing can be appended afterwards."""
        self._file.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All whole records of a metrics file, oldest first; null stands for a number that was not finite.

    Raises:
        MetricsError: a line before the last is not JSON or has no step.
    """
    return [record for _, record in _read(path)]


def is_validation(record: Mapping[str, Any]) -> bool:
    """Whether a record is that of a validation, and none of a training step."""
    return "validation/accuracy_greedy" in record


def number(record: Mapping[str, Any], name: str) -> float:
    """A metric of a record; 0 where it is missing, as an earlier version did not have it, or was not finite."""
    value = record.get(name) or 0.0
    return float(value) if math.isfinite(value) else 0.0


def _read(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """(line, record) of each whole line."""
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    lines.pop()  # empty, or a line that a crash cut off before its newline
    found = []
    for number, line in enumerate(lines, start=1):
        try:
            record = {**json.loads(line)}
            for name, value in record.items():
                if not math.isfinite(fitting(value, int, float, NoneType) or 0):
                    record[name] = None
            found.append((line, {**record, "step": int(record["step"])}))
        except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
            raise MetricsError(
                f"{path}:{number}: not a record of metrics: {line[:80]!r}. Repair or remove it"
            ) from None
    return found
