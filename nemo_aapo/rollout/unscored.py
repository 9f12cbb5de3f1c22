"""A reward that fails for everything ends the run with its message, instead of a training on nothing.

A failed scoring now and then costs its own completion. All of a first rollout, or many in a row later on, are no
accident: the reward is broken, or the server that it asks is gone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from nemo_aapo.errors import RewardError

TOTAL = "the weighted sum"
"""Stands among the names of rewards for their sum, which is what training needs."""
IN_A_ROW = 64
"""After a first success so many completions in a row must fail: a few may, where a rollout has no more."""


class Score(Protocol):
    """What a scorer says of one completion; ``rewards.workers.runner.RewardResult`` is one."""

    @property
    def score(self) -> float: ...
    @property
    def parts(self) -> Mapping[str, float]: ...
    @property
    def failure(self) -> str | None: ...
    @property
    def detail(self) -> str: ...


@dataclass(frozen=True, slots=True)
class Tally:
    """How many of some completions were scored.

    Example: ``Tally(4, {"accuracy": 3, "the weighted sum": 3}, "accuracy: took longer than 5 s; ...")``
    """

    completions: int = 0
    scored: dict[str, int] = field(default_factory=dict)
    """By the name of the reward, and ``TOTAL``."""
    detail: str = ""
    """Why the first of those failed to which a reward gave no value."""

    @classmethod
    def of(cls, scores: Sequence[Score]) -> Tally:
        """Of the scores of this rank."""
        scored: dict[str, int] = {}
        detail = ""
        for score in scores:
            values = {**score.parts, TOTAL: math.nan if score.failure else score.score}
            for name, value in values.items():
                scored[name] = scored.get(name, 0) + math.isfinite(value)
            if not detail and not all(map(math.isfinite, values.values())):
                detail = score.detail
        return cls(len(scores), scored, detail)

    def __add__(self, other: Tally) -> Tally:
        names = {**self.scored, **other.scored}
        scored = {name: self.scored.get(name, 0) + other.scored.get(name, 0) for name in names}
        return Tally(self.completions + other.completions, scored, self.detail or other.detail)


@dataclass(slots=True)
class ScoringWatch:
    """Looks at rollouts of one kind, one after the other; the same on all ranks."""

    needed: str = TOTAL
    """The reward without which a rollout is worth nothing."""
    proven: bool = False
    """Whether a rollout of this kind was scored before, here or in a process before this one."""
    in_a_row: int = 0
    """Completions that failed since the last success."""

    def check(self, tally: Tally, what: str, asked: int = 0) -> None:
        """Take in a rollout.

        Args:
            tally: over all ranks.
            what: the rollout, for the message: ``step 3``.
            asked: completions that were asked for, where a stop may break off a rollout: the few that ended before it
                are not taken for all of it, and say nothing.

        Raises:
            RewardError: a reward gives no value to any completion of the first rollout, or the needed one to none of
                the last ``IN_A_ROW`` or more.
        """
        if not tally.completions or tally.completions < asked:
            return
        self.in_a_row = 0 if tally.scored[self.needed] else self.in_a_row + tally.completions
        dead = [name for name, scored in tally.scored.items() if not scored]
        if not self.proven and dead:
            raise _broken(what, tally.completions, dead[0], tally.detail)
        if self.in_a_row >= IN_A_ROW:
            raise _broken(what, self.in_a_row, self.needed, tally.detail)
        self.proven = True


def _broken(what: str, completions: int, name: str, detail: str) -> RewardError:
    return RewardError(
        f"{what}: not one of {completions} completions in a row could be scored by {name}; the first failed with: "
        f"{detail or 'no value'}. What was finished before is kept. Mend the reward (scripts/doctor.py with the same "
        "settings scores a right and a wrong answer by it) or what it asks, or raise reward_runner.timeout_s; then the "
        "same command goes on"
    )
