"""Rewards by comparing text: an exact answer, the last number, the letter of a choice.

They are cheap and always end, so that they may run in the trainer's own process.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from decimal import Decimal
from typing import ClassVar

from nemo_aapo.rewards.base import Reward
from nemo_aapo.types import Completion, Prompt

_INTEGER = re.compile(r"[-+]?\d+")
# A minus is a sign unless it stands behind an operand: "7-3" holds 7 and 3, "= -3" holds -3.
_NUMBER = re.compile(r"(?:(?<![\w)])-)?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?")
_GOLD_LETTER = re.compile(r"\(?([A-Z])\)?[.:]?")
_BOXED_LETTER = re.compile(r"\\boxed\s*\{\s*(?:\\(?:text|textbf|mathrm|mathbf)\s*\{\s*)?\(?\s*([A-Z])\b")
_NAMED_LETTER = re.compile(r"(?i:answer|option|choice)(?i:\s+is|\s*[:=])?\s*:?[\s*_$]*\(?([A-Z])\b(?!')")
_LETTER_ALONE = re.compile(r"(?:^|\n)[\s*_$]*\(?([A-Z])[).]?[\s*_$.]*(?=\n|$)")
_TAIL = 1000
"""Where there is no box, the answer is looked for in this many last characters."""


@dataclass(frozen=True)
class Exact(Reward):
    """1.0 if the completion is the gold answer, white space around either aside, else 0.0."""

    kind: ClassVar[str] = "exact"

    def __call__(self, prompt: Prompt, text: str, completion: Completion) -> float:
        """1.0 or 0.0."""
        return float(text.strip() == prompt.answer.strip())


@dataclass(frozen=True)
class Integer(Reward):
    """1.0 if the last number of the completion (of its last ``\\boxed{}``, if it has one) is the gold integer."""

    kind: ClassVar[str] = "integer"
    takes_integers: ClassVar[bool] = True

    def __call__(self, prompt: Prompt, text: str, completion: Completion) -> float:
        """1.0 or 0.0; thousands commas are allowed, and ``7.0`` is 7."""
        _, box, boxed = text.rpartition("\\boxed{")
        numbers = _NUMBER.findall(boxed.partition("}")[0] if box else text)
        return float(bool(numbers) and Decimal(numbers[-1].replace(",", "")) == Decimal(prompt.answer))

    def check_answer(self, answer: str) -> None:
        """Raise ValueError unless the gold answer is an integer."""
        if not _INTEGER.fullmatch(answer.strip()):
            raise ValueError("it is not an integer; use the reward 'exact' or 'accuracy'")


@dataclass(frozen=True)
class MultipleChoice(Reward):
    """1.0 if the letter that the completion decides for is the gold one, else 0.0.

    That is the letter of the last ``\\boxed{}``; without one, the last that is called the answer, option or choice;
    else the last that stands alone on a line.
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


def _chosen_letter(text: str) -> str | None:
    box = text.rfind("\\boxed")
    if box >= 0:
        boxed = _BOXED_LETTER.match(text, box)
        return boxed[1] if boxed else None
    for pattern in (_NAMED_LETTER, _LETTER_ALONE):
        found = pattern.findall(text[-_TAIL:])
        if found:
            return found[-1]
    return None
