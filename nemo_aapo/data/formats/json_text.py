"""JSON: an object a line, objects printed over several lines, an array of rows, or an object around the rows."""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from nemo_aapo.config.sources import Source
from nemo_aapo.data.formats.files import TextFile, foreign_byte
from nemo_aapo.data.formats.record import CHUNK_ROWS, Chunk, Record, chunks_of, chunks_of_values
from nemo_aapo.data.formats.splits import choose_split, refuse_split
from nemo_aapo.errors import DataError

_WHITE = re.compile(r"\s*")
_NEXT_OBJECT = re.compile(r"^\{", re.MULTILINE)


def json_chunks(path: Path, source: Source, default_splits: Sequence[str]) -> Iterator[Chunk]:
    """The rows of a file of JSON. What can't be read of it is a ``Record`` with a problem.

    Raises:
        DataError: a document that is not JSON; several lists of rows in one object, and no split that names one.
    """
    if not _begins_with_lines(path) and (found := _document(path)):
        yield from _document_chunks(path, found, source, default_splits)
        return
    refuse_split(source)
    with TextFile(path) as file:
        lines = _numbered(file)
        while batch := list(itertools.islice(lines, CHUNK_ROWS)):
            yield Chunk(lambda batch=batch: [_line(n, line) for n, line in batch], file.done())  # type: ignore[misc]


def _begins_with_lines(path: Path) -> bool:
    """Whether the first line is a whole value, and not the only line; or is damaged, and the second one is whole."""
    with TextFile(path) as file:
        lines = [line.decode("utf-8", "surrogateescape") for _, line in itertools.islice(_numbered(file), 2)]
    if len(lines) < 2:
        return not lines
    first, second = lines[0], lines[1].lstrip()
    return _is_json(first) or (_is_json(second) and _fails_at(first + second) <= len(first))


def _fails_at(text: str) -> float:
    """The character at which a text stops being the beginning of one value."""
    try:
        json.loads(text)
    except json.JSONDecodeError as error:
        return error.pos
    except RecursionError:
        pass
    return math.inf


def _numbered(file: TextFile) -> Iterator[tuple[int, bytes]]:
    return ((n, line) for n, line in file.lines if line.strip())


def _line(number: int, line: bytes) -> Record:
    try:
        return Record(number, json.loads(line.decode("utf-8")))
    except UnicodeDecodeError as error:
        return Record(number, None, f"not UTF-8: byte 0x{line[error.start]:02x} at column {error.start + 1}")
    except (ValueError, RecursionError) as error:
        return Record(number, None, f"not JSON: {error}")


# ---------------------------------------------------------------- documents


def _document(path: Path) -> list[Record]:
    """The values of a file that is one value, or whose first one is printed over several lines; else none.

    Raises:
        DataError: the first value begins so and is no JSON, nor is the second line.
    """
    with TextFile(path) as file:
        text = b"".join(line for _, line in file.lines).decode("utf-8", "surrogateescape")
    start = len(text) - len(text.lstrip())
    try:
        _, end = json.JSONDecoder().raw_decode(text, start)
    except (ValueError, RecursionError) as error:
        end = error.pos if isinstance(error, json.JSONDecodeError) else start
        if "\n" in text[start:end].rstrip() and not _is_json(text[start:].split("\n", 2)[1]):
            raise DataError(f"{path}:{text.count(chr(10), 0, end) + 1}: not JSON: {error}") from None
        return []
    return list(_values(text)) if "\n" in text[start:end] or not text[end:].strip() else []


def _is_json(line: str) -> bool:
    return not _line(0, line.encode("utf-8", "surrogateescape")).problem


def _document_chunks(path: Path, found: list[Record], source: Source, default_splits: Sequence[str]) -> Iterator[Chunk]:
    if len(found) > 1:
        refuse_split(source)
        return chunks_of(found, lambda count: count / len(found))
    if found[0].problem:
        raise DataError(f"{path}:{found[0].number}: {found[0].problem}")
    return chunks_of_values(rows_in(found[0].value, source, default_splits))


def _values(text: str) -> Iterator[Record]:
    """The values that follow each other in a text, each with the line that it begins on. After what is not JSON the
    next one is an object that begins a line."""
    decoder, end, line, counted = json.JSONDecoder(), 0, 1, 0
    while (start := _WHITE.match(text, end).end()) < len(text):  # type: ignore[union-attr]  # always matches
        line, counted = line + text.count("\n", counted, start), start
        try:
            value, end = decoder.raw_decode(text, start)
            wrong = foreign_byte(text[start:end])
            yield Record(line, None, f"not UTF-8: {wrong}; save it as UTF-8") if wrong else Record(line, value)
        except (ValueError, RecursionError) as error:
            yield Record(line, None, f"not JSON: {error}")
            following = _NEXT_OBJECT.search(text, start + 1)
            end = following.start() if following else len(text)


def rows_in(value: Any, source: Source, default_splits: Sequence[str]) -> list[Any]:
    """The rows of a file that holds one value of JSON: an array of them, a list for each column, or an object around
    one array or several, of which the split names one. Any other object is a row itself.

    >>> rows_in({"version": 1, "data": [{"question": "1+1?", "answer": "2"}]}, Source("rows.json"), ())
    [{'question': '1+1?', 'answer': '2'}]
    """
    question, answer = (field.split(".")[0] for field in (source.prompt_field, source.answer_field))
    is_object = isinstance(value, dict) and bool(value)
    if is_object and question not in value and (arrays := {k: rows for k, rows in value.items() if _are_rows(rows)}):
        return list(choose_split(arrays, source, default_splits))
    refuse_split(source)
    if isinstance(value, list):
        is_row = question.isdigit() and not all(isinstance(row, list) for row in value)
        return [value] if is_row else value
    if not is_object:
        return [value]
    fields = [value.get(question), value.get(answer)] if question in value else list(value.values())
    return _transposed(value) if _are_columns(fields) else [value]


def _are_rows(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(row, dict | list) for row in value)


def _are_columns(values: list[Any]) -> bool:
    return all(isinstance(column, list) for column in values) and len({len(column) for column in values}) == 1


def _transposed(columns: dict[str, Any]) -> list[Any]:
    longest = max(len(column) for column in columns.values() if isinstance(column, list))
    whole = {name: column for name, column in columns.items() if isinstance(column, list) and len(column) == longest}
    return [dict(zip(whole, row, strict=True)) for row in zip(*whole.values(), strict=True)]
