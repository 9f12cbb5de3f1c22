"""What every reader gives: rows as plain values, a chunk at a time."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

CHUNK_ROWS = 1024
"""Most rows of one chunk."""


class Record(NamedTuple):
    """One row.

    Example: ``Record(1, {"question": "1 + 1?", "answer": "2"})``
    """

    number: int
    """Number of the line that it begins on in a file of lines (JSONL, csv), or of the row in any other, from 1."""
    value: Any
    """The row as plain values: mappings, lists, text, numbers."""
    problem: str = ""
    """Why it could not be read, in which case there is no value."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """Some rows one after the other. What takes time is left to ``read``: several processes walk along one source, and
    each reads chunks of its own."""

    read: Callable[[], list[Record]]
    """Its rows."""
    done: float
    """The part of the source that ends with it, from 0 to 1, as near as its reader can tell."""


def chunks_of(rows: Iterable[Record], done: Callable[[int], float]) -> Iterator[Chunk]:
    """Rows that are read already, or can only be read one after the other, as chunks.

    Args:
        done: number of rows so far -> part of the source.
    """
    remaining, count = iter(rows), 0
    while batch := list(itertools.islice(remaining, CHUNK_ROWS)):
        count += len(batch)
        yield Chunk(lambda batch=batch: batch, done(count))  # type: ignore[misc]  # each its own


def chunks_of_values(values: list[Any]) -> Iterator[Chunk]:
    """Rows that are numbered from 1, as chunks."""
    return chunks_of((Record(n, value) for n, value in enumerate(values, start=1)), lambda count: count / len(values))
