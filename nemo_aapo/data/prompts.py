"""Prompts: JSONL in, ``Prompt`` records out, every line checked before anything expensive starts."""

from __future__ import annotations

import difflib
import hashlib
import json
import logging
import re
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from nemo_aapo.data import DataError
from nemo_aapo.data.tokenizer import ChatTemplate, render_prompts
from nemo_aapo.types import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

_EXAMPLES = 5
"""How many bad lines a message shows."""
_GOLD_MARK = "####"
_THOUSANDS_COMMA = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")


@dataclass(frozen=True, slots=True)
class PromptSet:
    """The prompts of one file, and what was left out of it."""

    prompts: tuple[Prompt, ...]
    path: str
    bad_lines: int
    """Lines that could not be used (``on_bad_line="skip"``)."""
    dropped_long: int
    """Prompts over the length limit (``on_long_prompt="drop"``)."""
    duplicates: int
    """Prompts dropped because an earlier line has the same token ids and gold answer."""
    digest: str
    """Of all prompt ids in order: two files with the same digest mean the same run."""


class _Row(NamedTuple):
    line: int
    question: str
    answer: str


def load_prompts(
    path: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_prompt_tokens: int,
    prompt_field: str = "question",
    answer_field: str = "answer",
    system_prompt: str | None = None,
    chat_template: ChatTemplate = "auto",
    on_bad_line: Literal["error", "skip"] = "error",
    on_long_prompt: Literal["error", "drop"] = "error",
    verify_answer: Callable[[str], None] | None = None,
) -> PromptSet:
    """Read, check, render and tokenise the prompts of a JSONL file.

    Args:
        path: one JSON object a line, UTF-8; blank lines are ignored.
        tokenizer: any transformers tokenizer.
        max_prompt_tokens: the longest rendered prompt allowed, in tokens.
        prompt_field: the key of the question.
        answer_field: the key of the gold answer: a string, a number, or GSM8K's form (see ``gold_answer``).
        system_prompt: put before each question; needs a chat template.
        chat_template: ``"auto"`` or ``"none"``.
        on_bad_line: ``"skip"`` leaves out lines that can't be used and counts them.
        on_long_prompt: ``"drop"`` leaves out prompts over the limit and counts them.
        verify_answer: raises ValueError for a gold answer that the reward can't work with; called once for each
            different answer.

    Raises:
        DataError: the file is missing or holds no usable prompt; lines that can't be used, or prompts that are too
            long: the first five, and how many there are.
    """
    path = Path(path)
    rows, bad = _parse_rows(_read_lines(path), prompt_field, answer_field, verify_answer)
    _report(path, bad, "line(s) can't be used", on_bad_line == "skip", "set data.on_bad_line=skip")
    if not rows:
        why = f"none of its {len(bad)} lines can be used, such as {_example(path, bad)}" if bad else "empty"
        raise DataError(f"{path}: no prompts: {why}")
    questions = [row.question for row in rows]
    texts, ids = render_prompts(tokenizer, questions, system_prompt=system_prompt, chat_template=chat_template)
    long = {
        row.line: f"the prompt has {len(tokens)} tokens, max_prompt_tokens is {max_prompt_tokens}"
        for row, tokens in zip(rows, ids, strict=True)
        if len(tokens) > max_prompt_tokens
    }
    remedy = "raise data.max_prompt_tokens, or set data.on_long_prompt=drop"
    _report(path, long, "prompt(s) are too long", on_long_prompt == "drop", remedy)
    if len(long) == len(rows):
        raise DataError(f"{path}: no prompts: every one is too long, such as {_example(path, long)}")
    return _prompt_set(str(path), rows, texts, ids, bad=len(bad), long=long)


def make_prompts(
    pairs: Iterable[tuple[str, str]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    source: str,
    system_prompt: str | None = None,
    chat_template: ChatTemplate = "auto",
) -> PromptSet:
    """Prompts from (question, gold answer) pairs of your own; other arguments as in ``load_prompts``.

    Args:
        source: where they come from, for messages; stands in for the file's path.

    Raises:
        DataError: no pairs.
    """
    rows = [_Row(number, question, answer) for number, (question, answer) in enumerate(pairs, start=1)]
    if not rows:
        raise DataError(f"{source}: no prompts")
    questions = [row.question for row in rows]
    texts, ids = render_prompts(tokenizer, questions, system_prompt=system_prompt, chat_template=chat_template)
    return _prompt_set(source, rows, texts, ids, bad=0, long=())


def gold_answer(answer: str) -> str:
    """The gold answer of a data set's answer field.

    GSM8K's answers are worked solutions that end in ``#### N``: the gold answer stands behind the last ``####``,
    and N loses its thousands commas. Any other answer is taken as it is, without white space around it.
    """
    _, mark, gold = answer.rpartition(_GOLD_MARK)
    return _THOUSANDS_COMMA.sub("", gold.strip()) if mark else answer.strip()


def _read_lines(path: Path) -> list[bytes]:
    if path.is_dir():
        raise DataError(f"{path}: this is a directory; name a JSONL file in it")
    if not path.exists():
        if not path.parent.is_dir():
            raise DataError(f"{path}: no such file, as there is no directory {path.parent}")
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.iterdir()], n=1, cutoff=0.5)
        hint = f"did you mean {path.parent / near[0]}?" if near else f"nothing in {path.parent} has a name like it"
        raise DataError(f"{path}: no such file; {hint}")
    return path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")


