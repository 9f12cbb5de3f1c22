"""Who waits for whom in a run of many steps: engines, trainer, and the weights that go from one to the other.

Step k trains on completions of policy version max(0, k - L), L = ``rollout.async_depth``. An engine generates its part
of one step after the other and takes a step's version once what it generates with the version before has ended; no
engine waits for the others, and one that has nothing left of a step takes over what others have not begun of it. So
every event follows from the seconds of each part.
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
    """A run's speed, from the end of its first step on, or of its first steps."""

    step_s: float
    """Mean seconds of a step."""
    trainer_busy: float
    """Share of the time in which the trainer trains."""
    engines_busy: float
    """Share of the time in which engines generate, averaged over them."""
    lag: float
    """Mean number of versions that the trainer is ahead of the policy whose completions it trains on."""


def schedule(seconds: Seconds, depth: int, after: int = 1) -> Outcome:
    """Run all steps with ``rollout.async_depth=depth``.

    Args:
        seconds: of more than ``after`` steps.
        after: how many first steps are not counted. The first ``depth`` + 1 rollouts are of one version and wait for
            nothing, so a short run is quicker at its start than later.
    """
    steps, engines = len(seconds.train), len(seconds.generate[0])
    free = [0.0] * engines
    there = [0.0]  # when each version can be taken
    trained: list[float] = []
    for k in range(steps):
        version = max(0, k - depth)
        if version:  # the first one is there from the beginning
            free = [max(end, there[version]) + seconds.load for end in free]
        free = _generated(free, seconds.generate[k])
        begin = max(*free, there[k])  # the trainer has sent version k before it trains on
        trained.append(begin + seconds.train[k])
        there.append(trained[k] + seconds.send)
    step_s = (trained[-1] - trained[after - 1]) / (steps - after)
    generating_s = sum(map(sum, seconds.generate[after:])) / engines / (steps - after)
    lags = [min(k, depth) for k in range(after, steps)]
    return Outcome(
        step_s=step_s,
        trainer_busy=min(1.0, sum(seconds.train[after:]) / (steps - after) / step_s),
        engines_busy=min(1.0, generating_s / step_s),
        lag=sum(lags) / len(lags),
    )


def _generated(free: Sequence[float], parts: Sequence[float]) -> list[float]:
    """When engines that are free at these times have generated one step, of which each has a part.

    One whose own part has ended, or was taken over, takes over the longest that has not begun.
    """
    ends, waiting = list(free), dict(enumerate(parts))
    while waiting:
        engine = min(range(len(ends)), key=ends.__getitem__)
        part = engine if engine in waiting else max(waiting, key=waiting.__getitem__)
        ends[engine] += waiting.pop(part)
    return ends
