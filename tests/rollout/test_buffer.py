"""The buffer of rollouts under thousands of random schedules, with a clock that the test moves."""

from __future__ import annotations

import random

import pytest

from nemo_aapo.rollout.buffer import InFlight, InOrder, RolloutBuffer, State

SCHEDULES = 10_000


class Schedule:
    """One run with random speeds of servers and learner, which is killed now and then."""

    def __init__(self, seed: int) -> None:
        self.rng = rng = random.Random(seed)
        self.depth, self.count, self.steps = rng.randrange(4), rng.randrange(1, 3), rng.randrange(1, 6)
        self.in_order, self.kills = seed % 2 == 0, rng.random() < 0.5
        self.policy = InOrder(self.depth) if self.in_order else InFlight(self.depth)
        self.buffer = self.new_buffer(0)
        self.everything = [(step, i) for step in range(self.steps) for i in range(self.count)]
        self.trained: list[tuple[int, int]] = []
        self.checkpoint = (0, [], [], {})  # steps, trained, under way, in hand with their versions

    def new_buffer(self, done: int) -> RolloutBuffer:
        return RolloutBuffer(self.policy, self.count, done, clock=lambda: 0.0)

    def startable(self):
        """The first group, in the order of prompts, that has no slot and was not trained on."""
        slots = {key for state in State for key in self.buffer.keys(state)}
        free = (key for key in self.everything if key not in slots and key not in self.trained)
        return next((key for key in free if self.buffer.may_start(key[0], 1)), None)

    def train(self) -> None:
        keys = self.buffer.next()
        if keys is None or (self.in_order and self.startable()):  # who trains has begun all that he may
            assert self.startable() or self.buffer.keys(State.UNDER_WAY), "nothing could ever go on"
            return
        versions = [self.buffer.version(key) for key in keys]
        assert len(set(keys)) == self.count
        assert not set(keys) & set(self.trained)
        assert all(0 <= self.buffer.done - version <= self.depth for version in versions)
        if self.in_order:
            assert keys == [(self.buffer.done, i) for i in range(self.count)]
            assert set(versions) == {max(0, self.buffer.done - self.depth)}
        self.buffer.take(keys)
        self.buffer.trained()
        self.trained += keys

    def save(self) -> None:
        under_way, in_hand = self.buffer.keys(State.UNDER_WAY), self.buffer.keys(State.IN_HAND)
        if not (self.in_order and (under_way or self.startable())):  # in order it waits for what is under way
            versions = {key: self.buffer.version(key) for key in in_hand}
            self.checkpoint = (self.buffer.done, list(self.trained), under_way, versions)

    def kill(self) -> None:
        done, trained, under_way, in_hand = self.checkpoint
        self.trained, self.buffer = list(trained), self.new_buffer(done)
        for key, version in in_hand.items():
            self.buffer.restore(key, version)
        for key in under_way:  # the same prompts again, by the policy of now
            assert self.buffer.start(key) == done

    def run(self) -> None:
        for _ in range(1000):
            if self.buffer.done == self.steps:
                break
            under_way = self.buffer.keys(State.UNDER_WAY)
            action = self.rng.choice(("start", "start", "draw", "draw", "train", "train", "save", "kill"))
            if action == "start" and (key := self.startable()) is not None:
                assert self.buffer.start(key) == self.buffer.done
            elif action == "draw" and under_way:
                self.buffer.drawn(self.rng.choice(under_way))
            elif action == "train":
                self.train()
            elif action == "save":
                self.save()
            elif action == "kill" and self.kills and self.rng.random() < 0.2:
                self.kill()
            taken = sum(len(self.buffer.keys(state)) for state in State)
            assert taken <= self.buffer.capacity == (self.depth + 1) * self.count
        assert sorted(self.trained) == self.everything


def test_no_schedule_loses_a_group_trains_on_one_twice_exceeds_the_bound_or_stands_still():
    for seed in range(SCHEDULES):
        Schedule(seed).run()


def test_young_groups_do_not_go_first_so_often_that_old_ones_come_too_late():
    """With one group a step and a bound of 2, of three old groups only the first place may go to another one."""
    buffer = RolloutBuffer(InFlight(2), 1)
    for key in [(0, 0), (1, 0), (2, 0)]:
        buffer.start(key)
    buffer.drawn((2, 0))
    assert buffer.next() == [(2, 0)]
    buffer.take([(2, 0)])
    buffer.trained()
    buffer.start((3, 0))
    buffer.drawn((3, 0))
    assert buffer.next() is None  # or two groups were due at the next step
    buffer.drawn((1, 0))
    assert buffer.next() == [(1, 0)]


def test_a_slot_comes_back_when_its_group_was_trained_on_and_not_before():
    now = [0.0]
    buffer = RolloutBuffer(InOrder(1), 2, clock=lambda: now[0])
    for key in [(0, 0), (0, 1), (1, 0), (1, 1)]:
        buffer.start(key)
        now[0] += 1
        buffer.drawn(key)
    assert not buffer.may_start(1)
    with pytest.raises(ValueError, match=r"group \(2, 0\) may not be started: 4 of 4 slots are taken"):
        buffer.start((2, 0))
    assert buffer.oldest(State.IN_HAND) == 3
    assert buffer.next() == [(0, 0), (0, 1)]
    buffer.take([(0, 0), (0, 1)])
    assert buffer.next() is None  # they are being trained on
    buffer.trained()
    assert buffer.start((2, 0)) == 1
    assert not buffer.may_start(2)
    buffer.start((2, 1))
    with pytest.raises(ValueError, match=r"group \(1, 0\) is in_hand, not under_way"):
        buffer.drawn((1, 0))


def test_what_was_drawn_before_an_interruption_takes_no_more_slots_than_there_are_and_is_not_too_old():
    buffer = RolloutBuffer(InFlight(1), 1, done=5)
    buffer.restore((5, 0), 4)
    with pytest.raises(ValueError, match=r"group \(6, 0\) of version 3 can't be taken up after 5 training steps"):
        buffer.restore((6, 0), 3)
    buffer.restore((6, 0), 5)
    with pytest.raises(ValueError, match="can't be taken up"):
        buffer.restore((7, 0), 5)
