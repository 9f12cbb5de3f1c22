"""csv and tsv: every cell stays the text that it is, so that 007, 27 and 9007199254740993 are what the file says."""

from __future__ import annotations

import csv
import io
import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from nemo_aapo.config.sources import Source
from nemo_aapo.data.formats.files import TextFile, foreign_byte
from nemo_aapo.data.formats.record import Chunk, Record, chunks_of
from nemo_aapo.errors import DataError
from nemo_aapo.utils.text import shorten

_LONGEST_CELL = 2**31 - 1
_OTHER_SEPARATORS = {";": "semicolons", "\t": "tabs", ",": "commas", "|": "bars"}


def csv_chunks(path: Path, source: Source, separator: str) -> Iterator[Chunk]:
    """The rows of a table of text, as mappings of the names in its first line; or as lists, where the fields are
    numbers (from 0) that no column is called by. Quotes may hold separators, line ends and doubled quotes.

    Args:
        separator: between two cells.

    Raises:
        DataError: a name stands twice, or something else stands between the cells.
    """
    csv.field_size_limit(_LONGEST_CELL)  # 128 KiB by default
    with TextFile(path) as file:
        # A byte that is no UTF-8 becomes a lone surrogate, which marks its row.
        text = io.TextIOWrapper(file.stream, encoding="utf-8-sig", errors="surrogateescape", newline="")
        rows = _rows(csv.reader(text, delimiter=separator, strict=True))
        first = next(rows, None)
        if first is None:
            return
        if first.problem:
            raise DataError(f"{path}:{first.number}: {first.problem}")
        if _has_no_header(first.value, source):
            yield from chunks_of(itertools.chain([first], rows), lambda _: file.done())
            return
        _check_header(path, first, separator)
        yield from chunks_of((_named(row, first.value) for row in rows), lambda _: file.done())


def _rows(reader: Any) -> Iterator[Record]:
    """Rows of cells, each with the line that it begins on; blank lines are left out."""
    while True:
        number = reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            unclosed = "unexpected end of data" in str(error)
            yield Record(number, None, "a quote opens here that nothing closes" if unclosed else f"not csv: {error}")
            continue
        if cells:
            yield _checked(number, cells)


def _checked(number: int, cells: list[str]) -> Record:
    for i, cell in enumerate(cells, start=1):
        if wrong := foreign_byte(cell):
            return Record(number, None, f"not UTF-8: {wrong} in column {i}; save it as UTF-8")
    return Record(number, cells)


def _has_no_header(first: Sequence[str], source: Source) -> bool:
    fields = [field.split(".")[0] for field in (source.prompt_field, source.answer_field)]
    has_names = set(fields) <= set(first) and all(name.isdigit() or not name for name in first)
    return all(field.isdigit() for field in fields) and not has_names


def _check_header(path: Path, first: Record, separator: str) -> None:
    header = [name.strip() for name in first.value]
    where = f"{path}:{first.number}"
    twice = [name for name, count in Counter(filter(None, header)).items() if count > 1]
    if twice:
        raise DataError(
            f"{where}: more than one column is called {', '.join(map(shorten, twice[:3]))}; rename all but one"
        )
    others = [name for sign, name in _OTHER_SEPARATORS.items() if sign != separator and sign in header[0]]
    if len(header) == 1 and others:
        raise DataError(
            f"{where}: there is one column, {shorten(header[0])}: {others[0]} stand between the cells, where a "
            f"{path.name.removesuffix('.gz')[-4:]} file has {_OTHER_SEPARATORS[separator]}; save it so"
        )


def _named(row: Record, header: Sequence[str]) -> Record:
    if row.problem:
        return row
    if len(row.value) != len(header):
        return Record(row.number, None, f"not as the header: {len(row.value)} cells for {len(header)} columns")
    return Record(row.number, dict(zip((name.strip() for name in header), row.value, strict=True)))
