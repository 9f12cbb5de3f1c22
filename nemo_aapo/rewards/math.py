"""Accuracy by math-verify: 1 if the completion's answer equals the gold answer as mathematics, else 0.

math-verify limits its time with ``signal.alarm``, which works in a main thread only and cannot interrupt C code.
Its limits are switched off here, as ``RewardRunner`` kills a worker that is over time.
"""

from __future__ import annotations

import functools
import importlib.metadata
import logging
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

from nemo_aapo.rewards.base import Reward
from nemo_aapo.types import Completion, Prompt
from nemo_aapo.utils.libraries import importing

RULES = 2
"""Number that rises when this module comes to judge an answer otherwise: stored reference rewards belong to one."""

# The searched part of a completion: math-verify's patterns cost time that grows faster than the text.
_BEFORE_BOX = 500
_AFTER_BOX = 2000
_UNBOXED_TAIL = 1000
_DOLLAR = re.compile(r"(?<!\\)\$")  # around mathematics; \$5 is an amount
# Left out of both answers, as MATH's own comparison does: 12\% is 12. math-verify takes \boxed{12\%} for a mere text.
_PERCENT = re.compile(r"\\?%")
# 4.5e33 and 3e-12, as Minerva's answers are written; 2e-3 may as well be 2e less 3, and stays what LaTeX makes of it.
_SCIENTIFIC = re.compile(r"(?<![\w.\\])(\d+\.\d+[eE][-+]?\d+|\d+[eE][-+]?\d{2,})(?![\w.])")
_BRACES = re.compile(r"\\.|[{}]")  # an escaped brace is a character of a set, such as \{1, 2\}


@dataclass(frozen=True)
class Accuracy(Reward):
    """1.0 if the answer is right, else 0.0.

    The last ``\\boxed{}`` of the completion counts; without one, what math-verify finds last in the last 1,000
    characters, plain numbers included.
    """

    kind: ClassVar[str] = "accuracy"
    takes_integers: ClassVar[bool] = True

    @property
    def in_process(self) -> bool:
        """False: ``9^{9^{9^9}}`` never ends."""
        return False

    def __call__(self, prompt: Prompt, text: str, completion: Completion) -> float:
        """Raises ValueError if the gold answer can't be parsed: such a prompt has no right answer."""
        return float(_is_correct(prompt.answer, text))

    def check_answer(self, answer: str) -> None:
        """Raise ValueError unless a completion that boxes the gold answer itself would be judged right."""
        _parse_gold(answer)
        boxed = answer if "\\boxed" in answer else f"\\boxed{{{_DOLLAR.sub('', answer)}}}"
        if not _is_correct(answer, boxed):
            raise ValueError(f"math-verify doesn't judge {boxed!r} to be equal to it")

    def depends_on(self) -> dict[str, Any]:
        """Our own rules, and the versions of math-verify and of its LaTeX parser."""
        return {"rules": RULES} | {
            name: importlib.metadata.version(name) for name in ("math-verify", "latex2sympy2_extended")
        }

    def load(self) -> None:
        """Import math-verify (and sympy) and compile its patterns."""
        self.check_answer("1")


def _is_correct(gold: str, text: str) -> bool:
    # The gold answer goes first: math_verify.verify is not symmetric.
    return _math_verify().verify(_parse_gold(gold), _math_verify().parse(_answer_window(text)), timeout_seconds=None)


def _answer_window(text: str) -> str:
    """The part of a completion that holds its answer: up to the end of the last box, or the last characters."""
    box = text.rfind("\\boxed")
    if box >= 0:
        boxed = _up_to_closing_brace(text[box : box + _AFTER_BOX])
        return text[max(0, box - _BEFORE_BOX) : box] + _as_latex(boxed)
    if len(text) <= _UNBOXED_TAIL:
        return text
    return text[-_UNBOXED_TAIL:].partition(" ")[2]  # from a space on, so that no number is cut in two


def _as_latex(answer: str) -> str:
    """What math-verify's LaTeX parser misreads, as it reads it."""
    return _SCIENTIFIC.sub(_power_of_ten, _PERCENT.sub("", answer))


def _power_of_ten(number: re.Match[str]) -> str:
    digits, _, exponent = number[0].lower().partition("e")
    return f"{digits} \\times 10^{{{exponent.removeprefix('+')}}}"


def _up_to_closing_brace(text: str) -> str:
    """``text`` up to the brace that closes its first one; all of it if none does."""
    depth = 0
    for brace in _BRACES.finditer(text):
        depth += {"{": 1, "}": -1}.get(brace[0], 0)
        if depth == 0 and brace[0] == "}":
            return text[: brace.end()]
    return text


@functools.lru_cache(maxsize=4096)
def _parse_gold(answer: str) -> list[Any]:
    """The gold answer parsed as LaTeX: bare ``(3, \\pi)`` would otherwise be taken for a text that holds a 3."""
    bare = _as_latex(answer)
    parsed = _math_verify().parse(bare if "\\boxed" in bare or _DOLLAR.search(bare) else f"${bare}$")
    if all(isinstance(p, str) for p in parsed):
        raise ValueError("math-verify can't parse it as mathematics")
    return parsed


class _MathVerify(NamedTuple):
    parse: Callable[[str], list[Any]]
    """A text -> what it may mean, as sympy's expressions or, at worst, as strings."""
    verify: Callable[..., bool]
    """Whether the first parsed answer, the gold one, equals the second."""


@functools.cache
def _math_verify() -> _MathVerify:
    """``parse`` and ``verify``, imported late: sympy takes most of a second."""
    with importing():
        from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

    # It warns that time limits are off, once a process; here that is on purpose.
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    targets = (LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig())
    parse_any: Callable[[str], list[Any]] = functools.partial(parse, extraction_config=targets, parsing_timeout=None)
    return _MathVerify(parse_any, verify)
