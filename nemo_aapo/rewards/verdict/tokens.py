"""An answer's tokens, brackets and top level: where a list, a relation or a union falls into its parts."""

from __future__ import annotations

import re
from collections.abc import Iterator

DEEPEST = 20
"""Most brackets in brackets; an answer with more reads as nothing."""
SIGNS = frozenset({"=", "<", ">", "\\le", "\\ge", "\\ne", "\\in", "\\approx", "\\equiv"})
"""What stands between the sides of a relation."""

_TOKEN = re.compile(r"\\(?:[a-zA-Z]+|.)|.", re.DOTALL)
_OPENING = frozenset({"(", "[", "{", "\\{"})
_CLOSING = frozenset({")", "]", "}", "\\}"})
_THOUSANDS = re.compile(r"(?<![\d,.])\d{1,3}(?:,\d{3})+(?!\d|,\d)")
_NAME = re.compile(
    r"(?:\\text\{[^{}]*\}|\\[a-zA-Z]+|[A-Za-z]|['\s|]|\{[A-Za-z]\}|_(?:\w|\{\w+\})|\^ *\{ *-1 *\}"
    r"|\([a-zA-Z](?:, *[a-zA-Z])*\))+"
)
_CONSTANTS = frozenset({"e", "i", "\\pi", "\\infty", "\\emptyset"})


class UnreadableError(Exception):
    """An answer, or a part of one, that is nothing that can be compared."""


def top_level(text: str) -> Iterator[tuple[str, int]]:
    """Each token outside brackets, ``\\text{}`` and environments, with the place of its end.

    Raises:
        UnreadableError: brackets that don't close, or too many.
    """
    depth = 0
    for token in _TOKEN.finditer(text):
        word = token[0]
        if word in _CLOSING or word == "\\end":
            depth -= 1
        elif depth == 0 and word not in _OPENING and word != "\\begin":
            yield word, token.end()
        depth += word in _OPENING or word == "\\begin"
        if depth < 0 or depth > DEEPEST:
            raise UnreadableError
    if depth:
        raise UnreadableError


def split(text: str, separators: frozenset[str] | set[str]) -> Iterator[str]:
    """The parts of a text between separators outside brackets."""
    start = 0
    for token, end in top_level(text):
        if token in separators:
            yield text[start : end - len(token)]
            start = end
    yield text[start:]


def enclosed(text: str) -> tuple[str, str]:
    """The pair of brackets around all of a text, such as ``"[)"``, and what it holds; two empty texts without one."""
    tokens = [token[0] for token in _TOKEN.finditer(text)]
    if len(tokens) < 2 or tokens[0] not in _OPENING - {"{"} or tokens[-1] not in _CLOSING:
        return "", ""
    depth = 0
    for token in tokens[:-1]:
        depth += (token in _OPENING) - (token in _CLOSING)
        if depth == 0:
            return "", ""
    return (tokens[0] + tokens[-1]).replace("\\", ""), "".join(tokens[1:-1]).strip()


def commas(text: str) -> bool:
    """Whether a text is a list."""
    return any(token in (",", ";") for token, _ in top_level(text))


def parts(text: str) -> list[str]:
    """The parts of a list. Where spaces or semicolons part them, commas between three digits are thousands."""
    if any(token == ";" for token, _ in top_level(text)):
        return list(split(text, {";"}))
    return list(split(_THOUSANDS.sub(_joined, text) if ", " in text else text, {","}))


def _joined(number: re.Match[str]) -> str:
    return number[0].replace(",", "")


def has_sign(text: str) -> bool:
    """Whether a text is a relation."""
    return any(token in SIGNS for token, _ in top_level(text))


def is_name(text: str) -> bool:
    """Whether it is what a value is given to (x, f(x), \\angle A), rather than a value itself."""
    return bool(_NAME.fullmatch(text.strip())) and spelled(text) not in _CONSTANTS


def spelled(text: str) -> str:
    """A name without spaces and braces."""
    return "".join(text.split()).replace("{", "").replace("}", "")
