"""The normalised answer of a completion, as a text that can be counted for maj@k."""

from __future__ import annotations

import re
from fractions import Fraction

from nemo_aapo.text.answer import find_answer

LONGEST = 200
"""Most characters of an answer; a longer one is cut off, but still counts as a vote."""
_NUMBER = re.compile(r"[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d+)?(?:/\d+)?")
_LAST_NUMBER = re.compile(r"(?<![\w.])-?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?(?:/\d+)?")
_FRACTION = re.compile(r"\\[dt]?frac\{(-?\d+)\}\{(\d+)\}")
_WORDS = re.compile(r"\\(?:text|mathrm|mbox)\{([^{}]*)\}")
_DECORATION = re.compile(r"\\left|\\right|\\[!,;: ]|\^\\circ|\^\{\\circ\}|[\s~]|\\?[$%]")
_MOST_DIGITS = 30


def answer_of(text: str) -> str | None:
    """The normalised answer of a completion: what verifiers judge (``find_answer``) of answer tags or boxes, without
    these the last number. None for one that is empty, unfinished or not there.

    Normalised means: no white space, dollars, sizes of brackets, or units in \\text behind something else; numbers in
    lowest terms, so that 0.50, \\frac{1}{2} and 1/2 are one answer. Other expressions are the same if their texts are.
    """
    answer = find_answer(text)
    said = answer.text if answer.where != "end" else next(reversed(_LAST_NUMBER.findall(answer.text)), "")
    fractions = _FRACTION.sub(r"\1/\2", said)
    plain = _plain(_WORDS.sub("", fractions)) or _plain(_WORDS.sub(r"\1", fractions))
    return _in_lowest_terms(plain) or None


def _plain(text: str) -> str:
    return _DECORATION.sub("", text).rstrip(".")[:LONGEST]


def _in_lowest_terms(text: str) -> str:
    if not _NUMBER.fullmatch(text) or not re.search(r"\d", text) or len(text) > _MOST_DIGITS:
        return text
    number, _, below = text.replace(",", "").partition("/")
    if not re.search(r"\d", number) or (below and int(below) == 0):
        return text
    return str(Fraction(number) / int(below or 1))
