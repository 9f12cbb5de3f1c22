"""Prompts: rows of a data set in, ``Prompt`` records out, every row checked before anything expensive starts."""

from __future__ import annotations

import hashlib
import heapq
import itertools
import logging
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from nemo_aapo.config.sources import Source
from nemo_aapo.data.prepared.answers import AnswerCheck, VerifyAnswer
from nemo_aapo.data.rows import TRAIN_SPLITS, Row, gold_answer, read_rows
from nemo_aapo.data.tokenizer import ChatTemplate, render_prompts
from nemo_aapo.errors import DataError
from nemo_aapo.text.checks import QUESTION
from nemo_aapo.types import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["PromptSet", "gold_answer", "load_prompts", "make_prompts"]

logger = logging.getLogger(__name__)

_EXAMPLES = 5
"""Number of bad lines that a message shows."""


@dataclass
class Problems:
    """How many rows have one, and the first of them."""

    count: int = 0
    first: dict[int, str] = field(default_factory=dict)
    """Number of the row -> what is wrong."""

    def add(self, number: int, problem: str) -> None:
        """One more, behind those that are there."""
        self.count += 1
        if len(self.first) < _EXAMPLES:
            self.first[number] = problem

    def merged(self, others: Iterable[Problems]) -> Problems:
        """These and others."""
        everyone = [self, *others]
        first = heapq.nsmallest(_EXAMPLES, (item for problems in everyone for item in problems.first.items()))
        return Problems(sum(problems.count for problems in everyone), dict(first))


@dataclass(frozen=True, slots=True)
class PromptSet:
    """The prompts of one source or of several, and what was left out."""

    prompts: Sequence[Prompt]
    """The sources' prompts one after the other; behind them those of sources without end, made when asked for."""
    path: str
    """Where they come from, for messages."""
    bad_lines: int
    """Number of lines that could not be used (``on_bad_line="skip"``)."""
    dropped_long: int
    """Number of prompts over the length limit (``on_long_prompt="drop"``)."""
    duplicates: int
    """Number of prompts dropped because an earlier line has the same token ids and gold answer."""
    digest: str
    """A digest of all prompt ids in order: two files with the same digest mean the same run."""
    questions: Sequence[str] = ()
    """The user's message in each prompt, before any template."""
    contaminated: int = 0
    """Number of prompts that are held-out ones too: dropped with ``on_contamination="drop"``, else still there."""
    shares: tuple[tuple[int | None, float], ...] = ()
    """(number of prompts, weight) of each source; None prompts for one without end. Empty for a single source."""


def load_prompts(
    source: str | Path | Source,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_prompt_tokens: int,
    default_splits: Sequence[str] = TRAIN_SPLITS,
    system_prompt: str | None = None,
    chat_template: ChatTemplate = "auto",
    prompt_template: str = QUESTION,
    template_arguments: Mapping[str, Any] | None = None,
    date: str | None = None,
    on_bad_line: Literal["error", "skip"] = "error",
    on_long_prompt: Literal["error", "drop"] = "error",
    verify_answer: VerifyAnswer | AnswerCheck | None = None,
    **fields: Any,
) -> PromptSet:
    """Read, check, render and tokenise the prompts of a data set.

    Args:
        source: a JSONL, JSON, csv, tsv, Parquet or Arrow file (blank lines are ignored), a data set's directory, or a
            name on the Hugging Face hub; or a ``Source``, which is no reasoning-gym task.
        tokenizer: any transformers tokenizer.
        max_prompt_tokens: the longest rendered prompt allowed, in tokens.
        default_splits: the splits to try where the source names none.
        system_prompt: put before each question; needs a place, see ``tokenizer.render_prompts``.
        chat_template: ``"auto"`` or ``"none"``.
        prompt_template: the text around the question.
        template_arguments, date: what the chat template reads, and the day that it writes; None: today.
        on_bad_line: ``"skip"`` leaves out lines that can't be used and counts them.
        on_long_prompt: ``"drop"`` leaves out prompts over the limit and counts them.
        verify_answer: raises ValueError for a gold answer that the reward can't work with; called once for each
            different answer.
        fields: of the ``Source`` that a path becomes: ``prompt_field``, ``answer_field``, ``answer_form``, ``subset``,
            ``split``.

    Raises:
        DataError: nothing there, or no usable prompt in it; lines that can't be used, or prompts that are too long: the
            first five, and how many there are.
    """
    if not isinstance(source, Source):
        source = Source(str(source), **fields)
    path = source.path
    rows, bad = read_rows(source, default_splits, verify_answer=verify_answer)
    problems = Problems(len(bad), dict(itertools.islice(bad.items(), _EXAMPLES)))
    require_rows(path, len(rows), problems, on_bad_line)
    unique = without_repeats(rows)
    texts, ids = render_prompts(
        tokenizer,
        [row.question for row in unique],
        system_prompt=system_prompt,
        chat_template=chat_template,
        prompt_template=prompt_template,
        template_arguments=template_arguments,
        date=date,
        before=[row.before for row in unique],
    )
    long = {
        row.number: too_long(len(tokens), max_prompt_tokens)
        for row, tokens in zip(unique, ids, strict=True)
        if len(tokens) > max_prompt_tokens
    }
    problems = Problems(len(long), dict(itertools.islice(long.items(), _EXAMPLES)))
    require_short(path, len(unique), problems, on_long_prompt)
    return _prompt_set(path, unique, texts, ids, bad=len(bad), long=long, repeats=len(rows) - len(unique))


