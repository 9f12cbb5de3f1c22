"""The completions of an evaluation as JSONL, one line each, so that an interrupted evaluation can go on.

<run.dir>/evaluation.json            what is measured: model, prompt, sampling, seed, reward
<run.dir>/completions/math500.jsonl  completions with their verdicts
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from nemo_aapo.config.build import build
from nemo_aapo.errors import ConfigError, RecordsError
from nemo_aapo.utils.files import fitting, read_json, to_json, write_atomic

IDENTITY = "evaluation.json"
FOLDER = "completions"


@dataclass(frozen=True, slots=True)
class Record:
    """One judged completion.

    Example:
        ``{"problem": "52ab...", "sample": 0, "correct": true, "failed": false, "voted": "2", "tokens": 181,
        "finish_reason": "stop", "level": "1", "subject": "Prealgebra", "gold": "2", "prompt": "What is $1+1$?", ...}``
    """

    problem: str
    """``Problem.id``"""
    sample: int
    """Index among the problem's completions, from 0."""
    correct: bool
    """The reward calls the completion right; false where it could not be judged."""
    failed: bool
    """The completion could not be judged: it is neither right nor wrong, and in no figure but ``failed_fraction``."""
    voted: str | None
    """The normalised answer that the completion votes for in maj@k; None without an answer."""
    tokens: int
    """Length of the completion."""
    finish_reason: str
    """``"stop"`` or ``"length"``, as in ``Completion``."""
    level: str | None
    """``Problem.level``"""
    subject: str | None
    """``Problem.subject``"""
    gold: str
    """``Problem.answer``"""
    prompt: str
    """The rendered prompt."""
    completion: str
    """The decoded completion."""
    source: str
    """``Problem.source``"""


class Records:
    """The completions of one benchmark. One process writes them."""

    def __init__(self, directory: Path, benchmark: str) -> None:
        self.path = directory / FOLDER / f"{benchmark}.jsonl"

    def read(self) -> dict[tuple[str, int], Record]:
        """(problem, sample) -> record. A last line that was cut off is left out.

        Raises:
            RecordsError: another line is damaged.
        """
        if not self.path.exists():
            return {}
        found: dict[tuple[str, int], Record] = {}
        *lines, _ = self.path.read_bytes().split(b"\n")  # the last is empty, or cut off, perhaps within a character
        for number, line in enumerate(lines, start=1):
            try:
                record = build(Record, json.loads(line))
            except (ValueError, TypeError, RecursionError) as error:
                raise RecordsError(f"{self.path}:{number}: damaged ({error}). Remove the line, or the file") from None
            found[record.problem, record.sample] = record
        return found

    def mend(self, kept: Iterable[Record]) -> None:
        """Rewrite the file with these records if an interruption left half a line at its end."""
        if self.path.exists() and not self.path.read_bytes().endswith(b"\n"):
            write_atomic(self.path, "".join(to_json(asdict(record)) + "\n" for record in kept))

    def append(self, records: Sequence[Record]) -> None:
        """Append records; they are on the disk when this returns."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write("".join(to_json(asdict(record)) + "\n" for record in records))
            file.flush()
            os.fsync(file.fileno())


def claim_identity(directory: Path, identity: Mapping[str, Any]) -> None:
    """Write down in the directory what is measured, or check that the same was measured there before.

    Raises:
        ConfigError: the directory holds another evaluation; names the differences.
    """
    path = directory / IDENTITY
    now = json.loads(to_json(identity))
    if not path.exists():
        write_atomic(path, to_json(now) + "\n")
        return
    there = read_identity(directory)
    different = [
        f"  {key}: {to_json(there.get(key))} there, {to_json(now.get(key))} now"
        for key in {**there, **now}
        if there.get(key) != now.get(key)
    ]
    if different:
        raise ConfigError(
            f"run.dir={directory} holds another evaluation:\n" + "\n".join(different) + "\n"
            f"Give this one another name (run.name=NAME), set these as they were, or remove {directory}"
        )


def read_identity(directory: Path) -> dict[str, Any]:
    """What an evaluation measured: the content of its ``evaluation.json``.

    Raises:
        ConfigError: no evaluation is there, or its record is damaged.
    """
    remedy = f"Name another run.dir, or remove {directory}"
    found = read_json(directory / IDENTITY, lambda tree: fitting(tree, dict), ConfigError, remedy)
    if found is None:
        raise ConfigError(f"{directory}: no evaluation is there (no {IDENTITY})")
    return dict(found)


def measured_benchmarks(directory: Path) -> list[str]:
    """Names of the benchmarks that have completions in the directory."""
    return sorted(path.stem for path in (directory / FOLDER).glob("*.jsonl"))
