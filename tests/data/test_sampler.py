"""The order of prompts: permutations without repeats, pure in the step, safe to resume."""

from __future__ import annotations

import json
import random
from collections import Counter

import pytest

from nemo_aapo.data.sampler import PromptLayout, PromptSampler

SIZES = [(1, 1), (5, 4), (5, 5), (7, 3), (8, 4), (9, 5), (10, 9), (31, 16), (100, 7)]


@pytest.mark.parametrize(("num_prompts", "per_step"), SIZES)
@pytest.mark.parametrize("shuffle", [True, False])
def test_every_epoch_takes_each_prompt_once_and_no_step_takes_one_twice(num_prompts, per_step, shuffle):
    for seed in range(2):
        sampler = PromptSampler(num_prompts, per_step, seed, shuffle)
        steps = [sampler.indices(step) for step in range(12 * num_prompts)]
        assert all(len(set(step)) == per_step == len(step) for step in steps)
        flat = [index for step in steps for index in step]
        for start in range(0, len(flat) - num_prompts + 1, num_prompts):
            assert sorted(flat[start : start + num_prompts]) == list(range(num_prompts))


@pytest.mark.parametrize(("num_prompts", "per_step"), SIZES)
def test_a_steps_prompts_do_not_depend_on_what_was_asked_before(num_prompts, per_step):
    steps = list(range(60))
    in_order = [PromptSampler(num_prompts, per_step, 3).indices(step) for step in steps]
    sampler = PromptSampler(num_prompts, per_step, 3)
    random.Random(0).shuffle(steps)
    for step in steps:
        assert sampler.indices(step) == in_order[step]


def test_the_order_is_the_same_on_every_machine_and_version():
    sampler = PromptSampler(10, 4, seed=1234)
    assert [sampler.indices(step) for step in range(4)] == [[8, 9, 7, 3], [0, 1, 4, 2], [5, 6, 0, 9], [5, 6, 4, 2]]


def test_seeds_and_epochs_have_orders_of_their_own():
    orders = {tuple(PromptSampler(50, 50, seed).indices(step)) for seed in range(10) for step in range(10)}
    assert len(orders) == 100


def test_every_prompt_is_as_likely_as_another_to_come_first():
    samplers = [PromptSampler(5, 4, seed) for seed in range(100)]
    first = [sampler.indices(step)[0] for sampler in samplers for step in range(20)]
    # 2,000 draws over 5 prompts: 400 each, standard deviation 18.
    assert all(abs(first.count(index) - 400) < 90 for index in range(5))


def test_without_shuffling_prompts_come_in_the_files_order():
    sampler = PromptSampler(5, 2, seed=0, shuffle=False)
    assert [sampler.indices(step) for step in range(4)] == [[0, 1], [2, 3], [4, 0], [1, 2]]


def test_epochs_are_prompts_taken_over_prompts():
    sampler = PromptSampler(5, 2, seed=0)
    assert [sampler.epochs(step) for step in range(6)] == [0, 0.4, 0.8, 1.2, 1.6, 2.0]


def test_a_resumed_sampler_goes_on_where_the_first_one_stopped():
    first = PromptSampler(7, 3, seed=5, data_digest="abc")
    expected = [first.indices(step) for step in range(40)]
    first.step = 17
    resumed = PromptSampler(7, 3, seed=5, data_digest="abc")
    resumed.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert resumed.step == 17
    assert [resumed.indices(step) for step in range(resumed.step, 40)] == expected[17:]


def test_a_state_of_another_order_is_refused_and_every_difference_named():
    state = PromptSampler(7, 3, seed=5, data_digest="abc").state_dict()
    other = PromptSampler(8, 4, seed=6, shuffle=False, data_digest="xyz")
    with pytest.raises(ValueError, match="can't resume") as error:
        other.load_state_dict(state)
    for change in ("num_prompts was 7, is 8", "prompts_per_step was 3, is 4", "seed was 5, is 6", "'abc', is 'xyz'"):
        assert change in str(error.value)
    assert "shuffle was True, is False" in str(error.value)


def test_a_step_larger_than_the_data_set_is_refused_with_both_numbers():
    with pytest.raises(ValueError, match=r"prompts_per_step is 16, but the data set holds only 9"):
        PromptSampler(9, 16, seed=0)
    with pytest.raises(ValueError, match="seed must be from 0"):
        PromptSampler(9, 3, seed=-1)
    with pytest.raises(ValueError, match="must be at least 1"):
        PromptSampler(9, 0, seed=0)


# ---------------------------------------------------------------- several sources

MIXTURES = [
    [(20, 1.0), (30, 3.0)],
    [(9, 0.2), (40, 0.5), (12, 0.3)],
    [(25, 1.0), (None, 1.0)],
    [(None, 2.0), (17, 1.0), (None, 0.5)],
]


def mixture(shares, per_step=8, **options):
    sizes = [size for size, _ in shares]
    total = None if None in sizes else sum(sizes)
    return PromptSampler(total, per_step, 3, shares=shares, **options)


@pytest.mark.parametrize("shares", MIXTURES)
def test_a_mixture_keeps_to_its_weights_at_every_step_and_goes_through_each_source_by_epochs(shares):
    sampler = mixture(shares)
    layout = PromptLayout([size for size, _ in shares])
    taken = [[] for _ in shares]
    for step in range(60):
        indices = sampler.indices(step)
        assert len(set(indices)) == len(indices) == 8
        for index in indices:
            k, n = layout.place(index)
            assert layout.index(k, n) == index
            taken[k].append(n)
        for (_, weight), mine in zip(shares, taken, strict=True):
            assert abs(len(mine) - weight / sum(w for _, w in shares) * 8 * (step + 1)) < 1 + 1e-9
    for (size, _), mine in zip(shares, taken, strict=True):
        if size is None:
            assert sorted(mine) == list(range(len(mine)))
        for start in range(0, len(mine) - (size or len(mine) + 1) + 1, size or 1):
            assert sorted(mine[start : start + size]) == list(range(size))


