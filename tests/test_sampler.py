"""The order of prompts: permutations without repeats, pure in the step, safe to resume."""

from __future__ import annotations

import json
import random

import pytest

from nemo_aapo.data.sampler import PromptSampler

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


def test_the_epoch_of_a_step_is_that_of_its_first_prompt():
    sampler = PromptSampler(5, 2, seed=0)
    assert [sampler.epoch(step) for step in range(6)] == [0, 0, 0, 1, 1, 2]


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
