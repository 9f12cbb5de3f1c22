"""Any data set as the project's JSONL, with a report of what was kept and what was not."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from nemo_aapo.config.sources import Source
from nemo_aapo.data.contamination import conflicts, overlap
from nemo_aapo.data.gym import GymProcess
from nemo_aapo.data.prepared.answers import AnswerCheck, VerifyAnswer
from nemo_aapo.data.prompts import without_repeats
from nemo_aapo.data.records import Record, read_records
from nemo_aapo.data.rows import HELD_OUT_SPLITS, TRAIN_SPLITS, Row, Rows, parse_question, read_rows
from nemo_aapo.errors import DataError
from nemo_aapo.utils.files import write_atomic

_PERCENTILES = (50, 90, 99, 100)
_EXAMPLES = 5
_QUESTION_FIELDS = ("question", "problem", "Problem")
"""Where the benchmarks of mathematics have their questions."""
_BLOCK = 64
"""Items of reasoning-gym asked for at a time."""


@dataclass(frozen=True)
class Report:
    """What became of a data set's rows."""

    source: str
    """The data set's path."""
    rows: int
    """Number of rows read."""
    written: int
    """Number of rows written."""
    dropped: dict[str, int]
    """Reason -> number of rows that were dropped for it."""
    examples: list[str]
    """Some of the dropped rows, with their place and the whole reason."""
    lengths: dict[str, int]
    """Percentile -> length of a written question."""
    length_unit: str
    """``tokens`` or ``characters``."""
    conflicts: list[list[str]]
    """Places of questions that are there with different answers, by normalised text; all of them are written."""
    contamination: dict[str, list[str]]
    """Held-out source -> places of rows that are among its questions."""
    not_compared: dict[str, int]
    """Held-out source -> number of its rows in which no question was found."""

    def text(self) -> str:
        """The report as lines for people."""
        lines = [f"{self.source}: {self.rows} rows, {self.written} written"]
        lines += [f"  dropped, {reason}: {count}" for reason, count in self.dropped.items()]
        lines += [f"    {example}" for example in self.examples]
        numbers = ", ".join(f"{name} {length}" for name, length in self.lengths.items())
        lines.append(f"  question length in {self.length_unit}: {numbers}")
        lines.append(f"  questions that are there with different answers: {len(self.conflicts)}")
        lines += [f"    {', '.join(group[:_EXAMPLES])}" for group in self.conflicts[:_EXAMPLES]]
        for held_out, places in self.contamination.items():
            shown = f", such as {', '.join(places[:_EXAMPLES])}" if places else ""
            lines.append(f"  among the held-out questions of {held_out}: {len(places)}{shown}")
            if unread := self.not_compared.get(held_out):
                lines.append(f"    not compared, as they can't be read: {unread} of its rows")
        return "\n".join(lines) + "\n"


def prepare(
    source: Source,
    *,
    held_out: Sequence[Source] = (),
    drop_contaminated: bool = False,
    count_tokens: Callable[[str], int] | None = None,
    max_prompt_tokens: int | None = None,
    verify_answer: VerifyAnswer | AnswerCheck | None = None,
) -> tuple[list[Row], Report]:
    """The rows of a source that a run could use, and the report.

    Args:
        held_out: sources whose questions must not be among the rows.
        drop_contaminated: leave out rows whose question is.
        count_tokens: length of a question; by default characters are counted.
        max_prompt_tokens: longer questions are left out; needs ``count_tokens``.
        verify_answer: raises ValueError for a gold answer that the rewards can't work with.

    Raises:
        DataError: a source can't be read, or no row of a held-out one can be compared.
    """
    found = _items(source) if source.task else read_rows(source, TRAIN_SPLITS, verify_answer=verify_answer)
    dropped = Counter(_reason(problem) for problem in found.problems.values())
    examples = [f"{source.path}:{n}: {problem}" for n, problem in list(found.problems.items())[:_EXAMPLES]]
    rows = without_repeats(found.rows)
    dropped["repeat of an earlier row"] = len(found.rows) - len(rows)
    lengths = [(count_tokens or len)(row.question) for row in rows]
    if max_prompt_tokens is not None:
        kept = [i for i, length in enumerate(lengths) if length <= max_prompt_tokens]
        dropped[f"longer than {max_prompt_tokens} tokens"] = len(rows) - len(kept)
        rows, lengths = [rows[i] for i in kept], [lengths[i] for i in kept]
    contamination, contaminated, not_compared = _contamination(source, rows, held_out)
    if drop_contaminated:
        dropped["among the held-out questions"] = len(contaminated)
        kept = [i for i in range(len(rows)) if i not in contaminated]
        rows, lengths = [rows[i] for i in kept], [lengths[i] for i in kept]
    groups = conflicts([row.question for row in rows], [row.answer for row in rows])
    report = Report(
        source=source.path,
        rows=len(found.rows) + len(found.problems),
        written=len(rows),
        dropped={reason: count for reason, count in dropped.items() if count},
        examples=examples,
        lengths=_percentiles(lengths),
        length_unit="tokens" if count_tokens else "characters",
        conflicts=[[f"{source.path}:{rows[i].number}" for i in group] for group in groups],
        contamination=contamination,
        not_compared=not_compared,
    )
    return rows, report


