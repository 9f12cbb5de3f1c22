"""Rows of a data set as plain values: JSONL and JSON files, Parquet, Arrow, saved and published Hugging Face data sets.

pyarrow and datasets are imported for the sources that need them, and never run code that comes with the data.
"""

from __future__ import annotations

import difflib
import importlib
import itertools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from nemo_aapo.config.sources import FILE_FORMATS, Source
from nemo_aapo.errors import DataError, first_line

_BATCH_ROWS = 1024
_OUT_OF_REACH = ("offline", "connect", "resolve", "reach", "timed out", "couldn't find")
"""Words of which the library's error holds one where the hub can't be reached."""
_SAVED = ("dataset_info.json", "dataset_dict.json")
"""Files of which a directory that ``save_to_disk`` made holds one."""


class Record(NamedTuple):
    """One row.

    Example: ``Record(1, {"question": "1 + 1?", "answer": "2"})``
    """

    number: int
    """Number of the line in a text file, or of the row in any other, from 1."""
    value: Any
    """The row as plain values: mappings, lists, text, numbers."""
    problem: str = ""
    """Why it could not be read, in which case there is no value."""


def read_records(source: Source, default_splits: Sequence[str]) -> Iterator[Record]:
    """The rows of a source that is no reasoning-gym task.

    Args:
        default_splits: of several splits the first of these that there is, unless ``source.split`` names one.

    Raises:
        DataError: nothing there, another format than its name says, no such subset or split, the hub out of reach, or a
            library missing. Raised before the first row, or where a file is broken.
    """
    path = Path(source.path).expanduser()
    check_source(source)
    if source.on_hub:
        return _rows(_from_hub(source, default_splits))
    if path.is_dir():
        return _rows(_from_directory(path, source, default_splits))
    if path.suffix == ".parquet":
        return _rows(_from_parquet(path, source))
    if path.suffix == ".arrow":
        return _rows(_from_arrow(path))
    return _from_text(path)


def check_source(source: Source) -> None:
    """Refuse what the name of a source that is no reasoning-gym task tells, without reading it.

    Raises:
        DataError: nothing there, a directory without a data set, a choice of what one file does not have.
    """
    path = Path(source.path).expanduser()
    if source.on_hub:
        return
    if not path.exists():
        raise DataError(_missing(path))
    if path.is_dir():
        _refuse_other_directory(path)
    else:
        _refuse_choice(source)


def _refuse_other_directory(path: Path) -> None:
    files = itertools.chain(path.iterdir(), path.glob("*/*"))
    if not _is_saved(path) and not any(entry.suffix in FILE_FORMATS for entry in files):
        raise DataError(f"{path}: this is a directory without a data set; name a file, such as a JSONL file, in it")


def _is_saved(path: Path) -> bool:
    return any((path / name).exists() for name in _SAVED)


def _missing(path: Path) -> str:
    if not path.parent.is_dir():
        return f"{path}: no such file, as there is no directory {path.parent}"
    near = difflib.get_close_matches(path.name, [p.name for p in path.parent.iterdir()], n=1, cutoff=0.5)
    hint = f"did you mean {path.parent / near[0]}?" if near else f"nothing in {path.parent} has a name like it"
    return f"{path}: no such file; {hint}"


def _refuse_choice(source: Source) -> None:
    for key in ("subset", "split"):
        if getattr(source, key) is not None:
            raise DataError(
                f"{source.path}: this is one file, {key}={getattr(source, key)} has no effect; leave it out"
            )


def _rows(values: Iterator[Any]) -> Iterator[Record]:
    return (Record(number, value) for number, value in enumerate(values, start=1))


# ---------------------------------------------------------------- text


def _from_text(path: Path) -> Iterator[Record]:
    """Lines of JSON; or, in a ``.json`` file, one array of rows."""
    content = path.read_bytes().removeprefix(b"\xef\xbb\xbf")
    if path.suffix == ".json" and content.lstrip()[:1] == b"[":
        try:
            return _rows(iter(json.loads(content)))
        except (ValueError, RecursionError) as error:
            if b"\n" not in content.strip():
                raise DataError(f"{path}: not JSON: {error}") from None
    return (_parse(n, line) for n, line in enumerate(content.split(b"\n"), start=1) if line.strip())


