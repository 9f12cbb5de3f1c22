"""A run in flight (``rollout.max_lag``): engines never wait, and a step trains on whatever groups are in hand."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from nemo_aapo.planning.simulation.decoding import Engine
from nemo_aapo.planning.simulation.schedule import Outcome

Group = tuple[int, int]
"""Which group: step of the prompts' order, and number in it."""


@dataclass
class _Server:
    """An engine with the sequences that it has; those that come join at once, as far as there are rows."""

    engine: Engine
    live: list[tuple[float, Group]] = field(default_factory=list)  # the decoding step at which it ends
    waiting: list[tuple[int, Group]] = field(default_factory=list)  # tokens
    step: float = 0.0
    held: float = 0.0  # seconds for which it takes weights, and generates nothing
    busy_s: float = 0.0

    def add(self, lengths: Sequence[int], group: Group) -> None:
        self.waiting += [(length, group) for length in lengths]
        self._admit()

    def left(self) -> int:
        """Sequences that it has."""
        return len(self.live) + len(self.waiting)

    def until_next(self) -> float:
        """Seconds until a sequence ends."""
        if not self.live:
            return math.inf
        return self.held + (min(self.live)[0] - self.step) * self._step_s()

    def advance(self, seconds: float) -> list[Group]:
        """Generate for so long, at most until a sequence ends; the groups of those that end."""
        held = min(self.held, seconds)
        self.held -= held
        if not self.live:
            return []
        self.busy_s += seconds - held
        self.step += (seconds - held) / self._step_s()
        ended = [group for end, group in self.live if end <= self.step + 1e-9]
        self.live = [(end, group) for end, group in self.live if end > self.step + 1e-9]
        self._admit()
        return ended

    def _step_s(self) -> float:
        return self.engine.step_s(len(self.live), self.engine.prompt_tokens)

    def _admit(self) -> None:
        while self.waiting and len(self.live) < self.engine.rows:
            length, group = self.waiting.pop(0)
            self.live.append((self.step + length, group))


def in_flight(
    engine: Engine,
    servers: int,
    lengths: Sequence[Sequence[Sequence[int]]],
    train_token_s: float,
    depth: int,
    *,
    send: float = 0.0,
    load: float = 0.0,
    after: int = 1,
) -> Outcome:
    """Run all steps with ``rollout.max_lag=depth``.

    Args:
        engine: each server's; a decoding step takes what it does at the prompt's length.
        lengths: ``lengths[k][i]``: tokens of the completions of prompt i of step k; as many prompts in each step.
        train_token_s: the trainer on one completion token.
        send, load: as in ``Seconds``; engines take a version as soon as it is there.
        after: as in ``schedule``.
    """
    steps, count = len(lengths), len(lengths[0])
    fleet = [_Server(engine) for _ in range(servers)]
    left: dict[Group, int] = {}  # of the groups that have begun and are not trained on: sequences under way
    version: dict[Group, int] = {}
    now, training_s, lags, ends = 0.0, 0.0, list[int](), list[tuple[float, float, float]]()
    idle, training_until, cursor = True, math.inf, 0
    while len(ends) < steps:
        done = len(ends)
        while idle and cursor < min(done + depth + 1, steps):
            for i, row in enumerate(lengths[cursor]):
                left[cursor, i], version[cursor, i] = len(row), done
                min(fleet, key=_Server.left).add(row, (cursor, i))
            cursor += 1
        if idle and (chosen := _next(left, version, count, done, depth)):
            seconds = train_token_s * sum(sum(lengths[of][i]) for of, i in chosen)
            idle, training_until, training_s = False, now + seconds + send, training_s + seconds
            for group in chosen:
                lags += [done - version.pop(group)] if done >= after else []
                del left[group]
        pause = min(training_until - now, *(server.until_next() for server in fleet))
        for server in fleet:
            for group in server.advance(pause):
                left[group] -= 1
        now += pause
        if now >= training_until:
            idle, training_until = True, math.inf
            ends.append((now, training_s, sum(server.busy_s for server in fleet) / servers))
            for server in fleet:
                server.held += load
    seconds, trained, generated = (last - first for first, last in zip(ends[after - 1], ends[-1], strict=True))
    return Outcome(
        step_s=seconds / (steps - after),
        trainer_busy=trained / seconds,
        engines_busy=generated / seconds,
        lag=sum(lags) / len(lags),
    )


def _next(left: dict[Group, int], version: dict[Group, int], count: int, done: int, depth: int) -> list[Group] | None:
    """The rule of ``rollout.buffer.InFlight``."""
    ready = sorted((group for group, sequences in left.items() if not sequences), key=lambda g: (version[g], g))
    chosen = ready[:count]
    behind = sorted(version[group] for group in left if group not in chosen)
    in_time = all(done + 1 + i // count <= of + depth for i, of in enumerate(behind))
    return chosen if len(chosen) == count and in_time else None
