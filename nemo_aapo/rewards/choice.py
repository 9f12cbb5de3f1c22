"""Multiple choice: the letter of the right answer."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import ClassVar

from nemo_aapo.rewards.base import Reward
from nemo_aapo.types import Completion, Prompt

_GOLD = re.compile(r"\(?([A-Z])\)?[.:]?")
_BOX = re.compile(r"\\boxed\s*\{\s*(?:\\(?:text|textbf|mathrm|mathbf)\s*\{\s*)?\(?\s*([A-Z])\b")
_SAID = re.compile(r"(?i:answer|option|choice)(?i:\s+is|\s*[:=])?\s*:?[\s*_$]*\(?([A-Z])\b(?!')")
_ALONE = re.compile(r"(?:^|\n)[\s*_$]*\(?([A-Z])[).]?[\s*_$.]*(?=\n|$)")
_TAIL = 1000
"""Without a box the answer is looked for in so many last characters."""


@dataclass(frozen=True)
class MultipleChoice(Reward):
    """1.0 if the letter that the completion decides for is the gold one, else 0.0.

    That is the letter of the last ``\\boxed{}``; without one, the last that is called the answer, option or choice;
    else the last that stands alone on a line.
    """

    kind: ClassVar[str] = "multiple_choice"

    def __call__(self, prompt: Prompt, text: str, completion: Completion) -> float:
        """1.0 or 0.0."""
        gold = _GOLD.fullmatch(prompt.answer.strip())
        return float(gold is not None and _decision(text) == gold[1])

    def check_answer(self, answer: str) -> None:
        """Raise ValueError unless the gold answer is one capital letter, in brackets or not."""
        if not _GOLD.fullmatch(answer.strip()):
            raise ValueError("it is not the letter of a choice, such as B or (B)")


def _decision(text: str) -> str | None:
    box = text.rfind("\\boxed")
    if box >= 0:
        boxed = _BOX.match(text, box)
        return boxed[1] if boxed else None
    for pattern in (_SAID, _ALONE):
        found = pattern.findall(text[-_TAIL:])
        if found:
            return found[-1]
    return None