def _parse_rows(
    lines: Sequence[bytes], prompt_field: str, answer_field: str, verify_answer: Callable[[str], None] | None
) -> tuple[list[_Row], dict[int, str]]:
    """The usable rows, and what is wrong with the others by line number (from 1)."""
    rows: list[_Row] = []
    problems: dict[int, str] = {}
    verdicts: dict[str, str] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = _parse_row(number, line, prompt_field, answer_field)
            if verify_answer is not None and row.answer not in verdicts:
                verdicts[row.answer] = _verdict(row.answer, verify_answer)
        except DataError as error:
            problems[number] = str(error)
            continue
        if verdicts.get(row.answer):
            problems[number] = verdicts[row.answer]
        else:
            rows.append(row)
    return rows, problems


def _verdict(answer: str, verify_answer: Callable[[str], None]) -> str:
    try:
        verify_answer(answer)
    except ValueError as error:
        return f"the gold answer {_shorten(answer)} can't be verified: {error}"
    return ""


def _parse_row(number: int, line: bytes, prompt_field: str, answer_field: str) -> _Row:
    try:
        record = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise DataError(f"not UTF-8: byte 0x{line[error.start]:02x} at column {error.start + 1}") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"not JSON: {error}") from None
    if not isinstance(record, dict):
        raise DataError(f"not a JSON object but {_shorten(record)}")
    question = _field(record, prompt_field, "prompt")
    answer = gold_answer(_field(record, answer_field, "answer"))
    if not answer:
        raise DataError(f'no answer: nothing stands behind the last "{_GOLD_MARK}" of "{answer_field}"')
    return _Row(number, question, answer)


def _field(record: dict[str, Any], field: str, what: str) -> str:
    value = record.get(field)
    if field not in record:
        near = difflib.get_close_matches(field, record, n=1)
        hint = f'did you mean "{near[0]}"?' if near else f"there is {', '.join(map(repr, record)) or 'nothing'}"
        raise DataError(f'no {what}: the key "{field}" is missing; {hint} (set data.{what}_field)')
    if isinstance(value, int | float) and not isinstance(value, bool) and what == "answer":
        value = str(value)
    if not isinstance(value, str):
        raise DataError(f'no {what}: "{field}" is {_shorten(value)}, not text')
    if not value.strip():
        raise DataError(f'no {what}: "{field}" is empty')
    if not _is_unicode(value):
        raise DataError(f'"{field}" holds half of a surrogate pair, which no tokenizer takes')
    return value


def _is_unicode(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _prompt_set(
    source: str,
    rows: Sequence[_Row],
    texts: Sequence[str],
    ids: Sequence[np.ndarray],
    *,
    bad: int,
    long: Collection[int],
) -> PromptSet:
    """The prompts of all lines that are not too long, the first of each id."""
    prompts: dict[str, Prompt] = {}
    for row, text, tokens in zip(rows, texts, ids, strict=True):
        if row.line not in long:
            prompt_id = _prompt_id(tokens, row.answer)
            prompts.setdefault(prompt_id, Prompt(prompt_id, tokens, text, row.answer, f"{source}:{row.line}"))
    duplicates = len(rows) - len(long) - len(prompts)
    digest = hashlib.sha256("\n".join(prompts).encode()).hexdigest()
    return PromptSet(tuple(prompts.values()), source, bad, len(long), duplicates, digest)


def _report(path: Path, problems: dict[int, str], what: str, tolerate: bool, remedy: str) -> None:
    """Raise, or log one line, about all problems at once."""
    if not problems:
        return
    examples = [f"{path}:{line}: {problem}" for line, problem in list(problems.items())[:_EXAMPLES]]
    more = len(problems) - len(examples)
    if tolerate:
        logger.warning("%s: %d %s and are left out: %s", path, len(problems), what, "; ".join(examples[:3]))
        return
    listing = "\n  ".join([*examples, *([f"and {more} more"] if more else [])])
    raise DataError(f"{path}: {len(problems)} {what}:\n  {listing}\nMend them, or {remedy}.")


def _example(path: Path, problems: dict[int, str]) -> str:
    line, problem = next(iter(problems.items()))
    return f"{path}:{line}: {problem}"


def _shorten(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _prompt_id(token_ids: np.ndarray, answer: str) -> str:
    digest = hashlib.blake2b(len(token_ids).to_bytes(8, "little"), digest_size=16)
    digest.update(token_ids.astype("<i4").tobytes())
    digest.update(answer.encode())
    return digest.hexdigest()
