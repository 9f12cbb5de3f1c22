"""Parquet and Arrow files. pyarrow is imported for them alone."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from nemo_aapo.config.sources import Source
from nemo_aapo.data.formats.record import CHUNK_ROWS, Chunk, Record
from nemo_aapo.errors import DataError

_NARROW = {"halffloat": np.float16, "float": np.float32}
"""Types of numbers, by Arrow's names, that have fewer digits than Python's floats."""


def parquet_chunks(path: Path, source: Source) -> Iterator[Chunk]:
    """The rows of a Parquet file; of its columns those that the source names."""
    parquet = library("pyarrow.parquet", path)
    try:
        file = parquet.ParquetFile(path)
        wanted = {source.prompt_field.split(".")[0], source.answer_field.split(".")[0]}
        columns = sorted(wanted) if wanted <= set(file.schema_arrow.names) else None  # else a message will name all
        yield from _chunks(file.iter_batches(batch_size=CHUNK_ROWS, columns=columns), file.metadata.num_rows)
    except (OSError, ValueError) as error:  # pyarrow's errors are ValueErrors
        raise DataError(f"{path}: not a Parquet file that can be read: {error}") from error


def arrow_chunks(path: Path) -> Iterator[Chunk]:
    """The rows of an Arrow file, or of a stream of batches as the datasets library writes them."""
    pyarrow = library("pyarrow", path)
    try:
        with pyarrow.memory_map(str(path)) as file:
            try:
                reader = pyarrow.ipc.open_stream(file)
            except pyarrow.ArrowInvalid:
                whole = pyarrow.ipc.open_file(file)
                reader = [whole.get_batch(i) for i in range(whole.num_record_batches)]
            batches = list(reader)  # their data stay on the disk
            yield from _chunks(iter(batches), sum(batch.num_rows for batch in batches))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: not an Arrow file that can be read: {error}") from error


def _chunks(batches: Iterator[Any], rows: int) -> Iterator[Chunk]:
    start = 0
    for batch in batches:
        yield Chunk(functools.partial(_records, batch, start), (start + batch.num_rows) / max(rows, 1))
        start += batch.num_rows


def _records(batch: Any, start: int) -> list[Record]:
    """The rows of a batch; those whose text is not UTF-8, which nothing has checked so far, with their problem."""
    try:
        rows = (short_floats(row, batch.schema) for row in batch.to_pylist())
        return [Record(number, row) for number, row in enumerate(rows, start=start + 1)]
    except UnicodeDecodeError as error:
        if batch.num_rows == 1:
            return [Record(start + 1, None, f"not UTF-8: byte 0x{error.object[error.start]:02x}")]
        return [record for i in range(batch.num_rows) for record in _records(batch.slice(i, 1), start + i)]


def short_floats(value: Any, kind: Any) -> Any:
    """A plain value in which each narrow float is the shortest number that it stands for, 0.1 as 0.1.

    Args:
        value: a row, or what stands in one.
        kind: its Arrow type; a row's is the schema.
    """
    if value is None or "float" not in str(kind):  # a double has all digits
        return value
    if narrow := _NARROW.get(str(kind)):
        return float(str(narrow(value)))
    if isinstance(value, dict):
        return {**value, **{f.name: short_floats(value[f.name], f.type) for f in kind if f.name in value}}
    if inner := getattr(kind, "value_type", None):  # a list, or one of a dictionary's values
        return [short_floats(each, inner) for each in value] if isinstance(value, list) else short_floats(value, inner)
    return value


def library(name: str, what: object) -> Any:
    """A module of a library that one form needs.

    Raises:
        DataError: it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = name.partition(".")[0]
        raise DataError(f"{what}: reading this needs the package {package}: pip install {package} ({error})") from error
