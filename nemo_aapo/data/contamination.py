"""Questions of the training data that are among the held-out ones, whatever their spacing, case and LaTeX dress."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Sequence

_LATEX_DRESS = re.compile(r"\\(?:left|right|displaystyle|text|mathrm|,|;|!|quad)(?![a-z])|\\[()\[\]]|\\ ")
_FRACTION = re.compile(r"\\[dt]frac(?![a-z])")
_DRESS = re.compile(r"[\s${}\"'`?!:;*_]|[.,](?!\d)|(?<!\d)[.,]")
_ANCHOR = 32
_CONTAINED = 64
"""A normalised question of so many characters is also found inside a longer text, such as one in a template."""


def normalise(question: str) -> str:
    """What is left of a question when two versions of it are to be equal.

    Letters in lower case and compatible forms (NFKC), digits and operators, so that 1+2 and 1-2 stay two questions;
    white space, quotes, punctuation, dollar signs, braces and LaTeX that only changes the look are gone.

    >>> normalise("What is  $\\\\dfrac{1}{2}$ of 1,000?") == normalise("what is \\\\(\\\\frac{1}{2}\\\\) of 1,000")
    True
    """
    text = unicodedata.normalize("NFKC", question).casefold()
    return _DRESS.sub("", _LATEX_DRESS.sub("", _FRACTION.sub(r"\\frac", text)))


def overlap(questions: Sequence[str], held_out: Iterable[str]) -> dict[int, str]:
    """Which questions are held-out ones, or contain one that is long enough not to be there by chance.

    Args:
        questions: of the training data.
        held_out: of the evaluation data.

    Returns:
        Index in ``questions`` -> the held-out question, as it was given.
    """
    exact: dict[str, str] = {}
    anchors: dict[str, list[str]] = {}
    for question in held_out:
        text = normalise(question)
        if text and text not in exact:
            exact[text] = question
            if len(text) >= _CONTAINED:
                anchors.setdefault(text[:_ANCHOR], []).append(text)
    found = {}
    for index, question in enumerate(questions):
        text = normalise(question)
        match = text if text in exact else _contained(text, anchors)
        if match:
            found[index] = exact[match]
    return found


def _contained(text: str, anchors: dict[str, list[str]]) -> str:
    """A held-out text inside this one; empty if there is none."""
    for start in range(len(text) - _CONTAINED + 1 if anchors else 0):
        for candidate in anchors.get(text[start : start + _ANCHOR], ()):
            if text.startswith(candidate, start):
                return candidate
    return ""


def conflicts(questions: Sequence[str], answers: Sequence[str]) -> list[list[int]]:
    """Groups of indices with one question, by normalised text, and different answers."""
    groups: dict[str, list[int]] = {}
    for index, question in enumerate(questions):
        groups.setdefault(normalise(question), []).append(index)
    return [group for group in groups.values() if len({answers[i] for i in group}) > 1]
