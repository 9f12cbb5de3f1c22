"""Questions of the training data that are among the held-out ones, whatever their spacing, case and LaTeX dress."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Sequence

_LATEX_DRESS = re.compile(r"\\(?:left|right|displaystyle|text|mathrm|,|;|!|quad)(?![a-z])|\\[()\[\]]|\\ ")
_FRACTION = re.compile(r"\\[dt]frac(?![a-z])")
_DRESS = re.compile(r"[\s${}\"'`?!:;*_]|[.,](?!\d)|(?<!\d)[.,]")
_ANCHOR = 32
_STRIDE = 8
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
    if "\\" in text:
        text = _LATEX_DRESS.sub("", _FRACTION.sub(r"\\frac", text))
    return _DRESS.sub("", text)


class HeldOut:
    """Held-out questions, by normalised text."""

    def __init__(self, questions: Iterable[str]) -> None:
        self._exact: dict[str, str] = {}
        self._anchors: dict[str, list[tuple[str, int]]] = {}
        for question in questions:
            text = normalise(question)
            if text and text not in self._exact:
                self._exact[text] = question
                for offset in range(0, _ANCHOR, _STRIDE) if len(text) >= _CONTAINED else ():
                    self._anchors.setdefault(text[offset : offset + _ANCHOR], []).append((text, offset))

    def match(self, question: str) -> str | None:
        """The one, as it was given, that a question is, or contains and is long enough not to be there by chance."""
        text = normalise(question)
        found = text if text in self._exact else self._contained(text)
        return self._exact[found] if found else None

    def _contained(self, text: str) -> str:
        """A held-out text inside this one; empty if there is none.

        Its pieces that begin ``_STRIDE`` apart are looked for at the first ``_STRIDE`` of every ``_ANCHOR`` places: one
        of them begins there wherever the text itself begins.
        """
        for block in range(0, len(text) - _ANCHOR + 1 if self._anchors else 0, _ANCHOR):
            for place in range(block, block + _STRIDE):
                for candidate, offset in self._anchors.get(text[place : place + _ANCHOR], ()):
                    if place >= offset and text.startswith(candidate, place - offset):
                        return candidate
        return ""


def overlap(questions: Iterable[str], held_out: Iterable[str]) -> dict[int, str]:
    """Which questions of the training data are held-out ones, or contain one.

    Returns:
        Index in ``questions`` -> the held-out question, as it was given.
    """
    known = HeldOut(held_out)
    matches = ((index, known.match(question)) for index, question in enumerate(questions))
    return {index: match for index, match in matches if match is not None}


def conflicts(questions: Sequence[str], answers: Sequence[str]) -> list[list[int]]:
    """Groups of indices with one question, by normalised text, and different answers."""
    groups: dict[str, list[int]] = {}
    for index, question in enumerate(questions):
        groups.setdefault(normalise(question), []).append(index)
    return [group for group in groups.values() if len({answers[i] for i in group}) > 1]
