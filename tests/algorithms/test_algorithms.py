"""AAPO, GPG and GRPO against the papers' equations (tests/equations.py), and the properties that follow from them."""

from __future__ import annotations

import dataclasses
import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from nemo_aapo.algorithms import ScoredGroups, Tokens, advantage, loss
from nemo_aapo.algorithms.objective import Objective
from nemo_aapo.config.schema import AlgorithmConfig, Clip, Margin, MarginSchedule
from tests.equations import (
    GROUPS,
    LIMIT,
    Batch,
    G,
    K,
    advantages_by_equation,
    loss_by_equation,
    make_batch,
    with_failures,
)
from tests.tiny_models import make_config

pytestmark = pytest.mark.exact


def preset(name: str) -> AlgorithmConfig:
    """The algorithm as ``conf/algorithm/`` ships it."""
    page = Path(__file__).parents[2] / "conf" / "algorithm" / f"{name}.yaml"
    return make_config("no_model", algorithm=OmegaConf.to_container(OmegaConf.load(page))).algorithm


AAPO, PAPER, GPG = preset("aapo"), preset("aapo_paper"), preset("gpg")
GRPO = dataclasses.replace(preset("grpo"), clip=Clip(low=0.2, high=0.3))  # two bounds that can't be mixed up


NEW = {name: preset(name) for name in ("dr_grpo", "dapo", "gspo", "cispo", "rloo", "reinforce_pp")}
NEW["dapo"] = dataclasses.replace(NEW["dapo"], mask_truncated=None)
NEW["gspo"] = dataclasses.replace(NEW["gspo"], clip=Clip(low=0.1, high=0.05))  # of what the made batch moves
NEW["cispo"] = dataclasses.replace(NEW["cispo"], clip=Clip(low=0.3, high=0.2), kl_coefficient=0.1)


def capped(config: AlgorithmConfig) -> AlgorithmConfig:
    return dataclasses.replace(config, importance_weight_cap=1.1)


def run(objective: Objective, batch: Batch, rows: np.ndarray | None = None, logits: torch.Tensor | None = None):
    """The loss of some rows of the batch, fed the way a learner does it: weights from the rows' own lengths and the
    whole batch's totals, of what was scored. Padding holds NaN wherever a loss function could trip over it."""
    scored = ~np.isnan(batch.rewards).reshape(-1)
    rows = scored.nonzero()[0] if rows is None else rows
    logits = batch.logits if logits is None else logits
    advantages = objective.advantages(ScoredGroups(batch.rewards, batch.reference_rewards))
    dead = int(advantage.zero_advantage(advantages).sum())
    alpha = objective.alpha(int(advantage.scored(advantages).sum()), dead)
    weights = objective.token_weights(
        batch.lengths[rows], total_tokens=int(batch.lengths[scored].sum()), total_sequences=int(scored.sum())
    )
    index = torch.as_tensor(rows)
    valid = torch.arange(LIMIT) < torch.as_tensor(batch.lengths[rows])[:, None]
    logprobs = logits[index].log_softmax(-1).gather(-1, batch.targets[index][..., None])[..., 0]
    others = {
        "advantages": torch.as_tensor(advantages.reshape(-1, 1)).expand(-1, LIMIT),
        "rollout_logprobs": batch.rollout,
        "old_logprobs": batch.old,
        "reference_logprobs": batch.reference,
    }
    others = {name: values[index].masked_fill(~valid, torch.nan) for name, values in others.items()}
    tokens = Tokens(logprobs, weights=torch.as_tensor(alpha * weights)[:, None] * valid, **others)
    if objective.config.loss == "sequence_ratio_clip":  # the tokens end to end, without padding
        columns = {name: getattr(tokens, name)[valid] for name in ("logprobs", "weights", *others)}
        tokens = Tokens(**columns, lengths=batch.lengths[rows].tolist())
    return objective.token_loss(tokens)


@pytest.mark.parametrize("aggregation", ["token", "sequence", "fixed_length"])
@pytest.mark.parametrize(
    "config",
    [AAPO, PAPER, capped(AAPO), GPG, GRPO, capped(GRPO), dataclasses.replace(AAPO, scale_rewards=False), *NEW.values()],
    ids=["aapo", "aapo_paper", "aapo_capped", "gpg", "grpo", "grpo_capped", "aapo_unscaled", *NEW],
)
@pytest.mark.parametrize(("seed", "failures"), [(0, False), (1, False), (2, False), (0, True), (1, True)])
def test_advantages_loss_gradient_and_metrics_equal_the_papers_equations(config, aggregation, seed, failures):
    """Also where completions could not be scored: the equations are then those of the others."""
    config = dataclasses.replace(config, loss_aggregation=aggregation)
    algorithm = Objective.of(config, max_new_tokens=LIMIT)
    sampled = config.margin is not None and config.margin.estimator == "sampled"
    batch = make_batch(seed, references=G if sampled else K)
    batch = with_failures(batch, seed) if failures else batch
    expected = advantages_by_equation(config, batch.rewards, batch.reference_rewards)
    np.testing.assert_allclose(
        algorithm.advantages(ScoredGroups(batch.rewards, batch.reference_rewards)), expected, rtol=1e-12, atol=1e-15
    )
    there = [[a for a in row if not math.isnan(a)] for row in expected]
    groups, dead = sum(map(bool, there)), sum(bool(row) and not any(row) for row in there)
    # or the rescaling would not be exercised; a baseline of the whole batch leaves no group without a signal
    assert dead >= 1 or failures or config.name == "reinforce_pp"
    alpha = groups / (groups - dead) if config.rescale_dead_groups else 1.0
    value, grads, metrics = loss_by_equation(config, batch, expected, alpha)

    logits = batch.logits.clone().requires_grad_()
    ours, sums = run(algorithm, batch, logits=logits)
    ours.backward()
    assert float(ours) == pytest.approx(value, rel=1e-11, abs=1e-14)
    np.testing.assert_allclose(logits.grad.numpy(), grads, rtol=1e-10, atol=1e-15)
    for name, number in sums.items():
        assert float(number) == pytest.approx(metrics[name], rel=1e-10, abs=1e-12), name
        assert not number.requires_grad


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


