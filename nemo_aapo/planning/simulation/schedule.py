"""Who waits for whom in a run of many steps: engines, trainer, and the weights that go from one to the other.

Step k trains on completions of policy version max(0, k - L), L = ``rollout.async_depth``. An engine generates its part
of one step after the other and takes a step's version once what it generates with the version before has ended; no
engine waits for the others. With the seconds of each part given, every event is a maximum of sums of earlier ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Seconds:
    """What the parts of a run take, step by step."""

    generate: Sequence[Sequence[float]]
    """``generate[k][s]``: engine s on its part of step k."""
    train: Sequence[float]
    """``train[k]``: the trainer on step k."""
    send: float = 0.0
    """The trainer on one version of the weights, before an engine can take it; it does nothing else meanwhile."""
    load: float = 0.0
    """An engine on taking one version; it does nothing else meanwhile."""


@dataclass(frozen=True)
class Outcome:
    """A run's speed, from the end of its first step on."""

    step_s: float
    """Mean seconds of a step."""
    trainer_busy: float
    """Share of the time in which the trainer trains."""
    engines_busy: float
    """Share of the time in which engines generate, averaged over them."""
    lag: float
    """Mean number of versions that the trainer is ahead of the policy whose completions it trains on."""


def schedule(seconds: Seconds, depth: int) -> Outcome:
    """Run all steps with ``rollout.async_depth=depth``.

    Args:
        seconds: of at least two steps.
    """
    steps, engines = len(seconds.train), len(seconds.generate[0])
    free = [0.0] * engines
    there = [0.0]  # when each version can be taken
    trained: list[float] = []
    for k in range(steps):
        version = max(0, k - depth)
        if version:  # the first one is there from the beginning
            free = [max(end, there[version]) + seconds.load for end in free]
        free = [end + generating for end, generating in zip(free, seconds.generate[k], strict=True)]
        begin = max(*free, there[k])  # the trainer has sent version k before it trains on
        trained.append(begin + seconds.train[k])
        there.append(trained[k] + seconds.send)
    step_s = (trained[-1] - trained[0]) / (steps - 1)
    generating_s = sum(map(sum, seconds.generate[1:])) / engines / (steps - 1)
    lags = [min(k, depth) for k in range(1, steps)]
    return Outcome(
        step_s=step_s,
        trainer_busy=min(1.0, sum(seconds.train[1:]) / (steps - 1) / step_s),
        engines_busy=min(1.0, generating_s / step_s),
        lag=sum(lags) / len(lags),
    )
