"""Rewards by comparing text: an exact answer, the last number, the letter of a choice.

They are cheap and always end, so that they may run in the trainer's own process. Which text is the answer, ``verdict``
says, as for ``accuracy``: what the answer tags hold, else the last ``\\boxed{}``, else the completion's end.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, ClassVar

from nemo_aapo.rewards.base import Reward
from nemo_aapo.rewards.verdict import RULES
from nemo_aapo.rewards.verdict.numbers import read_number
from nemo_aapo.rewards.verdict.text import clean, whole_text
from nemo_aapo.rewards.verdict.units import split_unit
from nemo_aapo.text.answer import LONGEST, TAIL, find_answer, is_missing, tagged
from nemo_aapo.types import Completion, Prompt

# A minus is a sign unless it stands behind an operand: "7-3" holds 7 and 3, "= -3" holds -3.
_NUMBER = re.compile(r"(?:(?<![\w)])-)?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?")
_MINUS = str.maketrans("\u2212\u2013\uff0d", "---")
_THOUSANDS = re.compile(r"(?<=\d)(?:\{,\}|,?\\!|\\,)(?=\d{3})")
_NAMED = re.compile(r"[A-Za-z](?:_\w)? *= *")
_GOLD_LETTER = re.compile(r"\(?([A-Z])\)?[.:]?")
# The letter of a box: alone, or with the choice's text behind it, but no second letter: "A, B, C" decides for nothing.
_BOXED_LETTER = re.compile(
    r"(?i:the )?(?:(?i:(?:correct )?(?:answer|option|choice)(?: is)?) *:? *)?"
    r"\(?(?:([A-Z])(?:\)|(?=$|[.:)]|, | \d))|([B-HJ-Z])(?= (?!and |or )))(?![A-Za-z0-9'])"
    r"(?!\W*(?:(?:and|or) )?\(?[A-Z]\b)"
)
_TEXT_BRACES = re.compile(r"\\text\{|\}|\{")
_NAMED_LETTER = re.compile(r"(?i:answer|option|choice)(?i:\s+is|\s*[:=])?\s*:?[\s*_$]*\(?([A-Z])\b(?!')")
_LETTER_ALONE = re.compile(r"(?:^|\n)[\s*_$]*\(?([A-Z])[).]?[\s*_$.]*(?=\n|$)")


@dataclass(frozen=True)
class Exact(Reward):
    """1.0 if the completion, or what its answer tags hold, is the gold answer, else 0.0; white space around is none."""

    kind: ClassVar[str] = "exact"

    def __call__(self, prompt: Prompt, text: str, completion: Completion) -> float:
        """1.0 or 0.0."""
        inside = tagged(text)
        return float((text if inside is None else inside).strip() == prompt.answer.strip())

    def check_answer(self, answer: str) -> None:
        """Raise ValueError for what programs write in place of a missing answer."""
        if is_missing(answer):
            raise ValueError(f"{answer.strip()!r} is what programs write for a missing value")

    def depends_on(self) -> dict[str, Any]:
        """The rules by which an answer is found and read."""
        return {"rules": RULES}


@dataclass(frozen=True)
class Integer(Reward):
    """1.0 if the answer is the gold integer, else 0.0.

    A box, or answer tags, must hold that number and nothing else but a unit or ``x =``; of a text without them, and of
    a sentence in the tags, the last number counts.
    """

    kind: ClassVar[str] = "integer"
    takes_integers: ClassVar[bool] = True

    def __call__(self, prompt: Prompt, text: str, completion: Completion) -> float:
        """1.0 or 0.0; thousands commas are allowed, and ``7.0`` is 7. Raises ValueError if the gold answer is none."""
        gold = _integer(prompt.answer)
        if gold is None:
            raise ValueError(f"the gold answer {prompt.answer!r} is not an integer")
        answer = find_answer(text, tail=len(text))
        said = _integer(answer.text) if answer.where != "end" else None
        if said is None and (answer.where == "end" or (answer.where == "tags" and " " in answer.text)):
            said = _last_integer(answer.text)
        return float(said == gold)

    def check_answer(self, answer: str) -> None:
        """Raise ValueError unless the gold answer is an integer."""
        if _integer(answer) is None:
            raise ValueError("it is not an integer; use the reward 'exact' or 'accuracy'")

    def depends_on(self) -> dict[str, Any]:
        """The rules by which an answer is found and read."""
        return {"rules": RULES}


def _integer(answer: str) -> int | None:
    """The integer that an answer is, with a unit, ``x =`` or without."""
    text = clean(answer)
    text = _NAMED.sub("", whole_text(text) or text, count=1).strip()
    number = read_number(text) or read_number((split_unit(text) or ("", None))[0].strip())
    return int(number.value) if number and number.value.denominator == 1 else None


def _last_integer(text: str) -> int | None:
    numbers = _NUMBER.findall(_THOUSANDS.sub("", text.translate(_MINUS)))
    last = Decimal(numbers[-1].replace(",", "")) if numbers and len(numbers[-1]) <= LONGEST else None
    return int(last) if last is not None and last == last.to_integral_value() else None


@dataclass(frozen=True)
class MultipleChoice(Reward):
    """1.0 if the letter that the completion decides for is the gold one, else 0.0.

    That is the letter of the last ``\\boxed{}``, or that alone in the answer tags; without one, the last that is called
    the answer, option or choice; else the last that stands alone on a line.
    """

    kind: ClassVar[str] = "multiple_choice"

    def __call__(self, prompt: Prompt, text: str, completion: Completion) -> float:
        """1.0 or 0.0."""
        gold = _GOLD_LETTER.fullmatch(prompt.answer.strip())
        return float(gold is not None and _chosen_letter(text) == gold[1])

    def check_answer(self, answer: str) -> None:
        """Raise ValueError unless the gold answer is one capital letter, in brackets or not."""
        if not _GOLD_LETTER.fullmatch(answer.strip()):
            raise ValueError("it is not the letter of a choice, such as B or (B)")

    def depends_on(self) -> dict[str, Any]:
        """The rules by which an answer is found and read."""
        return {"rules": RULES}


def _chosen_letter(text: str) -> str | None:
    answer = find_answer(text)
    if answer.where != "end":
        letter = _BOXED_LETTER.match(_TEXT_BRACES.sub("", clean(answer.text)).strip())
        if letter or answer.where == "box":
            return letter[1] or letter[2] if letter else None
    for pattern in (_NAMED_LETTER, _LETTER_ALONE):
        found = pattern.findall(answer.text[-TAIL:])
        if found:
            return found[-1]
    return None
