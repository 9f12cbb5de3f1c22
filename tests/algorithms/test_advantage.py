"""Advantages: properties that follow from the equations, of groups that are odd and of many."""

from __future__ import annotations

import dataclasses
import itertools
import math

import numpy as np
import pytest

from nemo_aapo.algorithms import ScoredGroups, advantage
from nemo_aapo.algorithms.objective import Objective
from nemo_aapo.config.schema import MarginSchedule
from tests.algorithms.test_algorithms import AAPO, GPG, GRPO, PAPER
from tests.equations import LIMIT

pytestmark = pytest.mark.exact


@pytest.mark.parametrize("reward", [0.0, 1.0, 0.1, 1 / 3, -0.7, 1e8 + 0.1])
@pytest.mark.parametrize("size", [1, 3, 6, 7])
@pytest.mark.parametrize("scale_rewards", [True, False])
@pytest.mark.filterwarnings("error")  # no 0 / 0 on the way either
def test_equal_rewards_give_exactly_zero_whatever_a_float_mean_says(reward, size, scale_rewards):
    rewards = np.full((2, size), reward)
    assert (advantage.group_advantage(rewards, scale_rewards) == 0.0).all()
    assert advantage.zero_std(rewards).all()
    rewards[1, 0] += 0.5
    assert advantage.zero_std(rewards).tolist() == [True, size == 1]


def test_one_completion_a_group_learns_from_the_margin_alone():
    algorithm = Objective.of(AAPO, max_new_tokens=LIMIT)
    result = algorithm.advantages(ScoredGroups(np.array([[1.0], [0.0]]), np.array([[0.0, 1.0], [1.0, 1.0]])))
    np.testing.assert_allclose(result, [[0.14], [-0.2]])


@pytest.mark.parametrize("config", [AAPO, PAPER, GPG, GRPO], ids=["aapo", "aapo_paper", "gpg", "grpo"])
@pytest.mark.filterwarnings("error")
def test_a_completion_that_could_not_be_scored_is_as_if_it_had_never_been_sampled(config):
    """Group by group against the smaller group without it, to the bit; also of reference completions."""
    algorithm = Objective.of(config, max_new_tokens=LIMIT)
    rng = np.random.default_rng(0)
    for _ in range(200):
        group, reference = rng.choice([0.0, 1.0, 0.3], 6), rng.choice([0.0, 1.0, 0.7], 6)
        failed = rng.random(6) < 0.4
        advantages = algorithm.advantages(ScoredGroups(np.where(failed, np.nan, group)[None], reference[None]))[0]
        assert (np.isnan(advantages) == failed).all()
        partners = reference[~failed] if config is PAPER else reference  # of which the paper's margin pairs by index
        if not failed.all():
            assert (
                advantages[~failed].tolist()
                == algorithm.advantages(ScoredGroups(group[~failed][None], partners[None]))[0].tolist()
            )
        if not failed.all() and config is AAPO:
            known = np.where(failed, np.nan, reference)[None]
            fewer = algorithm.advantages(ScoredGroups(group[None], reference[~failed][None]))
            np.testing.assert_allclose(algorithm.advantages(ScoredGroups(group[None], known)), fewer, rtol=1e-13)
    nothing = algorithm.advantages(ScoredGroups(group[None], np.full((1, 6), np.nan)))
    assert nothing.tolist() == advantage.group_advantage(group[None], config.scale_rewards).tolist()


def test_expected_margin_is_the_mean_of_the_sampled_one_and_varies_less():
    rng = np.random.default_rng(0)
    rewards = np.array([[1.0, 0.0, 1.0, 0.3]])
    draws = 20_000
    stored = rng.choice([0.0, 0.2, 1.0], (draws, 8))  # a fresh reference sample for each draw
    repeated = np.repeat(rewards, draws, axis=0)
    expected = advantage.margin(repeated, stored, -0.2, 0.28, "expected")
    pairs = advantage.sample_pairs(range(draws), 4, 8)
    sampled = advantage.margin(repeated, stored, -0.2, 0.28, "sampled", pairs)
    standard_error = sampled.std(axis=0) / math.sqrt(draws)
    assert (abs(expected.mean(axis=0) - sampled.mean(axis=0)) < 4 * standard_error).all()
    assert (expected.var(axis=0) < 0.2 * sampled.var(axis=0)).all()  # 1 / K = 0.125


