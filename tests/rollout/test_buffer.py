"""The buffer of rollouts under thousands of random schedules, with a clock that the test moves."""

from __future__ import annotations

import random

import pytest

from nemo_aapo.rollout.buffer import InFlight, InOrder, RolloutBuffer, State

SCHEDULES = 10_000


def run_schedule(seed: int) -> None:
    """One run with random speeds of servers and learner, killed now and then; at the end all is trained on once."""
    rng = random.Random(seed)
    depth, count, steps = rng.randrange(4), rng.randrange(1, 3), rng.randrange(1, 6)
    in_order = seed % 2 == 0
    policy = InOrder(depth) if in_order else InFlight(depth)
    buffer = RolloutBuffer(policy, count, clock=lambda: 0.0)
    everything = [(step, i) for step in range(steps) for i in range(count)]
    banked: dict[tuple[int, int], int] = {}  # what is on the disk: drawn groups and their versions
    trained: list[tuple[int, int]] = []
    for _ in range(400):
        if buffer.done == steps:
            break
        under_way = buffer.keys(State.UNDER_WAY)
        free = (key for key in everything if key not in banked and key not in trained and key not in under_way)
        first = next((key for key in free if buffer.may_start(key[0], 1)), None)
        action = rng.choice(("start", "start", "draw", "draw", "train", "train", "kill"))
        if action == "start" and first is not None:
            assert buffer.start(first) == buffer.done
        elif action == "draw" and under_way:
            buffer.drawn(key := rng.choice(under_way))
            banked[key] = buffer.version(key)
        elif action == "train" and not (in_order and first) and (keys := buffer.take()) is not None:
            versions = [buffer.version(key) for key in keys]
            assert len(set(keys)) == count
            assert all(buffer.done - version <= depth for version in versions)
            if in_order:
                assert keys == [(buffer.done, i) for i in range(count)]
                assert set(versions) == {max(0, buffer.done - depth)}
            buffer.trained()
            trained += keys
            for key in keys:
                del banked[key]
        elif action == "kill" and not (in_order and under_way):  # a checkpoint in order waits for what is under way
            buffer = RolloutBuffer(policy, count, buffer.done, clock=lambda: 0.0)
            for key, version in banked.items():
                buffer.restore(key, version)
        assert sum(len(buffer.keys(state)) for state in State) <= buffer.capacity == (depth + 1) * count
    assert sorted(trained) == everything


def test_no_schedule_loses_a_group_trains_on_one_twice_or_exceeds_the_bound():
    for seed in range(SCHEDULES):
        run_schedule(seed)


def test_a_slot_comes_back_when_its_group_was_trained_on_or_dropped_and_not_before():
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
    assert buffer.take() == [(0, 0), (0, 1)]
    assert buffer.take() is None  # they are being trained on
    buffer.trained()
    assert buffer.start((2, 0)) == 1
    buffer.drop([(2, 0)])
    assert buffer.may_start(2)
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
