"""Benchmarks of mathematics: a row of any published form -> ``Problem``.

Column names were looked up on the data sets' own pages and in code that reads them (listed in
docs/guide/evaluation.md). Nothing here knows a model or a tokenizer.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from nemo_aapo.config.schema import EvaluationFields
from nemo_aapo.config.sources import Source
from nemo_aapo.data.records import Record, read_records
from nemo_aapo.data.rows import HELD_OUT_SPLITS, answer_text, gold_answer
from nemo_aapo.errors import DataError
from nemo_aapo.text.answer import find_answer
from nemo_aapo.utils.text import shorten

Row = Mapping[str, Any]
"""Column -> cell, as JSON and Parquet have them."""
Parsed = tuple[str, str, str | None, str | None]
"""Question, gold answer, level, subject."""
SHOWN_ROWS = 5
"""Number of rows that can't be used which a message names."""


@dataclass(frozen=True, slots=True)
class Problem:
    """One question of a benchmark.

    Example:
        ``Problem(id="52ab...", question="What is $1+1$?", answer="2", level="1", subject="Prealgebra",
        source="math500.jsonl:7")``
    """

    id: str
    """Digest of question and gold answer: the same for every model, so that two evaluations can be paired."""
    question: str
    answer: str
    """The gold answer in the form that the verifier takes."""
    level: str | None
    """The benchmark's own level of difficulty; None where it has none."""
    subject: str | None
    """The benchmark's own subject; None where it has none."""
    source: str
    """The place that it came from: ``path:row``, rows counted from 1."""


@dataclass(frozen=True, slots=True)
class Benchmark:
    """How a known benchmark is read."""

    problems: int
    """Number of problems of the benchmark as it is commonly used."""
    subset: str | None
    """Subset of its data set on the hub; None: the data set has no subsets."""
    split: str
    """Split of its data set on the hub."""
    parse: Callable[[Row], Parsed | None]
    """A row's question, gold answer, level and subject; None for a row that belongs to another benchmark.

    Raises:
        DataError: what is wrong with the row.
    """


def load_problems(name: str, entry: Any, fields: EvaluationFields) -> tuple[tuple[Problem, ...], str]:
    """The problems of a benchmark, and a remark on them for the log: repeated rows, an unusual number; or empty.

    Args:
        name: one of ``BENCHMARKS``, or a name of one's own.
        entry: the place of its rows: a path or a name on the hub, or a mapping with ``path``, ``subset``, ``split``.
        fields: the columns of a benchmark that is not in ``BENCHMARKS``.

    Raises:
        DataError: nothing there, or rows that can't be used.
    """
    known = BENCHMARKS.get(name)
    source = source_of(name, entry)
    splits = (known.split,) if known else ()
    problems, repeats = read_problems(read_records(source, (*splits, *HELD_OUT_SPLITS)), source.path, known or fields)
    notes = [f"{repeats} repeated ones left out"] if repeats else []
    if known and len(problems) != known.problems:
        notes.append(f"the benchmark has {known.problems} as it is commonly used")
    return problems, f" ({'; '.join(notes)})" if notes else ""


def source_of(name: str, entry: Any) -> Source:
    """Where the rows of a benchmark are; arguments and errors as ``load_problems`` has them."""
    known = BENCHMARKS.get(name)
    given = entry if isinstance(entry, dict) else {"path": entry}
    unknown = set(given) - {"path", "subset", "split"}
    if unknown or not isinstance(given.get("path"), str):
        raise DataError(f"sources.{name}={entry!r}: a path, or a mapping with path, subset and split, is needed")
    # No column has an empty name: asked for one, the reader hands over all columns.
    source = Source(**{"prompt_field": "", "answer_field": "", **given})
    if known and source.on_hub:
        chosen = {"subset": known.subset, "split": known.split, **given}
        source = dataclasses.replace(source, subset=chosen["subset"], split=chosen["split"])
    return source


def read_problems(
    records: Iterable[Record], source: str, benchmark: Benchmark | EvaluationFields
) -> tuple[tuple[Problem, ...], int]:
    """All problems of some rows, in their order, each once; and how many rows repeated one.

    Args:
        source: the place of the rows, for messages.
        benchmark: how to read a row.

    Raises:
        DataError: rows that can't be used, of which it names the first; or no problem at all.
    """
    parse = benchmark.parse if isinstance(benchmark, Benchmark) else _by_fields(benchmark)
    problems: dict[str, Problem] = {}
    repeats = 0
    wrong: dict[int, str] = {}
    for record in records:
        try:
            parsed = parse(_row(record))
        except DataError as error:
            wrong[record.number] = str(error)
            continue
        if parsed is not None:
            problem = Problem(_problem_id(parsed[0], parsed[1]), *parsed, source=f"{source}:{record.number}")
            repeats += problem.id in problems
            problems.setdefault(problem.id, problem)
    if wrong:
        shown = [f"{source}:{number}: {what}" for number, what in list(wrong.items())[:SHOWN_ROWS]]
        more = f"\n  and {len(wrong) - len(shown)} more" if len(wrong) > len(shown) else ""
        raise DataError(f"{source}: {len(wrong)} row(s) can't be used:\n  " + "\n  ".join(shown) + more)
    if not problems:
        raise DataError(f"{source}: no problems in it")
    return tuple(problems.values()), repeats