def write_rows(rows: Iterable[Row], path: Path) -> None:
    """Write JSONL with ``question`` and ``answer``; where chat messages precede, the question is the list of all."""
    lines = []
    for row in rows:
        question: Any = row.question
        if row.before:
            question = [*row.before, {"role": "user", "content": row.question}]
        lines.append(json.dumps({"question": question, "answer": row.answer}, ensure_ascii=False))
    write_atomic(path, "".join(line + "\n" for line in lines))


def write_report(report: Report, path: Path) -> None:
    """Write the report as JSON."""
    write_atomic(path, json.dumps(dataclasses.asdict(report), indent=1, ensure_ascii=False) + "\n")


def preset_source(preset: Path, what: str, changes: dict[str, Any]) -> Source:
    """The source that a file of ``conf/data`` names.

    Args:
        what: ``train`` or ``validation``.
        changes: settings that replace the file's.

    Raises:
        DataError: the file is not there.
    """
    if not preset.is_file():
        there = ", ".join(sorted(path.stem for path in preset.parent.glob("*.yaml")))
        raise DataError(f"there is no preset {preset.stem}; there is {there}")
    tree = yaml.safe_load(preset.read_text(encoding="utf-8"))
    named = tree.get(what, {})
    first = named[0] if isinstance(named, list) else {"path": named} if isinstance(named, str) else named
    fields = {name: tree[name] for name in ("prompt_field", "answer_field", "answer_form") if name in tree}
    if changes.get("path", first.get("path")) != first.get("path"):  # of a copy: one split of one subset
        first = {name: value for name, value in first.items() if name not in ("path", "subset", "split")}
    return Source(**{**fields, **first, **changes})


def _items(source: Source) -> Rows:
    """The rows of a reasoning-gym task."""
    if source.size is None:
        raise DataError(f"{source.path} has no end: say how many items (--size)")
    with contextlib.closing(GymProcess(source.task or "", source.parameters, source.seed)) as process:
        blocks = [range(n, min(n + _BLOCK, source.size)) for n in range(0, source.size, _BLOCK)]
        made = [item for block in blocks for item in process.items(block)]
    return Rows([Row(n, question, gold) for n, (question, gold) in enumerate(made, start=1)], {})


def _contamination(
    source: Source, rows: Sequence[Row], held_out: Sequence[Source]
) -> tuple[dict[str, list[str]], set[int], dict[str, int]]:
    """By held-out source, the places of the rows that are among it; the indices of all these rows; and by held-out
    source, how many of its rows can't be read."""
    places: dict[str, list[str]] = {}
    indices: set[int] = set()
    unread: dict[str, int] = {}
    questions = [row.question for row in rows]
    for other in held_out:
        there, problems = _held_out_questions(other)
        if not there:  # to compare with nothing would say that all is well
            raise DataError(
                f"{other.path}: {problems[0] if problems else 'it is empty'}: no row of these held-out data can be "
                "compared. Prepare them first, with their fields, and name what that wrote; or name preset:NAME"
            )
        found = overlap(questions, there)
        places[other.path] = [f"{source.path}:{rows[i].number}" for i in found]
        indices |= set(found)
        if problems:
            unread[other.path] = len(problems)
    return places, indices, unread


def _held_out_questions(source: Source) -> tuple[list[str], list[str]]:
    """The questions of held-out data, and what is wrong with the rows that have none. Their answers don't matter."""
    questions, problems = [], []
    for record in read_records(source, HELD_OUT_SPLITS):
        try:
            questions.append(_question_of(record, source.prompt_field))
        except DataError as error:
            problems.append(f"row {record.number}: {error}")
    return questions, problems


def _question_of(record: Record, field: str) -> str:
    for name in (field, *_QUESTION_FIELDS):
        with contextlib.suppress(DataError):
            return parse_question(record, name)[-1]["content"]
    return parse_question(record, field)[-1]["content"]


def _reason(problem: str) -> str:
    """The part of a row's problem that other rows may have too: what is counted."""
    if problem.startswith("the gold answer"):
        return "gold answer that can't be verified"
    return re.split(r":| but ", problem, maxsplit=1)[0]


def _percentiles(lengths: Sequence[int]) -> dict[str, int]:
    if not lengths:
        return {}
    values = np.percentile(lengths, _PERCENTILES, method="higher")
    return {"longest" if p == 100 else f"{p}%": int(value) for p, value in zip(_PERCENTILES, values, strict=True)}
