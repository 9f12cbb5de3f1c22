"""How rows become prepared prompts, stage by stage; each process of a stage has every N-th chunk of the rows.

read      a source -> its rows, what is wrong with the others, the different gold answers
select    which rows are left: those whose gold answer was not refused, each once
render    the rows left -> texts, token ids, prompt ids
join      the prompts of all sources, each once, in the order of the rows, as one file
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from nemo_aapo.config.sources import Source
from nemo_aapo.data.prepared.table import FORMAT, MADE_OF, prompt_schema, row_schema
from nemo_aapo.data.prompts import Problems, digest_of, prompt_digest, too_long
from nemo_aapo.data.records import read_chunks
from nemo_aapo.data.rows import Row, parse_row
from nemo_aapo.data.tokenizer import render_prompts
from nemo_aapo.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_FILE_ROWS = 8192
"""Rows of one batch of the finished file, at least."""

Tell = Callable[[float], None]
"""Told the part that is done, from 0 to 1."""


@dataclass(frozen=True)
class Share:
    """Which chunks a process has: ``chunks[number::of]``."""

    number: int
    of: int


@dataclass
class ReadShare:
    """What one process read of a source; the rows themselves are in its file."""

    sizes: list[int]
    """Number of usable rows of each of its chunks."""
    keys: np.ndarray
    """S16 [N]: a digest of question and answer of each of its rows."""
    problems: Problems
    answers: set[str]
    """The different gold answers."""


@dataclass
class RenderedShare:
    """What one process rendered of a source; the prompts themselves are in its file, those that are too long not."""

    sizes: list[int]
    """Number of prompts of each of its chunks."""
    ids: np.ndarray
    """S16 [N]."""
    rendered: int
    """Number of prompts, with those that are too long."""
    too_long: Problems


def read_share(source: Source, default_splits: Sequence[str], share: Share, file: Path, tell: Tell) -> ReadShare:
    """Read a process's chunks of a source, and write their rows to a file, a batch for each chunk."""
    import pyarrow as pa

    found, keys = ReadShare([], np.empty(0), Problems(), set()), []
    with pa.ipc.new_file(str(file), row_schema()) as writer:
        for chunk in islice(_readable(source, default_splits), share.number, None, share.of):
            rows = []
            for record in chunk.read():
                try:
                    rows.append(parse_row(record, source))
                except DataError as error:
                    found.problems.add(record.number, str(error))
            columns = [(row.number, row.question, row.answer, _packed(row.before)) for row in rows]
            writer.write_batch(_batch(columns, row_schema()))
            keys += [hashlib.blake2b(repr(column[1:]).encode(), digest_size=16).digest() for column in columns]
            found.sizes.append(len(rows))
            found.answers.update(row.answer for row in rows)
            tell(chunk.done)
    found.keys = np.array(keys, "S16")
    return found


def _readable(source: Source, default_splits: Sequence[str]) -> Iterator[Any]:
    try:
        yield from read_chunks(source, default_splits)
    except OSError as error:  # not to be taken for one of the cache's
        raise DataError(f"{source.path}: can't be read: {error}") from error


class Place(NamedTuple):
    """Where a chunk is: in whose file, as which batch, and which of all rows of that file."""

    share: int
    batch: int
    rows: slice


def places_of(sizes: Sequence[Sequence[int]]) -> list[Place]:
    """The chunks of a source in their order.

    Args:
        sizes: number of rows of each chunk of each process.
    """
    chunks = sum(len(own) for own in sizes)
    starts = [np.concatenate([[0], np.cumsum(own)]).astype(int) for own in sizes]
    turns = [divmod(chunk, len(sizes)) for chunk in range(chunks)]
    return [Place(k, i, slice(starts[k][i], starts[k][i + 1])) for i, k in turns]


def first_of_each(keys: np.ndarray) -> np.ndarray:
    """bool [N]: True where a key stands for the first time."""
    first = np.zeros(len(keys), bool)
    first[np.unique(keys, return_index=True)[1]] = True
    return first


def select_rows(
    files: Sequence[Path], read: Sequence[ReadShare], refused: Mapping[str, str]
) -> tuple[list[np.ndarray], Problems]:
    """Which rows of each process's file are left, bool [N] each, and the rows whose gold answer was refused.

    A row is left out if its answer is one of ``refused``, or if an earlier row has its question and answer.
    """
    problems = Problems()
    fine = [np.ones(len(share.keys), bool) for share in read]
    places = places_of([share.sizes for share in read])
    for place in places if refused else ():
        batch = open_batches(files[place.share]).get_batch(place.batch)
        for row, answer in enumerate(batch["answer"].to_pylist()):
            if answer in refused:
                fine[place.share][place.rows.start + row] = False
                problems.add(batch["number"][row].as_py(), refused[answer])
    in_order = [read[place.share].keys[place.rows] for place in places]
    first = first_of_each(np.concatenate([np.empty(0, "S16"), *in_order]))
    start = 0
    for place in places:
        size = place.rows.stop - place.rows.start
        fine[place.share][place.rows] &= first[start : start + size]
        start += size
    return fine, problems


