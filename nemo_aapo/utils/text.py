"""Small texts for people: a value in a message, and how long something will take."""

from __future__ import annotations

import time
from collections.abc import Callable

FIRST_S = 5.0
"""Seconds until the first line about something that takes long."""
EVERY_S = 10.0
"""Seconds from one to the next."""


def shorten(value: object) -> str:
    """A value for a message, at most 80 characters."""
    try:
        text = repr(value)
    except RecursionError:
        return f"a {type(value).__name__} that is nested too deep"
    return text if len(text) <= 80 else text[:77] + "..."


class TimeLeft:
    """Says now and then how far something is: nothing where it is soon over, then a line every few seconds.

    Example: ``checking the gold answers: 40%, about 25 s left``
    """

    def __init__(self, what: str, note: Callable[[str], None], clock: Callable[[], float] = time.monotonic) -> None:
        """Args: note: takes the lines; clock: seconds."""
        self._what, self._note, self._clock = what, note, clock
        self._next = clock() + FIRST_S
        self._first: tuple[float, float] | None = None  # when it was first told, and what

    def __call__(self, done: float) -> None:
        """Args: done: from 0 to 1."""
        now = self._clock()
        since, before = self._first = self._first or (now, done)  # what came before was getting ready
        if now < self._next or not before < done < 1:
            return
        self._next = now + EVERY_S
        left = (now - since) * (1 - done) / (done - before)
        self._note(f"{self._what}: {done:.0%}, about {_duration(left)} left")


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"
