"""Questions of the training data that are among the held-out ones, whatever their spacing, case and LaTeX dress."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Sequence

_LATEX_DRESS = re.compile(r"\\(?:(?:left|right|displaystyle|text|mathrm|quad)(?![a-z])|[,;:!()\[\] ])")
_FRACTION = re.compile(r"\\[dt]?frac(?![a-z])(?:\s*(\d)(?=\s*[\d{]))?")
_EMPHASIS = re.compile(
    r"(?<![\w)*])(?:\*\*(?=\S)([^*]+(?:\*[^*]+)*)(?<=\S)\*\*|\*(?=\S)([^*]+)(?<=\S)\*)(?![\w(*]| \d)"
)
"""Markdown's ``**bold**`` and ``*italic*``, whose asterisks multiply nothing; but 2 *3* 4 is a product."""
_SPACED = re.compile(r"[ $]{0,4}([*:])[ $]{0,4}| ([!'])")
"""Operators with what may stand around them, or before them."""
_OPERATOR = re.compile(
    r"\*(?<=[\w)].)\*?(?=[\w(\\-]|\.\d)"  # 2*3, 2**3
    r"|:(?<=\d.)(?=\.?\d)"  # 3:4
    r"|!(?<=[\w)].)(?<![^\W\d_]{2}.)!*"  # 5!, n!; not a word's
    r"|'(?<=[^\W\d_].)(?:'*(?= ?\()|(?<!'..)(?<![^\W\d_]{2}.)'*(?![\w']))"  # sin'(x), y''; not o'clock, 'y'
)
"""Marks that compute something, where they stand; elsewhere they are punctuation."""
_OPERATORS = str.maketrans("*:!'", "\u00d7\u2236\u01c3\u2032")
"""What stands for them in a normalised text: no dress."""
_DRESS = r"(?:[\s${}\"'`?!:;*_]|\.(?!\d)|,(?!\.?\d)|(?<!\d),|(?<=\.)\.(?=\d))+"
_BETWEEN_DIGITS, _ANYWHERE = re.compile(rf"(\d){_DRESS}(?=\.?\d)"), re.compile(_DRESS)
_RAISED, _LOWERED = re.compile("[⁰¹²³⁴-⁹⁺⁻ⁿ]+"), re.compile("[₀-₉]+")
_ANCHOR = 32
_STRIDE = 8
_CONTAINED = 64
"""A normalised question of so many characters is also found inside a longer text, such as one in a template."""


def normalise(question: str) -> str:
    """What is left of a question when two versions of it are to be equal.

    Letters in lower case and compatible forms (NFKC), numbers and operators, so that 1+2 and 1-2, 5! and 5, 2² and 22
    stay two questions; white space, quotes, punctuation, dollar signs, braces and LaTeX that only changes the look are
    gone. Of what is gone between two digits a comma stays: 12, 3 is not 1, 23. An operator is one however it is spaced;
    asterisks that enclose words as in Markdown are dress.

    >>> normalise("What is  $\\\\dfrac{1}{2}$ of 1,000?") == normalise("what is \\\\(\\\\frac12\\\\) of 1,000")
    True
    """
    text = question
    if not text.isascii():
        text = unicodedata.normalize("NFKC", _LOWERED.sub(r"_{\g<0>}", _RAISED.sub(r"^{\g<0>}", text)))
    text = text.casefold()
    if "\\" in text:
        text = _LATEX_DRESS.sub(" ", _FRACTION.sub(r"\\frac\1 ", text))
    text = _SPACED.sub(r"\1\2", _EMPHASIS.sub(r"\1\2", " ".join(text.split())))
    text = _OPERATOR.sub(lambda found: found[0].translate(_OPERATORS), text)
    return _ANYWHERE.sub("", _BETWEEN_DIGITS.sub(r"\1,", text))


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
