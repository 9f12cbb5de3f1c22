"""Answers that are words: told from products of letters, compared without case, spaces and punctuation."""

from __future__ import annotations

import re
import unicodedata

_SHORT_WORDS = frozenset({"no", "on"})
_LETTERS_OF_VARIABLES = frozenset("abcdxyz")
_MOST_WORDS = 8
_MATHEMATICS = re.compile(r"[\\^_=<>{}+*|&$@#\[\]~]|\d\s*[-/]|[-/]\s*\d")
_LETTERS = re.compile(r"[^\W\d_]+")


def is_word(letters: str) -> bool:
    """Whether letters without spaces are a word (ten, even) rather than a product of variables (ab, xyz, mgh)."""
    if not letters.isascii():
        return len(letters) > 1 or unicodedata.category(letters) == "Lo"
    small = letters.casefold()
    if len(small) < 3:
        return small in _SHORT_WORDS
    return not set(small) <= _LETTERS_OF_VARIABLES and not set(small).isdisjoint("aeiouy")


def read_words(text: str, spoken: bool) -> str | None:
    """The words that an answer is, in one spelling, or None if it is something else.

    Args:
        spoken: it stood in ``\\\\text{}``, so that any letters are words.
    """
    bare = text.replace("\\text{", " ").replace("}", " ") if "\\text{" in text else text
    runs = _LETTERS.findall(bare)
    if _MATHEMATICS.search(bare) or not any(len(run) > 1 or not run.isascii() for run in runs):
        return None
    if not (spoken or bare is not text) and (not any(map(is_word, runs)) or len(runs) > _MOST_WORDS):
        return None
    return "".join(character for character in bare.casefold() if character.isalnum())