def test_aapo_without_margin_scaling_and_alpha_is_gpg_bit_for_bit():
    no_margin = dataclasses.replace(AAPO, scale_rewards=False, margin=Margin(low=0.0, high=0.0, estimator="expected"))
    gpg = dataclasses.replace(GPG, rescale_dead_groups=False)
    batch = make_batch(3)
    results = []
    for config in (no_margin, gpg):
        logits = batch.logits.clone().requires_grad_()
        value, _ = run(Objective.of(config, LIMIT), batch, logits=logits)
        value.backward()
        results.append((value.item(), logits.grad))
    assert results[0][0] == results[1][0] != 0.0
    assert torch.equal(results[0][1], results[1][1])


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


@pytest.mark.parametrize("config", [AAPO, capped(GRPO)], ids=["aapo", "grpo"])
@pytest.mark.parametrize("aggregation", ["token", "sequence", "fixed_length"])
def test_any_split_into_microbatches_leaves_loss_gradient_and_metrics_unchanged(config, aggregation):
    algorithm = Objective.of(dataclasses.replace(config, loss_aggregation=aggregation), max_new_tokens=LIMIT)
    batch = make_batch(4)
    rng = np.random.default_rng(5)

    def accumulate(parts):
        logits, total, merged = batch.logits.clone().requires_grad_(), 0.0, {}
        for rows in parts:
            value, sums = run(algorithm, batch, rows, logits)
            value.backward()
            total += value.item()
            for name, number in sums.items():
                known = merged.get(name, number)
                merged[name] = (
                    number
                    if name not in merged
                    else (torch.minimum(known, number) if name.startswith("min/") else known + number)
                )
        return total, logits.grad, merged

    whole = accumulate([np.arange(GROUPS * G)])
    for parts in (1, 2, 5, 11, GROUPS * G):
        cuts = np.sort(rng.integers(0, GROUPS * G + 1, parts - 1))  # some parts are empty
        total, grad, sums = accumulate(np.split(rng.permutation(GROUPS * G), cuts))
        assert total == pytest.approx(whole[0], rel=1e-12, abs=1e-15)
        torch.testing.assert_close(grad, whole[1], rtol=1e-12, atol=1e-16)
        assert {k: float(v) for k, v in sums.items()} == pytest.approx({k: float(v) for k, v in whole[2].items()})


def test_completions_without_advantage_can_be_left_out():
    algorithm = Objective.of(GPG, max_new_tokens=LIMIT)
    batch = make_batch(6)
    live = (algorithm.advantages(ScoredGroups(batch.rewards)).reshape(-1) != 0.0).nonzero()[0]
    assert 0 < len(live) < GROUPS * G
    assert run(algorithm, batch, live)[0] == pytest.approx(run(algorithm, batch)[0].item(), rel=1e-12)


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


@pytest.mark.parametrize("config", [capped(AAPO), capped(GRPO)], ids=["aapo", "grpo"])
def test_log_ratios_beyond_float32_give_no_nan(config):
    algorithm = Objective.of(config, max_new_tokens=LIMIT)
    logprobs = torch.tensor([-200.0, -0.1, -200.0, -0.1], requires_grad=True)
    value, sums = algorithm.token_loss(
        Tokens(
            logprobs,
            torch.tensor([1.0, 1.0, -1.0, -1.0]),
            torch.ones(4),
            rollout_logprobs=torch.tensor([-0.1, -200.0, -0.1, -200.0]),
            old_logprobs=torch.tensor([-0.1, -200.0, -0.1, -200.0]),
            reference_logprobs=torch.tensor([-0.1, -200.0, -0.1, -200.0]),
        )
    )
    value.backward()
    assert value.isfinite()
    assert logprobs.grad.isfinite().all()
    assert all(number.isfinite() for number in sums.values())


