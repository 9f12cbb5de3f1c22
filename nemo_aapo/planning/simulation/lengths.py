"""Lengths of completions, drawn by a seed: log-normal by their mean and their tail, or those that a run kept."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist
from typing import Protocol

from nemo_aapo.errors import ConfigError
from nemo_aapo.run.names import ROLLOUTS

EULER = 0.5772156649015329
SHORTEST_SAMPLE = 100
"""Kept completions that are fewer say nothing about a tail."""


class Lengths(Protocol):
    """A distribution of completion lengths."""

    def draw(self, count: int, seed: str) -> list[int]:
        """``count`` lengths in tokens, the same for the same seed."""
        ...

    def __str__(self) -> str: ...


@dataclass(frozen=True)
class LogNormal:
    """Log-normal lengths, cut at a limit.

    Example:
        ``LogNormal(mean=1000, tail_factor=5, completions=512, limit=8192)``: of 512 completions the longest has about
        5,000 tokens. ``tail_factor=1`` makes all lengths equal.
    """

    mean: float
    """Tokens, before they are cut."""
    tail_factor: float
    """Longest completion of a step over the mean; the metric ``rollout/tail_factor``."""
    completions: int
    """Completions of a step."""
    limit: int

    def __post_init__(self) -> None:
        if self.tail_factor > (most := math.exp(self._normal_maximum() ** 2 / 2)) or self.tail_factor < 1:
            raise ConfigError(
                f"tail_factor={self.tail_factor:g}: the longest of {self.completions} log-normal completions over "
                f"their mean lies between 1 and {most:.1f}"
            )

    def _normal_maximum(self) -> float:
        """About the mean of the largest of so many standard normal numbers, by their Gumbel limit."""
        return max(0.0, NormalDist().inv_cdf(1 - math.exp(-EULER) / (self.completions + 1)))

    @property
    def sigma(self) -> float:
        """Standard deviation of the logarithm: the smaller solution of exp(sigma z - sigma^2 / 2) = tail_factor."""
        z = self._normal_maximum()
        return z - math.sqrt(max(0.0, z * z - 2 * math.log(self.tail_factor)))

    def draw(self, count: int, seed: str) -> list[int]:
        """See ``Lengths.draw``."""
        source, sigma = random.Random(seed), self.sigma
        middle = math.log(self.mean) - sigma**2 / 2
        drawn = (math.exp(source.gauss(middle, sigma)) for _ in range(count))
        return [max(1, min(self.limit, round(length))) for length in drawn]

    def __str__(self) -> str:
        return f"log-normal, mean {self.mean:,.0f}, longest {self.tail_factor:g} x"


@dataclass(frozen=True)
class Kept:
    """The lengths of the completions that a run kept, each as likely as the others."""

    lengths: Sequence[int]
    source: str
    """The run's directory."""

    def draw(self, count: int, seed: str) -> list[int]:
        """See ``Lengths.draw``."""
        return random.Random(seed).choices(self.lengths, k=count)

    def __str__(self) -> str:
        return f"those that {self.source} kept"


def kept_lengths(run: Path) -> Kept:
    """The lengths of a run's kept completions.

    Raises:
        ConfigError: there is no such run, or it kept too few; says what its metrics have to say instead.
    """
    found = []
    for path in sorted((run / ROLLOUTS).glob("train_*.jsonl")):
        for line in filter(None, path.read_text(encoding="utf-8").split("\n")):
            try:
                found.append(max(1, int(json.loads(line)["tokens"])))
            except (ValueError, KeyError, TypeError):
                raise ConfigError(f"lengths={run}: {path.name} holds a line that is no kept completion") from None
    if len(found) < SHORTEST_SAMPLE:
        raise ConfigError(
            f"lengths={run}: it kept {len(found)} completions of training steps, {SHORTEST_SAMPLE} are needed. Say "
            "mean_completion_tokens= and tail_factor= instead: metrics.jsonl of a run has them as "
            "completion_length/mean and rollout/tail_factor"
        )
    return Kept(tuple(found), str(run))
