"""The Arrow file of prepared prompts: its columns, and the prompts in it, made when they are asked for."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import mmap
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import numpy as np

from nemo_aapo.data.prompts import PromptSet
from nemo_aapo.types import Prompt
from nemo_aapo.utils.files import sync

MADE_OF = b"nemo_aapo"
"""Key of the schema's metadata under which the file says how it came about, as JSON."""
FORMAT = 1
"""Number of the columns' layout; part of every key."""
_READS = 32
"""Prompts that are read between two times that touched pages are let go; they hold at most some 60 MiB."""
_reads = itertools.count(1)


def row_schema() -> Any:
    """Columns of rows that were read and not rendered yet."""
    import pyarrow as pa

    text = pa.large_string()
    return pa.schema([("number", pa.int64()), ("question", text), ("answer", text), ("before", text)])


def prompt_schema() -> Any:
    """Columns of prompts: what a ``Prompt`` holds, its question, and as its place the source and the row in it."""
    import pyarrow as pa

    text = pa.large_string()
    return pa.schema(
        [
            ("id", pa.binary(16)),
            ("source", pa.int16()),
            ("number", pa.int64()),
            ("token_ids", pa.large_list(pa.int32())),
            ("text", text),
            ("answer", text),
            ("question", text),
        ]
    )


@functools.lru_cache(maxsize=8)
def open_table(path: Path) -> Any:
    """The file as a ``pyarrow.Table`` whose data stay on the disk; pages come into memory as they are touched.

    Raises:
        OSError, pyarrow.ArrowInvalid (a ValueError): it can't be read.
    """
    import pyarrow as pa

    return pa.ipc.open_file(pa.BufferReader(pa.py_buffer(_mapped(path)))).read_all()


@functools.lru_cache(maxsize=8)
def _mapped(path: Path) -> mmap.mmap:
    with path.open("rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def _let_go_of_pages(path: Path) -> None:
    """Count a prompt that was read, and now and then take the touched pages out of this process.

    The kernel maps some hundred kilobytes around each prompt, which would add up to the whole file. They stay in its
    cache as long as there is room, for all ranks of the node.
    """
    if next(_reads) % _READS == 0:
        _mapped(path).madvise(mmap.MADV_DONTNEED)


def is_whole(path: Path) -> bool:
    """Whether there is a file of this layout that can be opened."""
    try:
        return path.is_file() and made_of(path)["format"] == FORMAT
    except (OSError, ValueError, KeyError, TypeError):
        return False


def made_of(path: Path) -> dict[str, Any]:
    """What the file says of how it came about: counts, sizes, digest."""
    found: dict[str, Any] = json.loads((open_table(path).schema.metadata or {})[MADE_OF])
    return found


@dataclass(frozen=True, eq=False)
class _Rows:
    """Some rows of the file. Between processes only the path and the rows' numbers go."""

    path: Path
    rows: range | np.ndarray
    """Which of the file's rows, from 0: all, or int64 [N]."""

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def _table(self) -> Any:
        return open_table(self.path)


@dataclass(frozen=True, eq=False)
class PreparedPrompts(_Rows, Sequence[Prompt]):
    """The prompts of the file; a slice of them is one too.

    Raises:
        OSError, ValueError: on the first access, where this machine does not see the file.
    """

    sources: tuple[str, ...]
    """What the run calls the sources, for ``Prompt.source``: runs share the file that call them differently."""

    @overload
    def __getitem__(self, index: int) -> Prompt: ...
    @overload
    def __getitem__(self, index: slice) -> PreparedPrompts: ...
    def __getitem__(self, index: int | slice) -> Prompt | PreparedPrompts:
        if isinstance(index, slice):
            return self.take(self.rows[index])
        table, row = self._table, int(self.rows[index])
        place = f"{self.sources[table['source'][row].as_py()]}:{table['number'][row].as_py()}"
        tokens = table["token_ids"][row].values.to_numpy().copy()  # an array of its own, which torch may write to
        name, text, answer = (table[column][row].as_py() for column in ("id", "text", "answer"))
        _let_go_of_pages(self.path)
        return Prompt(name.hex(), tokens, text, answer, place)

    def take(self, rows: range | np.ndarray) -> PreparedPrompts:
        """Those of these rows of the file."""
        return PreparedPrompts(self.path, rows, self.sources)

    def ids(self) -> Iterator[str]:
        """The prompts' ids, without making the prompts."""
        column = self._table["id"].combine_chunks()
        raw = np.frombuffer(column.buffers()[1], "S16", len(column), column.offset * 16)
        return (raw[row : row + 1].tobytes().hex() for row in self.rows)


@dataclass(frozen=True, eq=False)
class PreparedQuestions(_Rows, Sequence[str]):
    """The user's message of each prompt, before any template."""

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> PreparedQuestions: ...
    def __getitem__(self, index: int | slice) -> str | PreparedQuestions:
        if isinstance(index, slice):
            return PreparedQuestions(self.path, self.rows[index])
        question: str = self._table["question"][int(self.rows[index])].as_py()
        return question


def copied_to(prompts: PromptSet, copy: Path) -> PromptSet:
    """Prepared prompts from a copy of their file, which is made unless it is there."""
    views, questions = prompts.prompts, prompts.questions
    assert isinstance(views, PreparedPrompts)
    assert isinstance(questions, PreparedQuestions)
    if not is_whole(copy):
        copy.parent.mkdir(parents=True, exist_ok=True)
        partial = copy.with_name(f".{copy.name}.partial")
        shutil.copyfile(views.path, partial)
        sync(partial)
        os.replace(partial, copy)
    return dataclasses.replace(
        prompts, prompts=PreparedPrompts(copy, views.rows, views.sources), questions=PreparedQuestions(copy, views.rows)
    )
