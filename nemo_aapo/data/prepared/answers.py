"""The check of gold answers by the rewards, each different one once, in several processes where they have some."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from nemo_aapo.utils.text import TimeLeft, shorten

VerifyAnswer = Callable[[str], None]
"""Raises ValueError for a gold answer that the rewards can't work with."""
_BLOCK = 256
"""Answers from one look at the clock to the next."""


@dataclass(frozen=True)
class AnswerCheck:
    """Who checks gold answers."""

    verify: VerifyAnswer
    threads: int = 1
    """So many answers are asked for at a time; more than one where others do the work, such as reward workers."""
    definition: Any = None
    """What the verdicts depend on, as plain values; None: nobody knows."""
    note: Callable[[str], None] = logging.getLogger(__name__).info
    """Told how long it will take."""

    def refused(self, answers: Iterable[str], count: int) -> dict[str, str]:
        """What is wrong with each of the answers that the rewards can't work with.

        Args:
            answers: different ones.
            count: how many.
        """
        tell, checked = TimeLeft("checking the gold answers", self.note), 0
        found: dict[str, str] = {}
        with ThreadPoolExecutor(self.threads, "answers") as pool:
            ask = pool.map if self.threads > 1 else map
            for block in _blocks(answers):
                verdicts = zip(block, ask(self._verdict, block), strict=True)
                found.update((answer, verdict) for answer, verdict in verdicts if verdict)
                checked += len(block)
                tell(checked / count)
        return found

    def _verdict(self, answer: str) -> str:
        try:
            self.verify(answer)
        except ValueError as error:
            return f"the gold answer {shorten(answer)} can't be verified: {error}"
        return ""


def _blocks(answers: Iterable[str]) -> Iterator[list[str]]:
    remaining = iter(answers)
    while block := list(itertools.islice(remaining, _BLOCK)):
        yield block
