"""Which part of a completion is its answer: what stands in the answer tags, else in the last box opened, else its end.

Nothing before the last box and nothing outside the tags is looked at, so that no other number that the model wrote can
take the place of an answer that is wrong, unfinished or empty.
"""

from __future__ import annotations

import re
from typing import Literal, NamedTuple

LONGEST = 2000
"""Most characters of a marked answer; a longer one is nobody's answer and counts as unfinished."""
TAIL = 1000
"""Without a box and tags the answer is looked for in this many last characters."""
_MOST_BOXES = 20
"""Most boxes that are one answer together."""
OPENING_TAG, CLOSING_TAG = "<answer>", "</answer>"
END_OF_THOUGHT = "</think>"
"""Without a box and answer tags the answer stands behind it, if it is there."""

MISSING = frozenset({"nan", "inf", "infinity", "none", "null", "n/a", "#n/a", "<na>", "nat"})
"""What programs write, in any case and with either sign, where there is no answer."""

_BOXES = ("\\boxed", "\\fbox")
# TeX also boxes what follows without braces. Any other \boxed is mentioned, not opened: "put it in \boxed form".
_BRACED = re.compile(r"\s*\{")
_CUT = re.compile(r"\s*\Z")  # a completion that ran into its limit between the command and its brace
_BARE = re.compile(r"\s*(?:\$\s*)?([-+]?\d[\d.,/]*|\\[a-zA-Z][^\s$]*)")
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)  # an escaped brace is a character of a set, such as \{1, 2\}
_BETWEEN_BOXES = re.compile(
    r"(?:[\s$,;&*]|\\[,;:!()\[\] \\]|\\q?quad\b|\\(?:text|mbox)\s*\{\s*,?\s*(?:and|or)\s*\}|(?:and|or)\b"
    r"|(?:[A-Za-z]|\\[a-z]+)(?:_\w|_\{\w+\})?\s*=)*"
)


class Answer(NamedTuple):
    """The answer's text, and where it stood. An empty text is an answer that is empty, unfinished or far too long."""

    text: str
    where: Literal["box", "tags", "end"]
    """``"end"``: neither box nor tags; the text is the completion's end, in which the answer is to be looked for."""


class _Box(NamedTuple):
    start: int
    end: int
    """The place behind the box; where it is unfinished, that of its content."""
    content: str | None
    """None: unfinished."""


def find_answer(text: str, tail: int = TAIL) -> Answer:
    """The answer of a completion.

    Args:
        tail: without a box and tags the text is this many last characters, from a space on: no number is cut in two.

    Example: ``find_answer("\\\\boxed{8}, no: $x = \\\\boxed{9}$").text == "9"``
    """
    begin = text.rfind(OPENING_TAG)
    if begin < 0:
        return _boxed(text) or Answer(_end(text.rpartition(END_OF_THOUGHT)[2], tail), "end")
    inside, closed, _ = text[begin + len(OPENING_TAG) :].partition(CLOSING_TAG)
    if boxed := _boxed(inside):
        return boxed
    return Answer(inside.strip() if closed and len(inside) <= LONGEST else "", "tags")


def _end(text: str, tail: int) -> str:
    return text if len(text) <= tail else text[-tail:].partition(" ")[2]


def tagged(text: str) -> str | None:
    """What the last answer tags of a completion hold; None without a whole pair."""
    _, opened, behind = text.rpartition(OPENING_TAG)
    inside, closed, _ = behind.partition(CLOSING_TAG)
    return inside if opened and closed else None


def _boxed(text: str) -> Answer | None:
    """What the last box holds, together with the boxes that stand right before it; None without a box."""
    box = _last_box(text)
    if box is None:
        return None
    contents = [box.content]
    while len(contents) < _MOST_BOXES and (before := _neighbour(text, box.start)) is not None:
        contents.append(before.content)
        box = before
    parts = list(dict.fromkeys(content.strip() if content else "" for content in reversed(contents)))
    return Answer(", ".join(parts) if all(parts) else "", "box")


def _neighbour(text: str, end: int) -> _Box | None:
    """The box before ``end``, if nothing but separators, dollars, spaces and ``x =`` stands between."""
    window = text[max(0, end - LONGEST) : end]
    box = _last_box(window)
    if box is None or box.content is None or not _BETWEEN_BOXES.fullmatch(window, box.end):
        return None
    return box._replace(start=end - len(window) + box.start)


def _last_box(text: str) -> _Box | None:
    places = {command: text.rfind(command) for command in _BOXES}
    while (start := max(places.values())) >= 0:
        command = next(command for command in _BOXES if places[command] == start)
        if box := _open_box(text, start, start + len(command)):
            return box
        places[command] = text.rfind(command, 0, start)  # only this one: a search through all of it again is quadratic
    return None


def _open_box(text: str, start: int, behind: int) -> _Box | None:
    """The box whose command ends at ``behind``; None where the command is only mentioned."""
    if braced := _BRACED.match(text, behind):
        begin = braced.end()
        end = closing_brace(text[begin : begin + LONGEST])
        return _Box(start, begin, None) if end is None else _Box(start, begin + end + 1, text[begin : begin + end])
    if _CUT.match(text, behind):
        return _Box(start, behind, None)
    bare = _BARE.match(text, behind, behind + LONGEST)
    return _Box(start, bare.end(), bare[1]) if bare else None


def closing_brace(text: str) -> int | None:
    """The index of the brace that closes one which was opened before ``text``; None if none does."""
    depth = 1
    for brace in _BRACE.finditer(text):
        depth += {"{": 1, "}": -1}.get(brace[0], 0)
        if depth == 0:
            return brace.start()
    return None


def is_missing(answer: str) -> bool:
    """Whether a gold answer is what a program wrote for a missing value, such as nan or None."""
    bare = answer.strip()
    return bare.lstrip("+-").casefold() in MISSING or bare == "NA"
