"""The questions and gold answers in a data set's rows, each row checked by itself."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Sequence
from decimal import Decimal
from typing import Any, NamedTuple

from nemo_aapo.config.sources import AnswerForm, Source
from nemo_aapo.data.prepared.answers import AnswerCheck, VerifyAnswer
from nemo_aapo.data.records import Record, read_records
from nemo_aapo.errors import DataError
from nemo_aapo.text.answer import find_answer, is_missing
from nemo_aapo.utils.text import shorten

TRAIN_SPLITS = ("train",)
HELD_OUT_SPLITS = ("test", "validation")
_GOLD_MARK = "####"
_THOUSANDS_COMMA = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
_EXACT = 2**53
"""From here on a float does not hold every whole number."""
_ROLES = {"human": "user", "gpt": "assistant"}
"""Roles of chat messages by the names that some data sets have for them."""


class Row(NamedTuple):
    """One usable row.

    Example: ``Row(7, "What is 6 times 7?", "42")``
    """

    number: int
    """Number of the line or row in its source, from 1."""
    question: str
    """The user's message; of several, the last."""
    answer: str
    """The gold answer, in the form that a verifier takes."""
    before: tuple[dict[str, str], ...] = ()
    """Chat messages before the question, each with ``role`` and ``content``."""


class Rows(NamedTuple):
    """All rows of a source."""

    rows: list[Row]
    """The usable ones."""
    problems: dict[int, str]
    """What is wrong with each of the rows that can't be used, by their numbers."""


def read_rows(
    source: Source,
    default_splits: Sequence[str],
    *,
    verify_answer: VerifyAnswer | AnswerCheck | None = None,
) -> Rows:
    """The usable rows of a source, and what is wrong with the others.

    Args:
        default_splits: ``TRAIN_SPLITS`` or ``HELD_OUT_SPLITS``.
        verify_answer: raises ValueError for a gold answer that the rewards can't work with; asked once for each
            different answer.

    Raises:
        DataError: the source can't be read at all.
    """
    rows: list[Row] = []
    problems: dict[int, str] = {}
    for record in read_records(source, default_splits):
        try:
            rows.append(parse_row(record, source))
        except DataError as error:
            problems[record.number] = str(error)
    if verify_answer is None:
        return Rows(rows, problems)
    check = verify_answer if isinstance(verify_answer, AnswerCheck) else AnswerCheck(verify_answer)
    answers = dict.fromkeys(row.answer for row in rows)
    refused = check.refused(answers, len(answers))
    problems |= {row.number: refused[row.answer] for row in rows if row.answer in refused}
    return Rows([row for row in rows if row.answer not in refused], dict(sorted(problems.items())))


def parse_row(record: Record, source: Source) -> Row:
    """Question and gold answer of one row.

    Raises:
        DataError: what is wrong with it, without saying where it stands.
    """
    *before, question = parse_question(record, source.prompt_field)
    value = record.value
    answer = answer_text(_find(value, source.answer_field, "answer"), f'"{source.answer_field}"')
    return Row(record.number, question["content"], gold_answer(answer, source.answer_form), tuple(before))


def parse_question(record: Record, field: str) -> list[dict[str, str]]:
    """The chat messages of one row, the question last.

    Raises:
        DataError: what is wrong with it, without saying where it stands.
    """
    if record.problem:
        raise DataError(record.problem)
    value = record.value
    if not isinstance(value, dict) and not (isinstance(value, list) and field.split(".")[0].isdigit()):
        raise DataError(f"not a JSON object but {shorten(value)}")
    messages = _messages(_find(value, field, "prompt"), field)
    _refuse_missing(messages[-1]["content"], "prompt")
    return messages


def gold_answer(answer: str, form: AnswerForm = "auto") -> str:
    """The gold answer in a data set's answer field.

    GSM8K's answers are worked solutions that end in ``#### N``: the gold answer stands behind the last ``####``,
    and N loses its thousands commas. Any other answer is taken as it is, without white space around it. In the form
    ``"boxed"`` it is what the last ``\\boxed{}`` of a worked solution holds.

    Raises:
        DataError: nothing is there, or what stands for a missing value: ``nan``, ``None``, ``null``, ``N/A``.
    """
    gold = _last_box(answer) if form == "boxed" else _plain_answer(answer)
    _refuse_missing(gold, "answer")
    return gold


