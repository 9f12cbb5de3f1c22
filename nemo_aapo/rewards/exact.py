"""Exact matches: cheap, and safe in the trainer's own process."""

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

    def __call__(self, prompt: Prompt, text: str, completion: Completion) -> float:
        """1.0 or 0.0; thousands commas are allowed, and ``7.0`` is 7."""
        _, box, boxed = text.rpartition("\\boxed{")
        numbers = _NUMBER.findall(boxed.partition("}")[0] if box else text)
        return float(bool(numbers) and Decimal(numbers[-1].replace(",", "")) == Decimal(prompt.answer))

    def check_answer(self, answer: str) -> None:
        """Raise ValueError unless the gold answer is an integer."""
        if not _INTEGER.fullmatch(answer.strip()):
            raise ValueError("it is not an integer; use the reward 'exact' or 'accuracy'")