def _parse(number: int, line: bytes) -> Record:
    try:
        return Record(number, json.loads(line.decode("utf-8")))
    except UnicodeDecodeError as error:
        return Record(number, None, f"not UTF-8: byte 0x{line[error.start]:02x} at column {error.start + 1}")
    except (ValueError, RecursionError) as error:
        return Record(number, None, f"not JSON: {error}")


# ---------------------------------------------------------------- Arrow


def _from_parquet(path: Path, source: Source) -> Iterator[Any]:
    parquet = _library("pyarrow.parquet", path)
    try:
        file = parquet.ParquetFile(path)
        wanted = {source.prompt_field.split(".")[0], source.answer_field.split(".")[0]}
        columns = sorted(wanted) if wanted <= set(file.schema_arrow.names) else None  # else a message will name all
        for batch in file.iter_batches(batch_size=_BATCH_ROWS, columns=columns):
            yield from batch.to_pylist()
    except (OSError, ValueError) as error:  # pyarrow's errors are ValueErrors
        raise DataError(f"{path}: not a Parquet file that can be read: {error}") from error


def _from_arrow(path: Path) -> Iterator[Any]:
    """An Arrow file, or a stream of batches as the datasets library writes them."""
    pyarrow = _library("pyarrow", path)
    try:
        with pyarrow.memory_map(str(path)) as file:
            try:
                reader = pyarrow.ipc.open_stream(file)
            except pyarrow.ArrowInvalid:
                whole = pyarrow.ipc.open_file(file)
                reader = (whole.get_batch(i) for i in range(whole.num_record_batches))
            for batch in reader:
                yield from batch.to_pylist()
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: not an Arrow file that can be read: {error}") from error


# ---------------------------------------------------------------- data sets


def _from_directory(path: Path, source: Source, default_splits: Sequence[str]) -> Iterator[Any]:
    """A data set that was saved to disk, or a copy of one from the hub."""
    datasets = _library("datasets", path)
    if _is_saved(path):
        if source.subset is not None:
            raise DataError(f"{path}: a saved data set has no subsets; subset={source.subset} has no effect")
        try:
            loaded = datasets.load_from_disk(str(path))
        except Exception as error:  # whatever a damaged directory makes it raise
            raise DataError(f"{path}: not a saved data set that can be loaded: {first_line(error)[:300]}") from error
        return iter(_choose_split(loaded, source, default_splits))
    return iter(_choose_split(_load_dataset(datasets, source, str(path)), source, default_splits))


def _from_hub(source: Source, default_splits: Sequence[str]) -> Iterator[Any]:
    return iter(
        _choose_split(_load_dataset(_library("datasets", source.path), source, source.path), source, default_splits)
    )


def _load_dataset(datasets: Any, source: Source, where: str) -> Any:
    try:
        return datasets.load_dataset(where, name=source.subset)
    except Exception as error:  # of the library, its HTTP clients and file systems: no common base
        raise DataError(f"{where}: {_hint(source, error)}: {first_line(error)[:300]}") from error


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


def _choose_split(loaded: Any, source: Source, default_splits: Sequence[str]) -> Any:
    if not isinstance(loaded, dict):  # one data set
        if source.split is not None and source.split != str(loaded.split):
            raise DataError(f"{source.path}: it has no splits; split={source.split} has no effect; leave it out")
        return loaded
    wanted = [source.split] if source.split is not None else list(default_splits)
    for split in wanted:
        if split in loaded:
            return loaded[split]
    if source.split is None and len(loaded) == 1:
        return next(iter(loaded.values()))
    raise DataError(
        f"{source.path}: there is no split {' or '.join(wanted)}; there is {', '.join(loaded)}: name one, as in "
        f"[{{path: {source.path}, split: {next(iter(loaded), 'train')}}}]"
    )


def _library(name: str, what: object) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = name.partition(".")[0]
        raise DataError(f"{what}: reading this needs the package {package}: pip install {package} ({error})") from error