def render_share(
    rows: Path,
    left: np.ndarray,
    source: int,
    tokenizer: PreTrainedTokenizerBase,
    rendering: Mapping[str, Any],
    max_prompt_tokens: int,
    file: Path,
    tell: Tell,
) -> RenderedShare:
    """Render a process's rows, and write the prompts to a file, a batch for each chunk.

    Args:
        rows: the file of its rows.
        left: bool [N], which of them.
        source: number of their source.
        rendering: arguments of ``render_prompts``.
    """
    import pyarrow as pa

    found, ids, start = RenderedShare([], np.empty(0), 0, Problems()), [], 0
    batches = open_batches(rows)
    with pa.ipc.new_file(str(file), prompt_schema()) as writer:
        for i in range(batches.num_record_batches):
            batch = batches.get_batch(i)
            chosen = batch.filter(pa.array(left[start : start + batch.num_rows])).to_pylist()
            start += batch.num_rows
            unpacked = [Row(row["number"], row["question"], row["answer"], _unpacked(row["before"])) for row in chosen]
            prompts = _render(unpacked, source, tokenizer, rendering, max_prompt_tokens, found)
            writer.write_batch(_batch(prompts, prompt_schema()))
            found.sizes.append(len(prompts))
            ids += [prompt[0] for prompt in prompts]
            tell((i + 1) / batches.num_record_batches)
    found.ids = np.array(ids, "S16")
    return found


def _render(
    rows: Sequence[Row],
    source: int,
    tokenizer: PreTrainedTokenizerBase,
    rendering: Mapping[str, Any],
    max_prompt_tokens: int,
    found: RenderedShare,
) -> list[tuple[Any, ...]]:
    """The columns of the prompts of some rows."""
    if not rows:
        return []
    questions, before = [row.question for row in rows], [row.before for row in rows]
    texts, ids = render_prompts(tokenizer, questions, before=before, **rendering)
    prompts = []
    found.rendered += len(rows)
    for row, text, tokens in zip(rows, texts, ids, strict=True):
        if len(tokens) > max_prompt_tokens:
            found.too_long.add(row.number, too_long(len(tokens), max_prompt_tokens))
        else:
            key = bytes.fromhex(prompt_digest(tokens, row.answer))
            prompts.append((key, source, row.number, tokens, text, row.answer, row.question))
    return prompts


@dataclass
class Rendered:
    """What all processes rendered of one source."""

    files: list[Path]
    """Each process's."""
    shares: list[RenderedShare]

    def batches(self) -> Iterator[tuple[Any, np.ndarray]]:
        """The chunks in their order, each with its ids."""
        for place in places_of([share.sizes for share in self.shares]):
            yield open_batches(self.files[place.share]).get_batch(place.batch), self.shares[place.share].ids[place.rows]


def join_prompts(sources: Sequence[Rendered], facts: Mapping[str, Any], file: Path, tell: Tell) -> None:
    """Write the prompts of all sources to one file: the first of each id, in the order of the rows.

    Args:
        facts: what the file says of itself besides ``sizes`` (of each source, what it adds to those before it) and
            ``digest`` (of all ids, ``prompts.digest_of``).
    """
    import pyarrow as pa

    by_source = [np.concatenate([np.empty(0, "S16"), *(ids for _, ids in source.batches())]) for source in sources]
    first = np.split(first_of_each(np.concatenate(by_source)), np.cumsum([len(ids) for ids in by_source])[:-1])
    kept = b"".join(ids[left].tobytes() for ids, left in zip(by_source, first, strict=True))
    digest = digest_of(kept[i : i + 16].hex() for i in range(0, len(kept), 16))
    said = {**facts, "format": FORMAT, "sizes": [int(left.sum()) for left in first], "digest": digest}
    schema = prompt_schema().with_metadata({MADE_OF: json.dumps(said)})
    waiting: list[Any] = []
    with pa.ipc.new_file(str(file), schema) as writer:
        for number, (source, left) in enumerate(zip(sources, first, strict=True)):
            start = 0
            for batch, ids in source.batches():
                waiting.append(batch.filter(pa.array(left[start : start + len(ids)])))
                start += len(ids)
                if sum(part.num_rows for part in waiting) >= _FILE_ROWS:
                    writer.write_batch(pa.concat_batches(waiting))
                    waiting = []
                    tell((number + start / len(left)) / len(sources))
        if waiting:
            writer.write_batch(pa.concat_batches(waiting))


@functools.lru_cache(maxsize=256)
def open_batches(file: Path) -> Any:
    """A process's file, to be read by batch."""
    import pyarrow as pa

    return pa.ipc.open_file(pa.memory_map(str(file)))


def _batch(rows: Sequence[Sequence[Any]], schema: Any) -> Any:
    """Rows as a batch of these columns."""
    import pyarrow as pa

    columns = list(zip(*rows, strict=True)) or [()] * len(schema)
    return pa.record_batch([pa.array(c, type=f.type) for c, f in zip(columns, schema, strict=True)], schema=schema)


def _packed(before: Sequence[dict[str, str]]) -> str:
    return json.dumps(before) if before else ""


def _unpacked(before: str) -> tuple[dict[str, str], ...]:
    return tuple(json.loads(before)) if before else ()
