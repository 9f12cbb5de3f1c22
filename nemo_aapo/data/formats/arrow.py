"""Parquet and Arrow files. pyarrow is imported for them alone."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nemo_aapo.config.sources import Source
from nemo_aapo.data.formats.record import CHUNK_ROWS, Chunk, Record
from nemo_aapo.errors import DataError


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
        yield Chunk(
            lambda batch=batch, start=start: [  # type: ignore[misc]
                Record(number, value) for number, value in enumerate(batch.to_pylist(), start=start + 1)
            ],
            (start + batch.num_rows) / rows,
        )
        start += batch.num_rows


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
