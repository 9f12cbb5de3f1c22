"""Accuracy: 1 if the completion's answer equals the gold answer as mathematics, else 0. math-verify judges equality."""

from __future__ import annotations

import functools
import importlib.metadata
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from nemo_aapo.rewards.base import Reward
from nemo_aapo.rewards.verdict import RULES
from nemo_aapo.rewards.verdict.compare import same_answer
from nemo_aapo.rewards.verdict.mathematics import math_verify
from nemo_aapo.rewards.verdict.reading import Formula, Reading, Words, read
from nemo_aapo.text.answer import find_answer, is_missing
from nemo_aapo.types import Completion, Prompt

_WORD = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{2,}")  # of which a sentence in the answer tags has several


@dataclass(frozen=True)
class Accuracy(Reward):
    """1.0 if the answer is right, else 0.0.

    What stands in the answer tags counts, else the last ``\\boxed{}``; without either, what math-verify finds last in
    the last 1,000 characters, plain numbers included.
    """

    kind: ClassVar[str] = "accuracy"
    takes_integers: ClassVar[bool] = True

    @property
    def in_process(self) -> bool:
        """False: ``9^{9^{9^9}}`` never ends."""
        return False

    def __call__(self, prompt: Prompt, text: str, completion: Completion) -> float:
        """Raises ValueError if the gold answer can't be read: such a prompt has no right answer."""
        return float(_is_correct(prompt.answer, text))

    def check_answer(self, answer: str) -> None:
        """Raise ValueError unless a completion that boxes the gold answer itself would be judged right."""
        gold = read_gold(answer)
        if not same_answer(gold, gold):
            raise ValueError(f"math-verify doesn't judge {answer!r} to be equal to itself")

    def depends_on(self) -> dict[str, Any]:
        """Our own rules, and the versions of math-verify and of its LaTeX parser."""
        return {"rules": RULES} | {
            name: importlib.metadata.version(name) for name in ("math-verify", "latex2sympy2_extended")
        }

    def load(self) -> None:
        """Import math-verify (and sympy) and compile its patterns."""
        self.check_answer("x")


def _is_correct(gold: str, text: str) -> bool:
    wanted = read_gold(gold)
    answer = find_answer(text)
    if answer.where == "end":
        return same_answer(wanted, _search(answer.text))
    said = read(answer.text) if answer.text else ()
    if same_answer(wanted, said):  # the gold answer goes first: math-verify's comparison is not symmetric
        return True
    sentence = answer.where == "tags" and len(_WORD.findall(answer.text)) > 1 and not (said and _is_value(said[0]))
    return sentence and same_answer(wanted, _search(answer.text))


def _is_value(reading: Reading) -> bool:
    return not isinstance(reading, Words | Formula)


def _search(text: str) -> Sequence[Reading]:
    """What math-verify finds last in a text that marks no answer."""
    for found in reversed(math_verify().find(text)):  # the spelling, which has what math-verify drops, comes last
        if reading := read(found if isinstance(found, str) else str(found)):
            return reading
    return ()


@functools.lru_cache(maxsize=4096)
def read_gold(answer: str) -> Sequence[Reading]:
    """What a gold answer may mean.

    Raises:
        ValueError: it stands for a missing value, or is neither mathematics nor words.
    """
    if is_missing(answer):
        raise ValueError(f"{answer.strip()!r} is what programs write for a missing value")
    boxed = find_answer(answer)
    reading = read(answer if boxed.where == "end" else boxed.text)
    if not reading:
        raise ValueError("math-verify can't parse it as mathematics")
    return reading
