"""The groups between prompt and update: how many there may be, which policy draws them, which step trains on them.

    free --start--> under way --drawn--> in hand --take--> in training --trained--> free

A group takes a slot when it is started and gives it back only when it was trained on. Were it given back when the group
is drawn, groups could be started that are too old by the time that those before them are trained on: born stale. So
(L + 1) x prompts_per_step slots bound both the memory and the staleness.

The buffer is told what happens and decides what may; it knows neither engines nor files, and its clock is given to it.

Example:
    >>> buffer = RolloutBuffer(InOrder(depth=1), groups_per_step=1, clock=lambda: 0.0)
    >>> [buffer.may_start(step) for step in range(3)]
    [True, True, False]
    >>> buffer.start((0, 0)), buffer.start((1, 0)), buffer.drawn((1, 0)), buffer.next() is None
    (0, 0, None, True)
    >>> buffer.drawn((0, 0)), buffer.next(), buffer.take([(0, 0)]), buffer.trained(), buffer.start((2, 0))
    (None, [(0, 0)], None, None, 1)
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

Key = tuple[int, int]
"""A group: (step, index of its prompt within the step), both from 0."""


class State(Enum):
    """Where a group is."""

    UNDER_WAY = 1
    IN_HAND = 2
    IN_TRAINING = 3


@dataclass(slots=True)
class Slot:
    """What is known of a group that has a slot."""

    version: int
    """Training steps behind the policy that draws it, or that drew its first token."""
    since: float
    """When it came into its state, by the buffer's clock."""
    state: State = State.UNDER_WAY


class Policy(Protocol):
    """Which groups may be started, and which are trained on next."""

    @property
    def depth(self) -> int:
        """The most training steps between the policy that draws a group and the one that learns from it."""
        ...

    def may_start(self, step: int, done: int) -> bool:
        """Whether groups of a step may be started when so many steps are trained."""
        ...

    def next(self, slots: dict[Key, Slot], count: int, done: int) -> list[Key] | None:
        """The groups to train on next, ``count`` of them; None: it has to be waited for others."""
        ...


@dataclass(frozen=True)
class InOrder:
    """Step k trains on the groups of step k, all drawn by the policy before step max(0, k - L): deterministic.

    Whoever trains starts all groups that the policy is to draw before he changes it.
    """

    depth: int

    def may_start(self, step: int, done: int) -> bool:
        return step - self.depth <= done <= step

    def next(self, slots: dict[Key, Slot], count: int, done: int) -> list[Key] | None:
        mine = sorted(key for key in slots if key[0] == done)
        return mine if len(mine) == count and all(slots[key].state is State.IN_HAND for key in mine) else None


@dataclass(frozen=True)
class InFlight:
    """A step trains on whatever is in hand, oldest first. What would become too old is waited for, not dropped.

    A group of version v has to be trained on by step v + ``depth``, and a step takes ``count``. So of the groups that a
    step leaves, no more than n x ``count`` may be due within the n steps behind it: young ones that are in hand must
    not go first so often that old ones, once they have come, are too many for the steps that are left to them.
    """

    depth: int

    def may_start(self, step: int, done: int) -> bool:
        return step <= done + self.depth

    def next(self, slots: dict[Key, Slot], count: int, done: int) -> list[Key] | None:
        ready = [key for key, slot in slots.items() if slot.state is State.IN_HAND]
        chosen = sorted(ready, key=lambda key: (slots[key].version, key))[:count]
        left = sorted(slot.version for key, slot in slots.items() if key not in chosen)
        in_time = all(done + 1 + i // count <= version + self.depth for i, version in enumerate(left))
        return sorted(chosen) if len(chosen) == count and in_time else None


class RolloutBuffer:
    """The slots of one run; pure but for the clock."""

    def __init__(
        self, policy: Policy, groups_per_step: int, done: int = 0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Args: done: training steps done so far."""
        self.policy, self.groups_per_step, self.done, self.clock = policy, groups_per_step, done, clock
        self.capacity = (policy.depth + 1) * groups_per_step
        self._slots: dict[Key, Slot] = {}

    def may_start(self, step: int, groups: int | None = None) -> bool:
        """Whether all groups of a step may be started now, or so many."""
        free = self.capacity - len(self._slots)
        return self.policy.may_start(step, self.done) and (groups or self.groups_per_step) <= free

    def start(self, key: Key) -> int:
        """A group is begun; the number of training steps behind the policy that draws it.

        Raises:
            ValueError: it has a slot already, or may not be started now.
        """
        if key in self._slots or not self.may_start(key[0], 1):
            raise ValueError(f"group {key} may not be started: {len(self._slots)} of {self.capacity} slots are taken")
        self._slots[key] = Slot(self.done, self.clock())
        return self.done

    def restore(self, key: Key, version: int, state: State = State.IN_HAND) -> None:
        """Take up a group that was drawn, or begun, before an interruption.

        Raises:
            ValueError: there is no slot for it.
        """
        if key in self._slots or len(self._slots) >= self.capacity or not 0 <= self.done - version <= self.policy.depth:
            raise ValueError(f"group {key} of version {version} can't be taken up after {self.done} training steps")
        self._slots[key] = Slot(version, self.clock(), state)

    def drawn(self, key: Key) -> None:
        """All completions of a group have come."""
        self._move(key, State.UNDER_WAY, State.IN_HAND)

    def next(self) -> list[Key] | None:
        """The groups of the next training step; None: they are not all there."""
        return self.policy.next(self._slots, self.groups_per_step, self.done)

    def take(self, keys: Iterable[Key]) -> None:
        """These groups are trained on now: those of ``next``, or of a step that is made again."""
        for key in keys:
            self._move(key, State.IN_HAND, State.IN_TRAINING)

    def trained(self) -> None:
        """The step whose groups were taken is done."""
        for key in [key for key, slot in self._slots.items() if slot.state is State.IN_TRAINING]:
            del self._slots[key]
        self.done += 1

    def oldest(self, state: State) -> float:
        """Seconds that the group which came into a state first has been there; 0 where there is none."""
        return max((self.clock() - slot.since for slot in self._slots.values() if slot.state is state), default=0.0)

    def keys(self, state: State) -> list[Key]:
        """The groups in a state."""
        return sorted(key for key, slot in self._slots.items() if slot.state is state)

    def version(self, key: Key) -> int:
        """Training steps behind the policy that draws a group."""
        return self._slots[key].version

    def _move(self, key: Key, before: State, after: State) -> None:
        slot = self._slots[key]
        if slot.state is not before:
            raise ValueError(f"group {key} is {slot.state.name.lower()}, not {before.name.lower()}")
        slot.state, slot.since = after, self.clock()