@pytest.mark.parametrize("shares", MIXTURES)
def test_a_mixtures_steps_do_not_depend_on_what_was_asked_before_nor_on_a_resume(shares):
    steps = list(range(40))
    in_order = [mixture(shares).indices(step) for step in steps]
    sampler = mixture(shares)
    random.Random(0).shuffle(steps)
    for step in steps:
        assert sampler.indices(step) == in_order[step]
    resumed = mixture(shares)
    resumed.load_state_dict(json.loads(json.dumps(sampler.state_dict())))
    assert [resumed.indices(step) for step in range(40)] == in_order
    other = mixture([(size, weight + (k == 0)) for k, (size, weight) in enumerate(shares)])
    with pytest.raises(ValueError, match="shares was"):
        other.load_state_dict(sampler.state_dict())


def test_a_source_that_is_smaller_than_its_share_of_a_step_is_named():
    with pytest.raises(ValueError, match=r"source 1 of the mixture holds only 3 prompts where a step takes up to 6"):
        mixture([(50, 1.0), (3, 1.0)])


# ---------------------------------------------------------------- by running accuracy


def results_of(step, sampler, seed=0):
    """(right, all) of each prompt of a step: never right at every third, always at every fifth, else by chance."""
    found = {}
    for index in sampler.indices(step):
        chance = random.Random(f"{seed} {step} {index}")
        right = 0 if index % 3 == 0 else 4 if index % 5 == 0 else chance.choice([1, 2, 3])
        found[index] = (right, 4)
    return found


def go(sampler, first, last):
    """The prompts of some steps, each observed."""
    taken = []
    for step in range(first, last):
        taken.append(sampler.indices(step))
        sampler.observe(step, results_of(step, sampler))
        sampler.step = step + 1
    return taken


@pytest.mark.parametrize("sampling", ["hard", "medium"])
def test_the_first_epoch_takes_all_and_later_ones_go_by_accuracy(sampling):
    sampler = PromptSampler(60, 6, seed=1, sampling=sampling)
    taken = go(sampler, 0, 60)
    assert sorted(index for step in taken[:10] for index in step) == list(range(60))
    assert all(len(set(step)) == 6 for step in taken)
    later = Counter(index for step in taken[10:] for index in step)
    solved = [n for n in range(60) if n % 5 == 0 and n % 3]
    hopeless = [n for n in range(60) if n % 3 == 0]
    between = [n for n in range(60) if n % 3 and n % 5]
    assert sum(later[n] for n in solved) == 0  # 1 - a = 0
    if sampling == "medium":
        assert sum(later[n] for n in hopeless) == 0
    else:
        # A weight of 1 against 1/4 to 3/4.
        assert sum(later[n] for n in hopeless) / 20 > 1.3 * sum(later[n] for n in between) / len(between)


def test_weights_are_those_of_the_last_epoch_that_drew_a_prompt():
    sampler = PromptSampler(4, 2, seed=0, sampling="hard")
    for step in range(2):
        sampler.observe(step, {index: ((4, 2, 0, 4)[index], 4) for index in sampler.indices(step)})
    stream = sampler._streams[0]
    assert stream._weights.tolist() == [0.0, 0.5, 1.0, 0.0]
    taken = sampler.indices(2)
    assert set(taken) == {1, 2}  # nothing else weighs anything
    sampler.observe(2, {1: (4, 4), 2: (1, 4)})
    sampler.observe(3, {1: (3, 4), 2: (1, 4)})
    assert stream._weights.tolist() == [0.0, 1 - 7 / 8, 1 - 2 / 8, 0.0]


def test_where_too_few_prompts_weigh_anything_others_fill_the_step():
    sampler = PromptSampler(6, 3, seed=0, sampling="medium")
    for step in range(2):
        sampler.observe(step, {index: (1 if index == 4 else 0, 2) for index in sampler.indices(step)})
    for step in range(2, 4):
        assert len(set(sampler.indices(step))) == 3
        assert 4 in sampler.indices(step)


@pytest.mark.parametrize("shares", [[(30, 1.0)], [(20, 1.0), (30, 2.0)]])
@pytest.mark.parametrize("sampling", ["hard", "medium"])
def test_a_resume_at_any_step_goes_on_as_if_there_had_been_none(shares, sampling):
    def make():
        return mixture(shares, per_step=7, sampling=sampling)

    whole = go(make(), 0, 30)
    for stop in (1, 4, 5, 11, 23):
        first = make()
        assert go(first, 0, stop) == whole[:stop]
        second = make()
        second.load_state_dict(json.loads(json.dumps(first.state_dict())))
        assert go(second, second.step, 30) == whole[stop:]


def test_prompts_of_an_epoch_to_come_are_not_known_and_not_guessed():
    sampler = PromptSampler(12, 4, seed=0, sampling="hard")
    assert [sampler.knows(step) for step in range(4)] == [True, True, True, False]
    with pytest.raises(ValueError, match="the prompts of epoch 1 are not known in epoch 0"):
        sampler.indices(3)
    go(sampler, 0, 3)
    assert [sampler.knows(step) for step in range(3, 7)] == [True, True, True, False]