def _plain_answer(answer: str) -> str:
    _, mark, gold = answer.rpartition(_GOLD_MARK)
    gold = _THOUSANDS_COMMA.sub("", gold.strip()) if mark else answer.strip()
    if not gold:
        raise DataError(f'no answer: nothing stands behind the last "{_GOLD_MARK}"')
    return gold


def _last_box(solution: str) -> str:
    answer = find_answer(solution)
    if answer.where != "box":
        raise DataError("no answer: the worked solution has no \\boxed{}")
    if not answer.text:
        raise DataError("no answer: the worked solution's last \\boxed{} is empty, or has no end")
    return answer.text


# ---------------------------------------------------------------- fields

MISSING = object()
"""What ``lookup`` finds where there is nothing."""


def lookup(value: Any, path: str) -> Any:
    """What stands at a dotted path: keys of mappings, numbers (from 0, or from the end: -1) of lists; else ``MISSING``.

    >>> lookup({"prompt": [{"content": "1+1?"}]}, "prompt.0.content")
    '1+1?'
    """
    if isinstance(value, dict) and path in value:  # the name itself may hold dots
        return value[path]
    first, dot, rest = path.partition(".")
    if isinstance(value, dict) and first in value:
        inner = value[first]
    elif isinstance(value, list) and first.removeprefix("-").isdecimal() and -len(value) <= int(first) < len(value):
        inner = value[int(first)]
    else:
        return MISSING
    return lookup(inner, rest) if dot else inner


def _find(record: Any, path: str, what: str) -> Any:
    found = lookup(record, path)
    if found is MISSING:
        names = list(record) if isinstance(record, dict) else [str(i) for i in range(len(record))]
        names = [str(name)[:80] for name in names]
        near = difflib.get_close_matches(path, names, n=1, cutoff=0.8)  # "solution" is not what "question" meant
        hint = f'did you mean "{near[0]}"?' if near else f"there is {', '.join(map(repr, names)) or 'nothing'}"
        raise DataError(f'no {what}: the key "{path}" is missing; {hint[:500]} (set data.{what}_field)')
    return found


def answer_text(value: Any, name: str) -> str:
    """The text of an answer's cell; a whole number as one, whatever type its column has (27.0 as 27).

    Args:
        name: of the cell, for messages.

    Raises:
        DataError: it is neither text nor a number, is empty, or a float that can't hold the number it stands for.
    """
    if isinstance(value, float | Decimal):
        if not math.isfinite(value):
            raise DataError(f"no answer: {name} is {value!r}, which stands for a missing value")
        if isinstance(value, float) and abs(value) >= _EXACT:
            raise DataError(f"no answer: {name} is {value!r}; a float is not exact there: write it as text")
        value = str(int(value) if value == int(value) else value)
    elif isinstance(value, int) and not isinstance(value, bool):
        value = str(value)
    return _text(value, name, "answer")


def _refuse_missing(text: str, what: str) -> None:
    bare = text.strip()
    if is_missing(bare):
        raise DataError(f"no {what}: {bare!r} stands for a missing value")


def _text(value: Any, name: str, what: str, may_be_empty: bool = False) -> str:
    if not isinstance(value, str):
        raise DataError(f"no {what}: {name} is {shorten(value)}, not text")
    if not value.strip() and not may_be_empty:
        raise DataError(f"no {what}: {name} is empty")
    if not _is_unicode(value):
        raise DataError(f"{name} holds half of a surrogate pair, which no tokenizer takes")
    return value


def _messages(value: Any, field: str) -> list[dict[str, str]]:
    """A question as chat messages, the user's last."""
    if not (isinstance(value, list) and value and all(isinstance(message, dict) for message in value)):
        return [{"role": "user", "content": _text(value, f'"{field}"', "prompt")}]
    messages = []
    for number, message in enumerate(value, start=1):
        role = message.get("role", message.get("from"))
        content = message.get("content", message.get("value"))
        if not isinstance(role, str):
            raise DataError(f'no prompt: a message of "{field}" has no role: {shorten(message)}')
        text = _text(content, f'"{field}"', "prompt", may_be_empty=number < len(value))
        messages.append({"role": _ROLES.get(role, role), "content": text})
    if messages[-1]["role"] != "user":
        raise DataError(
            f"no prompt: the last message of \"{field}\" is the {messages[-1]['role'][:80]}'s, not the user's"
        )
    return messages


def _is_unicode(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
