"""Data sets of the Hugging Face hub, copies of them, and those saved to disk, as the datasets library loads them."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from nemo_aapo.config.sources import Source
from nemo_aapo.data.formats.arrow import library, short_floats
from nemo_aapo.data.formats.record import CHUNK_ROWS, Chunk, Record
from nemo_aapo.data.formats.splits import choose_split
from nemo_aapo.errors import DataError, first_line

_OUT_OF_REACH = ("offline", "connect", "resolve", "reach", "timed out", "couldn't find")
"""Words of which the library's error holds one where the hub can't be reached."""
_SAVED = ("dataset_info.json", "dataset_dict.json")
"""Files of which a directory that ``save_to_disk`` made holds one."""


def is_saved(path: Path) -> bool:
    """Whether a directory was made by ``save_to_disk``."""
    return any((path / name).exists() for name in _SAVED)


def data_set(source: Source, default_splits: Sequence[str]) -> Any:
    """The split of a data set that a source names: a ``datasets.Dataset``, whose rows stay on the disk."""
    path = Path(source.path)
    datasets = library("datasets", source.path)
    if source.on_hub:
        return _chosen(_loaded(datasets, source, source.path), source, default_splits)
    if not is_saved(path):
        return _chosen(_loaded(datasets, source, str(path)), source, default_splits)
    if source.subset is not None:
        raise DataError(f"{path}: a saved data set has no subsets; subset={source.subset} has no effect")
    try:
        loaded = datasets.load_from_disk(str(path))
    except Exception as error:  # whatever a damaged directory makes it raise
        raise DataError(f"{path}: not a saved data set that can be loaded: {first_line(error)[:300]}") from error
    return _chosen(loaded, source, default_splits)


def data_set_chunks(source: Source, default_splits: Sequence[str]) -> Iterator[Chunk]:
    """The rows of a data set."""
    rows = data_set(source, default_splits).with_format(None)  # or it gives another library's numbers, if it was set to
    schema = rows.features.arrow_schema
    for start in range(0, len(rows), CHUNK_ROWS):
        stop = min(start + CHUNK_ROWS, len(rows))
        yield Chunk(
            lambda start=start, stop=stop: [  # type: ignore[misc]
                Record(number, short_floats(value, schema))
                for number, value in enumerate(rows.select(range(start, stop)), start=start + 1)
            ],
            stop / len(rows),
        )


def _loaded(datasets: Any, source: Source, where: str) -> Any:
    try:
        builder = datasets.load_dataset_builder(where, name=source.subset)
        is_csv = type(builder.config).__name__ == "CsvConfig"
        return datasets.load_dataset(where, name=source.subset, **(_cells_as_text(builder, source) if is_csv else {}))
    except Exception as error:  # of the library, its HTTP clients and file systems: no common base
        raise DataError(f"{where}: {_hint(source, error)}: {first_line(error)[:300]}") from error


def _cells_as_text(builder: Any, source: Source) -> dict[str, Any]:
    """What keeps pandas from guessing types, by which 007 becomes 7, and 27 in a column with a hole 27.0."""
    names = {source.prompt_field, source.answer_field}
    file = Path(next(iter(builder.config.data_files.values()))[0])
    if file.is_file() and not file.name.endswith(".gz"):
        with file.open(newline="", encoding="utf-8-sig") as text:
            names |= set(next(csv.reader(text, delimiter=builder.config.sep), []))
    return {"na_filter": False, "converters": {name: str for name in sorted(names) if name}}


def _hint(source: Source, error: Exception) -> str:
    text = f"{type(error).__name__} {error}".lower()
    if "config name" in text or "builderconfig" in text:
        return "name its subset, as in data.train=[{path: ..., subset: main}]"
    if source.on_hub and any(sign in text for sign in _OUT_OF_REACH):
        return (
            "no such file here, and as a data set of the Hugging Face hub it can't be had (is this machine offline?). "
            "Download it elsewhere and name the local copy"
        )
    return "the datasets library can't load it"


def _chosen(loaded: Any, source: Source, default_splits: Sequence[str]) -> Any:
    if isinstance(loaded, dict):
        return choose_split(loaded, source, default_splits)
    if source.split is not None and source.split != str(loaded.split):  # one data set
        raise DataError(f"{source.path}: it has no splits; split={source.split} has no effect; leave it out")
    return loaded