@pytest.mark.parametrize("config", [AAPO, GRPO], ids=["aapo", "grpo"])
def test_an_all_padding_or_empty_microbatch_adds_nothing(config):
    for shape in ((0,), (2, 3)):
        nan = torch.full(shape, torch.nan)
        logprobs = nan.clone().requires_grad_()
        value, sums = Objective.of(config, LIMIT).token_loss(
            Tokens(logprobs, nan, torch.zeros(shape), rollout_logprobs=nan, old_logprobs=nan, reference_logprobs=nan)
        )
        value.backward()
        assert value.item() == 0.0
        assert (logprobs.grad == 0.0).all()
        assert sums.pop("min/negative_advantage_logprob") == math.inf
        assert all(number == 0 for number in sums.values())


def test_first_update_has_ratio_one_and_the_gradient_of_the_policy():
    logprobs = torch.tensor([-0.5, -3.0], requires_grad=True)
    config = dataclasses.replace(GRPO, kl_coefficient=0.0)
    value, sums = Objective.of(config, LIMIT).token_loss(
        Tokens(logprobs, torch.tensor([2.0, -1.0]), torch.tensor([0.5, 0.5]), rollout_logprobs=logprobs.detach())
    )
    value.backward()
    assert logprobs.grad.tolist() == [-1.0, 0.5]
    assert sums["ratio/mean"] == sums["tokens"] == 2


@pytest.mark.parametrize(("shape", "half"), [("linear", 0.6), ("cosine", 0.6)])
def test_the_margins_bounds_shrink_to_a_share_of_them_and_stay(shape, half):
    by = MarginSchedule(shape=shape, steps=10, end=0.2)
    objective = Objective.of(dataclasses.replace(AAPO, margin_schedule=by), LIMIT)
    rewards, reference = np.array([[1.0, 1.0]]), np.array([[0.0, 0.0]])
    deltas = [objective.advantages(ScoredGroups(rewards, reference, step=step))[0, 0] for step in (0, 5, 10, 50)]
    assert deltas == pytest.approx([0.28, half * 0.28, 0.2 * 0.28, 0.2 * 0.28])
    assert advantage.schedule(shape, 0.25, 0.0) == pytest.approx({"linear": 0.75, "cosine": 0.5 + 0.5**1.5}[shape])


def test_a_dual_clip_bounds_what_a_negative_advantage_pushes():
    """Ratios of 2 and 5 under A = -1 and bound 3: the second one counts 3 and has no gradient; A = 1 is as it was."""
    config = dataclasses.replace(GRPO, kl_coefficient=0.0, dual_clip=3.0)
    old = torch.full((3,), -3.0, dtype=torch.float64)
    logprobs = (old + torch.tensor([2.0, 5.0, 5.0]).double().log()).requires_grad_()
    tokens = Tokens(logprobs, torch.tensor([-1.0, -1.0, 1.0]).double(), torch.ones(3).double(), old, old_logprobs=old)
    value, _ = Objective.of(config, LIMIT).token_loss(tokens)
    value.backward()
    assert value.item() == pytest.approx(2 + 3 - 1.3)
    assert logprobs.grad.tolist() == pytest.approx([2.0, 0.0, 0.0])


def test_a_group_of_too_few_scored_completions_leaves_the_step_and_truncated_ones_their_loss():
    rewards = np.array([[1.0, 0.0, np.nan, np.nan], [1.0, 0.0, 0.0, np.nan]])
    truncated = np.array([[False] * 4, [True, False, False, False]])
    config = dataclasses.replace(GPG, min_group_size=3, mask_truncated=True)
    made = Objective.of(config, LIMIT).advantages(ScoredGroups(rewards, truncated=truncated))
    assert np.isnan(made[0]).all()
    assert made[1, 1:3].tolist() == [-1 / 3, -1 / 3]  # what was cut off counts in the mean
    assert np.isnan(made[1, [0, 3]]).all()


def test_mistakes_are_named():
    good = np.zeros((2, 4))
    aapo, paper = (Objective.of(config, LIMIT) for config in (AAPO, PAPER))
    bad = good.copy()
    bad[1, 2] = -np.inf
    with pytest.raises(ValueError, match=r"rewards\[1, 2\] is -inf"):
        aapo.advantages(ScoredGroups(bad, good))
    with pytest.raises(ValueError, match="needs the prompts' reference rewards"):
        aapo.advantages(ScoredGroups(good))
    with pytest.raises(ValueError, match="2 groups of rewards, but 3"):
        aapo.advantages(ScoredGroups(good, np.zeros((3, 4))))
    with pytest.raises(ValueError, match="needs seeds"):
        paper.advantages(ScoredGroups(good, np.zeros((2, 6))))
    with pytest.raises(ValueError, match="at least one each"):
        paper.advantages(ScoredGroups(good, np.zeros((2, 3)), seeds=[0, 1]))
    with pytest.raises(ValueError, match="the totals must count all ranks"):
        loss.token_weights([3, 4], "token", total_tokens=6, total_sequences=2, fixed_length=LIMIT)
    with pytest.raises(ValueError, match="needs the reference's log-probs"):
        Objective.of(GRPO, LIMIT).token_loss(Tokens(*torch.ones(3, 2), rollout_logprobs=torch.zeros(2)))
