"""The prompts of large sources: found in the cache, or made beside the trainer and put there."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from nemo_aapo.config.schema import Data
from nemo_aapo.config.sources import Source
from nemo_aapo.data.prepared.answers import AnswerCheck
from nemo_aapo.data.prepared.cache import Note, cache_folders, cached
from nemo_aapo.data.prepared.key import files_of, key_of, key_of_prompts
from nemo_aapo.data.prepared.maker import ANSWERS
from nemo_aapo.data.prepared.table import PreparedPrompts, PreparedQuestions, is_whole, made_of
from nemo_aapo.data.prompts import Problems, PromptSet, digest_of, require_rows, require_short
from nemo_aapo.errors import DataError, RunError
from nemo_aapo.run.stop import heed
from nemo_aapo.utils.files import write_atomic
from nemo_aapo.utils.text import TimeLeft

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LARGE_BYTES = 8 << 20
"""Sources of so many bytes of text, about 15,000 rows, are prepared once; smaller ones are read at each start."""
_PACKED = {".gz": 4, ".parquet": 4}
"""Ending -> about how many bytes of text one of its bytes is."""
_MOST_PROCESSES = 16
SILENCE_S = 1800.0
"""The process that makes prompts says how far it is; one that is silent for so long hangs."""
HEED_S = 1.0
"""Pause before the trainer looks again whether a stop was asked for."""


@dataclass(frozen=True)
class Making:
    """What the making of prompts needs besides the sources."""

    data: Data
    tokenizer: PreTrainedTokenizerBase
    rendering: Mapping[str, Any]
    """Arguments of ``render_prompts``."""
    check: AnswerCheck | None
    """None: gold answers are not checked."""
    run_dir: Path | None
    """Where prepared prompts go that the cache can't hold."""
    note: Note


def are_large(sources: Sequence[Source], default_splits: Sequence[str]) -> bool:
    """Whether it pays to prepare these sources once; finite tasks of reasoning-gym, which have no files, never are."""
    if any(source.task is not None and not source.endless for source in sources):
        return False
    files = [file for source in sources if source.task is None for file in files_of(source, default_splits)]
    return sum(file.stat().st_size * _PACKED.get(file.suffix.lower(), 1) for file in files) >= LARGE_BYTES


def prepared_prompts(sources: Sequence[Source], default_splits: Sequence[str], making: Making) -> PromptSet:
    """The prompts of some sources, those without end left out, as views of a file on the disk.

    Raises:
        DataError: as for small sources; or a file was changed meanwhile.
        RunError: there is no place for the prepared prompts, or a process that made them died.
    """
    data = making.data
    finite = [source for source in sources if source.task is None]
    settings = {
        "rendering": dict(making.rendering),
        **{name: getattr(data, name) for name in ("max_prompt_tokens", "on_bad_line", "on_long_prompt")},
    }
    rewards = making.check and making.check.definition
    key = key_of_prompts(finite, default_splits, making.tokenizer, settings, rewards)

    def make(folder: Path) -> Path:
        made = _make(finite, default_splits, making, folder)
        if key_of_prompts(finite, default_splits, making.tokenizer, settings, rewards) != key:
            paths = ", ".join(source.path for source in finite)
            raise DataError(f"{paths}: changed while it was read; start again")
        return made

    path = cached(f"{key}.arrow", cache_folders(making.run_dir), is_whole, make, making.note)
    return _prompt_set(path, sources, data)


def prepared_overlap(train: PromptSet, held_out: Sequence[str], making: Making) -> dict[int, str]:
    """``contamination.overlap`` of prepared prompts, found once for these and these questions.

    Returns:
        Index of a training prompt -> the held-out question that it is, or contains.
    """
    prompts = train.prompts
    assert isinstance(prompts, PreparedPrompts)
    name = f"{prompts.path.stem}-{key_of(sorted(held_out))}.json"

    def make(folder: Path) -> Path:
        with _maker(folder) as maker:
            told = TimeLeft("comparing the training prompts with the held-out ones", making.note)
            found = maker.ask("overlap", told, table=prompts.path, held_out=list(held_out))
        write_atomic(folder / name, json.dumps(list(found.items())))
        return folder / name

    path = cached(name, cache_folders(making.run_dir), _is_json, make, making.note)
    return {int(row): question for row, question in json.loads(path.read_text(encoding="utf-8"))}


def without_rows(train: PromptSet, rows: set[int]) -> tuple[PreparedPrompts, PreparedQuestions, str]:
    """Prepared prompts and questions without some of them, and the digest of what is left."""
    prompts, questions = train.prompts, train.questions
    assert isinstance(prompts, PreparedPrompts)
    assert isinstance(questions, PreparedQuestions)
    kept = np.delete(np.arange(len(prompts)), sorted(rows))
    left = prompts.take(np.asarray(prompts.rows)[kept])
    return left, PreparedQuestions(questions.path, left.rows), digest_of(left.ids())


def _is_json(path: Path) -> bool:
    try:
        json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return True


# ---------------------------------------------------------------- making