def too_long(tokens: int, most: int) -> str:
    """What is wrong with a prompt of more tokens than ``data.max_prompt_tokens``."""
    return f"the prompt has {tokens} tokens, max_prompt_tokens is {most}"


def require_rows(path: str, rows: int, bad: Problems, on_bad_line: str) -> None:
    """Raise DataError for bad lines where they are not skipped, and unless there are usable rows; else log them."""
    _report(path, bad, "line(s) can't be used", on_bad_line == "skip", "set data.on_bad_line=skip")
    if not rows:
        why = f"none of its {bad.count} lines can be used, such as {_example(path, bad)}" if bad.count else "empty"
        raise DataError(f"{path}: no prompts: {why}")


def require_short(path: str, prompts: int, long: Problems, on_long_prompt: str) -> None:
    """Raise DataError for prompts that are too long where they are not dropped, and if all are; else log them."""
    remedy = "raise data.max_prompt_tokens, or set data.on_long_prompt=drop"
    _report(path, long, "prompt(s) are too long", on_long_prompt == "drop", remedy)
    if long.count == prompts:
        raise DataError(f"{path}: no prompts: every one is too long, such as {_example(path, long)}")


def make_prompts(
    pairs: Iterable[tuple[str, str]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    source: str,
    system_prompt: str | None = None,
    chat_template: ChatTemplate = "auto",
    prompt_template: str = QUESTION,
    template_arguments: Mapping[str, Any] | None = None,
    date: str | None = None,
) -> PromptSet:
    """Prompts from (question, gold answer) pairs of your own; other arguments as in ``load_prompts``.

    Args:
        source: where they come from, for messages; stands in for the file's path.

    Raises:
        DataError: no pairs.
    """
    rows = [Row(number, question, answer) for number, (question, answer) in enumerate(pairs, start=1)]
    if not rows:
        raise DataError(f"{source}: no prompts")
    texts, ids = render_prompts(
        tokenizer,
        [row.question for row in rows],
        system_prompt=system_prompt,
        chat_template=chat_template,
        prompt_template=prompt_template,
        template_arguments=template_arguments,
        date=date,
    )
    return _prompt_set(source, rows, texts, ids, bad=0, long=(), repeats=0)


def without_repeats(rows: Sequence[Row]) -> list[Row]:
    """The first row of each question and answer: some data sets hold each a hundred times."""
    first: dict[object, Row] = {}
    for row in rows:
        first.setdefault((row.question, row.answer, str(row.before) if row.before else ""), row)
    return list(first.values())


def _prompt_set(
    source: str,
    rows: Sequence[Row],
    texts: Sequence[str],
    ids: Sequence[np.ndarray],
    *,
    bad: int,
    long: Collection[int],
    repeats: int,
) -> PromptSet:
    """The prompts of all rows that are not too long, the first of each id."""
    prompts: dict[str, Prompt] = {}
    questions = []
    for row, text, tokens in zip(rows, texts, ids, strict=True):
        prompt_id = prompt_digest(tokens, row.answer)
        if row.number not in long and prompt_id not in prompts:
            prompts[prompt_id] = Prompt(prompt_id, tokens, text, row.answer, f"{source}:{row.number}")
            questions.append(row.question)
    duplicates = repeats + len(rows) - len(long) - len(prompts)
    return PromptSet(tuple(prompts.values()), source, bad, len(long), duplicates, digest_of(prompts), tuple(questions))


def _report(path: str, problems: Problems, what: str, tolerate: bool, remedy: str) -> None:
    """Raise, or log one line, about all problems at once."""
    if not problems.count:
        return
    examples = [f"{path}:{line}: {problem}" for line, problem in problems.first.items()]
    more = problems.count - len(examples)
    if tolerate:
        logger.warning("%s: %d %s and are left out: %s", path, problems.count, what, "; ".join(examples[:3]))
        return
    listing = "\n  ".join([*examples, *([f"and {more} more"] if more else [])])
    raise DataError(f"{path}: {problems.count} {what}:\n  {listing}\nMend them, or {remedy}.")


def _example(path: str, problems: Problems) -> str:
    line, problem = next(iter(problems.first.items()))
    return f"{path}:{line}: {problem}"


def digest_of(names: Iterable[str]) -> str:
    """A digest of prompt ids, which depends on their order."""
    return hashlib.sha256("\n".join(names).encode()).hexdigest()


def prompt_digest(token_ids: np.ndarray, answer: str) -> str:
    """The id of a prompt: a digest of its tokens and its gold answer."""
    digest = hashlib.blake2b(len(token_ids).to_bytes(8, "little"), digest_size=16)
    digest.update(token_ids.astype("<i4").tobytes())
    digest.update(answer.encode())
    return digest.hexdigest()
