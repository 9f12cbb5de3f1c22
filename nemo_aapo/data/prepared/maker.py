"""``python -m nemo_aapo.data.prepared.maker FD``: prepares prompts beside the trainer, in processes that it forks.

The trainer has torch's and gloo's threads and must not fork; this process has none. It answers requests on the
connection FD, (name of a method of ``Maker``, arguments), by ("done", part)* and ("result", value) or ("error",
exception). It ends, and all that it forked, when the trainer closes the connection or dies.
"""

from __future__ import annotations

import contextlib
import gc
import json
import multiprocessing
import os
import pickle
import signal
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from nemo_aapo.config.sources import Source
from nemo_aapo.data.contamination import HeldOut
from nemo_aapo.data.prepared import stages
from nemo_aapo.data.prepared.stages import ReadShare, Rendered, RenderedShare, Share, Tell
from nemo_aapo.data.prepared.table import open_table
from nemo_aapo.data.prompts import Problems
from nemo_aapo.errors import ConfigError, RunError
from nemo_aapo.utils.files import write_atomic

T = TypeVar("T")
ANSWERS = "answers.jsonl"
"""File with the different gold answers, one a line."""


class Maker:
    """What it does for the trainer, in this order; files go into one folder."""

    def __init__(self, trainer: Connection, folder: Path, processes: int) -> None:
        self._trainer, self._folder, self._processes = trainer, folder, processes
        self._sources: list[Source] = []
        self._read: list[list[ReadShare]] = []
        self._left: list[list[np.ndarray]] = []
        self._rendered: list[Rendered] = []

    def read(self, sources: Sequence[Source], default_splits: Sequence[str]) -> tuple[list[int], list[Problems], int]:
        """Read the sources. Returns usable rows and bad ones of each, and the number of different gold answers."""
        self._sources = list(sources)
        for number, source in enumerate(sources):

            def work(index: int, tell: Tell, number: int = number, source: Source = source) -> ReadShare:
                share = Share(index, self._processes)
                return stages.read_share(source, default_splits, share, self._file("rows", number, index), tell)

            self._read.append(self._in_processes(work))
        answers = sorted(set().union(*(share.answers for shares in self._read for share in shares)))
        write_atomic(self._folder / ANSWERS, "".join(json.dumps(answer) + "\n" for answer in answers))
        rows = [sum(len(share.keys) for share in shares) for shares in self._read]
        return rows, [Problems().merged(share.problems for share in shares) for shares in self._read], len(answers)

    def select(self, refused: Mapping[str, str]) -> list[Problems]:
        """Leave out repeats and the rows with these gold answers. Returns the latter, of each source."""
        problems = []
        for number, shares in enumerate(self._read):
            left, found = stages.select_rows(self._files("rows", number), shares, refused)
            self._left.append(left)
            problems.append(found)
        return problems

    def render(
        self, tokenizer: bytes, rendering: Mapping[str, Any], max_prompt_tokens: int
    ) -> tuple[list[int], list[Problems]]:
        """Render and tokenise what is left. Returns prompts, and those that are too long, of each source."""
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
        loaded = pickle.loads(tokenizer)
        for number in range(len(self._sources)):

            def work(index: int, tell: Tell, number: int = number) -> RenderedShare:
                rows, file = (self._file(name, number, index) for name in ("rows", "prompts"))
                left = self._left[number][index]
                return stages.render_share(rows, left, number, loaded, rendering, max_prompt_tokens, file, tell)

            shares = self._in_processes(work)
            self._rendered.append(Rendered(self._files("prompts", number), shares))
            for file in self._files("rows", number):
                file.unlink()
        counts = [sum(share.rendered for share in source.shares) for source in self._rendered]
        return counts, [Problems().merged(share.too_long for share in source.shares) for source in self._rendered]

    def join(self, facts: Mapping[str, Any]) -> Path:
        """Write the finished file."""
        file = self._folder / "joined.arrow"
        self._in_processes(lambda _, tell: stages.join_prompts(self._rendered, facts, file, tell), 1)
        return file

    def overlap(self, table: Path, held_out: Sequence[str]) -> dict[int, str]:
        """Row of a finished file -> the held-out question that it is, or contains."""
        known = HeldOut(held_out)

        def work(index: int, tell: Tell) -> dict[int, str]:
            questions = open_table(table)["question"]
            start = 0
            found: dict[int, str] = {}
            for number, chunk in enumerate(questions.chunks):
                if number % self._processes == index:
                    matches = ((row, known.match(text)) for row, text in enumerate(chunk.to_pylist(), start))
                    found.update((row, match) for row, match in matches if match is not None)
                    tell((start + len(chunk)) / len(questions))
                start += len(chunk)
            return found

        found = self._in_processes(work)
        return dict(sorted(item for part in found for item in part.items()))

    # ------------------------------------------------------------------ processes

    def _file(self, name: str, source: int, index: int) -> Path:
        return self._folder / f"{name}-{source}-{index}.arrow"

    def _files(self, name: str, source: int) -> list[Path]:
        return [self._file(name, source, index) for index in range(self._processes)]

    def _in_processes(self, work: Callable[[int, Tell], T], count: int | None = None) -> list[T]:
        """What ``work(index, tell)`` returns in each of ``count`` processes; the trainer hears how far they are."""
        context = multiprocessing.get_context("fork")
        gc.freeze()  # what is there is not searched for garbage in each process again and again
        count = count or self._processes
        results: dict[int, T] = {}
        done = [0.0] * count
        waiting: dict[Any, int] = {}
        for index in range(count):
            here, there = context.Pipe(duplex=False)
            context.Process(target=_run, args=(there, work, index), daemon=True).start()
            there.close()
            waiting[here] = index
        while waiting:
            for ready in wait([*waiting, self._trainer]):
                if ready is self._trainer:  # which asks for nothing before it has its answer: it is gone
                    os.killpg(0, signal.SIGKILL)
                kind, value = _message(ready)
                if kind == "error":
                    raise value
                if kind == "result":
                    results[waiting.pop(ready)] = value
                else:
                    done[waiting[ready]] = value
                    self._trainer.send(("done", sum(done) / count))
        return [results[index] for index in range(count)]


def _message(connection: Any) -> tuple[str, Any]:
    try:
        message: tuple[str, Any] = connection.recv()
        return message
    except EOFError:
        return "error", RunError("a process that prepares prompts was killed; is there memory enough for it?")


def _run(connection: Connection, work: Callable[[int, Tell], Any], index: int) -> None:
    """In a forked process: do the work, and send what came of it."""
    last = 0.0

    def tell(done: float) -> None:
        nonlocal last
        if done - last >= 0.01:
            last = done
            connection.send(("done", done))

    connection.send(_outcome(lambda: work(index, tell)))


def _outcome(action: Callable[[], Any]) -> tuple[str, Any]:
    try:
        return "result", action()
    except (ConfigError, RunError, OSError) as error:
        return "error", error
    except Exception:  # not foreseen: the trainer's report needs its place
        return "error", RuntimeError(traceback.format_exc())


def main() -> None:
    """Answer requests until the trainer is gone."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, lambda *_: None)  # a scheduler's warning is for the trainer
    descriptor, folder, processes = sys.argv[1:]
    trainer = Connection(int(descriptor))
    maker = Maker(trainer, Path(folder), int(processes))
    with contextlib.suppress(EOFError, BrokenPipeError):
        while True:
            name, arguments = trainer.recv()
            trainer.send(_outcome(lambda name=name, arguments=arguments: getattr(maker, name)(**arguments)))  # type: ignore[misc]
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    main()