def _make(sources: Sequence[Source], default_splits: Sequence[str], making: Making, folder: Path) -> Path:
    data, paths = making.data, [source.path for source in sources]
    what = ", ".join(paths)
    making.note(f"preparing the prompts of {what}, once for all runs ({folder.parent})")

    def left(stage: str) -> TimeLeft:
        return TimeLeft(f"preparing the prompts of {what}: {stage}", making.note)

    with _maker(folder) as maker:
        rows, bad, answers = maker.ask(
            "read", left("reading"), sources=list(sources), default_splits=list(default_splits)
        )
        refused = _refused(making.check, folder / ANSWERS, answers)
        refusals = maker.ask("select", left("selecting"), refused=refused)
        rows = [count - problems.count for count, problems in zip(rows, refusals, strict=True)]
        bad = [problems.merged([more]) for problems, more in zip(bad, refusals, strict=True)]
        for path, count, problems in zip(paths, rows, bad, strict=True):
            if not count or data.on_bad_line == "error":
                require_rows(path, count, problems, data.on_bad_line)
        prompts, long = maker.ask(
            "render",
            left("tokenising"),
            tokenizer=pickle.dumps(making.tokenizer),
            rendering=dict(making.rendering),
            max_prompt_tokens=data.max_prompt_tokens,
        )
        for path, count, problems in zip(paths, prompts, long, strict=True):
            if problems.count == count or data.on_long_prompt == "error":
                require_short(path, count, problems, data.on_long_prompt)
        facts = {
            "rows": rows,
            "prompts": prompts,
            "bad": [dataclasses.asdict(problems) for problems in bad],
            "long": [dataclasses.asdict(problems) for problems in long],
        }
        made: Path = maker.ask("join", left("writing"), facts=facts)
        return made


def _refused(check: AnswerCheck | None, answers: Path, count: int) -> dict[str, str]:
    if check is None:
        return {}
    with answers.open(encoding="utf-8") as lines:
        return check.refused((json.loads(line) for line in lines), count)


def _prompt_set(path: Path, sources: Sequence[Source], data: Data) -> PromptSet:
    """The prompts of a file, with the warnings about what was left out when it was made."""
    facts = made_of(path)
    finite = [source.path for source in sources if source.task is None]
    bad, long = ([_problems(said) for said in facts[name]] for name in ("bad", "long"))
    for i, name in enumerate(finite):
        require_rows(name, facts["rows"][i], bad[i], data.on_bad_line)
        require_short(name, facts["prompts"][i], long[i], data.on_long_prompt)
    for name, size in zip(finite, facts["sizes"], strict=True):
        if not size:
            raise DataError(f"{name}: all its prompts are in the sources before it; leave it out")
    sizes, total = iter(facts["sizes"]), sum(facts["sizes"])
    dropped = sum(problems.count for problems in long)
    return PromptSet(
        PreparedPrompts(path, range(total), tuple(finite)),
        " + ".join(source.path for source in sources),
        bad_lines=sum(problems.count for problems in bad),
        dropped_long=dropped,
        duplicates=sum(facts["rows"]) - dropped - total,
        digest=facts["digest"],
        questions=PreparedQuestions(path, range(total)),
        shares=tuple((None if source.endless else next(sizes), source.weight) for source in sources),
    )


def _problems(said: Mapping[str, Any]) -> Problems:
    return Problems(said["count"], {int(number): problem for number, problem in said["first"].items()})


class _MakerProcess:
    """The trainer's side of ``prepared.maker``."""

    def __init__(self, process: subprocess.Popen[bytes], connection: Connection) -> None:
        self._process, self._connection = process, connection

    def ask(self, name: str, tell: TimeLeft, **arguments: Any) -> Any:
        """What that method of ``Maker`` returns, or the error that it raises."""
        try:
            self._connection.send((name, arguments))
            while True:
                self._wait_for_word()
                kind, value = self._connection.recv()
                if kind == "error":
                    raise value
                if kind == "result":
                    return value
                tell(value)
        except (EOFError, BrokenPipeError, ConnectionResetError):
            raise RunError(
                f"the process that prepares prompts ended with status {self._process.wait(10)}; its log is above"
            ) from None

    def _wait_for_word(self) -> None:
        end = time.monotonic() + SILENCE_S
        while not self._connection.poll(HEED_S):
            heed("the process that prepares prompts")
            if time.monotonic() > end:
                raise RunError(f"the process that prepares prompts has said nothing for {SILENCE_S:g} s; start again")


@contextlib.contextmanager
def _maker(folder: Path) -> Iterator[_MakerProcess]:
    """The process, which works in this folder; it is gone at the end."""
    here, there = Pipe()
    processes = min(len(os.sched_getaffinity(0)), _MOST_PROCESSES)
    command = [sys.executable, "-W", "ignore", "-m", "nemo_aapo.data.prepared.maker"]
    paths = os.pathsep.join(path for path in sys.path if path)  # of a tokenizer with code of its own, too
    process = subprocess.Popen(
        [*command, str(there.fileno()), str(folder), str(processes)],
        pass_fds=[there.fileno()],
        stdin=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        start_new_session=True,  # Ctrl-C is the trainer's; a kill takes what it forked along
    )
    there.close()
    try:
        yield _MakerProcess(process, here)
    finally:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        here.close()
        process.wait(10)