def _row(record: Record) -> Row:
    if record.problem:
        raise DataError(record.problem)
    if not isinstance(record.value, dict):
        raise DataError(f"not an object with columns but {shorten(record.value)}")
    return record.value


# ---------------------------------------------------------------- rows


def _math(row: Row) -> Parsed:
    """MATH and MATH-500. ``level`` is 5 or "Level 5"; MATH itself has no ``answer`` but a boxed one in ``solution``."""
    level = _optional(row, "level")
    subject = _optional(row, "subject", "type")
    return _text(row, "problem", "question"), _answer(row), level and level.removeprefix("Level "), subject


def _year(year: str) -> Callable[[Row], Parsed | None]:
    """AIME and AMC of a year: integer answers; collections of several years say so in ``year`` or ``url``."""

    def parse(row: Row) -> Parsed | None:
        named = _optional(row, "year", "Year") or next(iter(re.findall(r"\b(\d{4})_A[IM]", str(row.get("url")))), year)
        if named != year:
            return None
        answer = re.sub(r"\.0+$", "", _answer(row))
        if not re.fullmatch(r"-?\d+", answer):
            raise DataError(f"the answer {answer!r} is not an integer")
        return _text(row, "problem", "question", "Problem"), str(int(answer)), None, None

    return parse


def _minerva(row: Row) -> Parsed:
    """Minerva's OCW courses; ``type`` names the course where it is there."""
    return _text(row, "question", "problem"), _answer(row), None, _optional(row, "type")


def _olympiad(row: Row) -> Parsed:
    """OlympiadBench: ``final_answer`` is a list of texts in dollars; a ``context`` belongs before the question."""
    question = _text(row, "question", "problem")
    context = _optional(row, "context")
    return f"{context}\n{question}" if context else question, _answer(row), None, _optional(row, "subfield")


def _gsm8k(row: Row) -> Parsed:
    """GSM8K: a worked solution that ends in ``#### N``."""
    return _text(row, "question"), _answer(row), None, None


def _by_fields(fields: EvaluationFields) -> Callable[[Row], Parsed]:
    def parse(row: Row) -> Parsed:
        for setting, column in (("question", fields.question), ("answer", fields.answer)):
            if column not in row:
                raise DataError(f"{_missing(row, (column,))} (set fields.{setting})")
        answer = _gold(row[fields.answer])
        if not answer:
            raise DataError(f'no answer in "{fields.answer}"')
        level, subject = (None if name is None else _optional(row, name) for name in (fields.level, fields.subject))
        return _text(row, fields.question), answer, level, subject

    return parse


BENCHMARKS = {
    "math500": Benchmark(500, None, "test", _math),
    "aime24": Benchmark(30, None, "train", _year("2024")),
    "aime25": Benchmark(30, None, "test", _year("2025")),
    "amc23": Benchmark(40, None, "test", _year("2023")),
    "minerva": Benchmark(272, None, "test", _minerva),
    "olympiadbench": Benchmark(674, "OE_TO_maths_en_COMP", "train", _olympiad),
    "gsm8k": Benchmark(1319, "main", "test", _gsm8k),
}
"""The known benchmarks by their names in ``conf/evaluate.yaml``."""


# ---------------------------------------------------------------- cells


def _answer(row: Row) -> str:
    """The gold answer: a column of its own, or the last box of the worked solution."""
    for name in ("answer", "final_answer", "Answer"):
        if row.get(name) not in (None, "") and (answer := _gold(row[name])):
            return answer
    for name in ("solution", "Solution"):
        if isinstance(row.get(name), str) and (found := find_answer(row[name])).where == "box" and found.text:
            return found.text
    raise DataError(_missing(row, ("answer", "final_answer", "a boxed answer in solution")))


def _gold(value: Any) -> str:
    """A cell in the form that the verifier takes: 27.0 as 27, a list as its parts, without dollars and ``####``."""
    if isinstance(value, list | tuple):
        return ", ".join(part for part in map(_gold, value) if part)
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise DataError(f"the answer is {shorten(value)}, neither text nor a number")
    text = gold_answer(answer_text(value, "the answer"))
    bare = text[1:-1] if len(text) > 1 and text[0] == text[-1] == "$" else text
    return bare.strip() if "$" not in bare else text


def _text(row: Row, *names: str) -> str:
    """The text of the first of these columns that the row has."""
    for name in names:
        if row.get(name) is not None:
            if not isinstance(row[name], str) or not row[name].strip():
                raise DataError(f'"{name}" is {shorten(row[name])}, not text')
            return row[name].strip()
    raise DataError(_missing(row, names))


def _optional(row: Row, *names: str) -> str | None:
    return next((str(row[name]).strip() for name in names if row.get(name) not in (None, "")), None)


def _missing(row: Row, names: Iterable[str]) -> str:
    there = ", ".join(map(str, row)) or "no column at all"
    return f"none of {', '.join(names)}; there is {there}"


def _problem_id(question: str, answer: str) -> str:
    return hashlib.blake2b(repr((question, answer)).encode(), digest_size=12).hexdigest()