def test_pairs_do_not_repeat_and_depend_on_their_own_seed_alone():
    pairs = advantage.sample_pairs([3, 1, 4], 5, 9)
    assert all(len(set(row)) == 5 and set(row) <= set(range(9)) for row in pairs.tolist())
    assert (advantage.sample_pairs([4], 5, 9)[0] == pairs[2]).all()
    counts = np.bincount(advantage.sample_pairs(range(4000), 2, 5)[:, 0], minlength=5)
    assert abs(counts - 800).max() < 4 * math.sqrt(800)
    rewards, stored = np.zeros((3, 5)), np.random.default_rng(0).choice([0.0, 1.0], (3, 9))
    ours = Objective.of(PAPER, LIMIT).advantages(ScoredGroups(rewards, stored, seeds=[3, 1, 4]))
    assert ours.tolist() == [[-0.2 * stored[i, k] for k in row] for i, row in enumerate(pairs)]


def test_weights_that_are_zero_at_accuracy_90_against_50_percent():
    """All outcomes of G = 6 completions against 6 reference completions, with their probabilities; then by lot."""
    outcomes = np.array(list(itertools.product([0.0, 1.0], repeat=6)))
    policy = 0.9 ** outcomes.sum(1) * 0.1 ** (6 - outcomes.sum(1))
    rewards, references = np.repeat(outcomes, 64, axis=0), np.tile(outcomes, (64, 1))
    probability = np.repeat(policy, 64) / 64
    aapo, gpg = (Objective.of(config, LIMIT).advantages(ScoredGroups(rewards, references)) for config in (PAPER, GPG))
    zero = [float(probability @ (weights == 0.0).mean(axis=1)) for weights in (gpg, aapo)]
    assert zero[0] == pytest.approx(0.9**6 + 0.1**6) == pytest.approx(0.53, abs=0.005)
    assert zero[1] == pytest.approx((0.9**6 + 0.1**6) * 0.5) == pytest.approx(0.27, abs=0.005)
    # a whole group is dead only where each reference completion did the same
    assert probability @ advantage.zero_advantage(aapo) == pytest.approx((0.9**6 + 0.1**6) * 0.5**6)

    rng = np.random.default_rng(0)
    drawn, drawn_references = (rng.random((20_000, 6)) < p for p in (0.9, 0.5))
    aapo, gpg = (
        Objective.of(config, LIMIT).advantages(ScoredGroups(drawn, drawn_references)) for config in (PAPER, GPG)
    )
    assert (gpg == 0.0).mean() == pytest.approx(zero[0], abs=0.015)
    assert (aapo == 0.0).mean() == pytest.approx(zero[1], abs=0.015)


def test_alpha_turns_the_mean_over_groups_into_the_mean_over_live_groups():
    rewards = np.array([[1.0, 1.0], [0.0, 1.0], [0.0, 0.0], [1.0, 0.0]])
    algorithm = Objective.of(GPG, max_new_tokens=LIMIT)
    advantages = algorithm.advantages(ScoredGroups(rewards))
    alpha = algorithm.alpha(4, int(advantage.zero_advantage(advantages).sum()))
    assert alpha * abs(advantages).mean() == abs(advantages[[1, 3]]).mean()
    assert advantage.gpg_alpha(4, 4) == 1.0  # nothing to scale, and nothing to divide by
    assert Objective.of(AAPO, LIMIT).alpha(4, 2) == 1.0
    with pytest.raises(ValueError, match="5 dead groups of 4"):
        advantage.gpg_alpha(4, 5)


@pytest.mark.parametrize(("shape", "half"), [("linear", 0.6), ("cosine", 0.6)])
def test_the_margins_bounds_shrink_to_a_share_of_them_and_stay(shape, half):
    by = MarginSchedule(shape=shape, steps=10, end=0.2)
    objective = Objective.of(dataclasses.replace(AAPO, margin_schedule=by), LIMIT)
    rewards, reference = np.array([[1.0, 1.0]]), np.array([[0.0, 0.0]])
    deltas = [objective.advantages(ScoredGroups(rewards, reference, step=step))[0, 0] for step in (0, 5, 10, 50)]
    assert deltas == pytest.approx([0.28, half * 0.28, 0.2 * 0.28, 0.2 * 0.28])
    assert advantage.schedule(shape, 0.25, 0.0) == pytest.approx({"linear": 0.75, "cosine": 0.5 + 0.5**1.5}[shape])


def test_a_group_of_too_few_scored_completions_leaves_the_step_and_truncated_ones_their_loss():
    rewards = np.array([[1.0, 0.0, np.nan, np.nan], [1.0, 0.0, 0.0, np.nan]])
    truncated = np.array([[False] * 4, [True, False, False, False]])
    config = dataclasses.replace(GPG, min_group_size=3, mask_truncated=True)
    made = Objective.of(config, LIMIT).advantages(ScoredGroups(rewards, truncated=truncated))
    assert np.isnan(made[0]).all()
    assert made[1, 1:3].tolist() == [-1 / 3, -1 / 3]  # what was cut off counts in the mean
    assert np.isnan(made[1, [0, 3]]).all()
