"""Rows of a data set as plain values: files of text, Parquet and Arrow, saved and published Hugging Face data sets.

pyarrow and datasets are imported for the sources that need them, and never run code that comes with the data.
"""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path

from nemo_aapo.config.sources import FILE_FORMATS, Source
from nemo_aapo.data.formats.arrow import arrow_chunks, parquet_chunks
from nemo_aapo.data.formats.csv_text import csv_chunks
from nemo_aapo.data.formats.files import form_of
from nemo_aapo.data.formats.hub import data_set_chunks, is_saved
from nemo_aapo.data.formats.json_text import json_chunks
from nemo_aapo.data.formats.record import Chunk, Record
from nemo_aapo.data.formats.splits import refuse_split
from nemo_aapo.errors import DataError
from nemo_aapo.utils.files import EMPTY

__all__ = ["Record", "check_source", "read_chunks", "read_records"]


def read_records(source: Source, default_splits: Sequence[str]) -> Iterator[Record]:
    """The rows of a source that is no reasoning-gym task.

    Args:
        default_splits: of several splits the first of these that there is, unless ``source.split`` names one.

    Raises:
        DataError: nothing there, another format than its name says, no such subset or split, the hub out of reach, or a
            library missing. Raised before the first row, or where a file is broken.
    """
    chunks = read_chunks(source, default_splits)
    return itertools.chain.from_iterable(chunk.read() for chunk in chunks)


def read_chunks(source: Source, default_splits: Sequence[str]) -> Iterator[Chunk]:
    """The same as chunks, for processes that share a source."""
    check_source(source)
    path = Path(source.path)
    if source.on_hub or path.is_dir():
        return data_set_chunks(source, default_splits)
    form = form_of(path)
    if form == ".parquet":
        return parquet_chunks(path, source)
    if form == ".arrow":
        return arrow_chunks(path)
    if form in (".csv", ".tsv"):
        return csv_chunks(path, source, "\t" if form == ".tsv" else ",")
    return json_chunks(path, source, default_splits)


def check_source(source: Source) -> None:
    """Refuse what the name of a source that is no reasoning-gym task tells, without reading it.

    Raises:
        DataError: an empty path, nothing there, a directory without a data set, a kind of file that is not read, a
            choice of what one file does not have.
    """
    if not source.path.strip():
        raise DataError(EMPTY)
    path = Path(source.path)
    if source.on_hub:
        return
    if not path.exists():
        raise DataError(_missing(path))
    if path.is_dir():
        _refuse_other_directory(path)
        return
    if source.subset is not None:
        raise DataError(f"{source.path}: this is one file, subset={source.subset} has no effect; leave it out")
    if form_of(path) != ".json":  # which may hold several arrays of rows
        refuse_split(source)


def _refuse_other_directory(path: Path) -> None:
    names = [entry.name.lower().removesuffix(".gz") for entry in itertools.chain(path.iterdir(), path.glob("*/*"))]
    if not is_saved(path) and not any(name.endswith(FILE_FORMATS) for name in names):
        raise DataError(f"{path}: this is a directory without a data set; name a file, such as a JSONL file, in it")


def _missing(path: Path) -> str:
    if not path.parent.is_dir():
        return f"{path}: no such file, as there is no directory {path.parent}"
    near = difflib.get_close_matches(path.name, [p.name for p in path.parent.iterdir()], n=1, cutoff=0.5)
    hint = f"did you mean {path.parent / near[0]}?" if near else f"nothing in {path.parent} has a name like it"
    return f"{path}: no such file; {hint}"
