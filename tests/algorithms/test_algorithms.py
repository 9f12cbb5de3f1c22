"""AAPO, GPG and GRPO against the papers' equations (tests/equations.py), and the properties that follow from them."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from nemo_aapo.algorithms import ScoredGroups, Tokens, advantage, loss
from nemo_aapo.algorithms.objective import Objective
from nemo_aapo.config.schema import AlgorithmConfig, Clip, Margin
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


LEVERS = {
    "aapo_unscaled": dataclasses.replace(AAPO, scale_rewards=False),
    "aapo_scaled_margin_entropy": dataclasses.replace(AAPO, scale_margin=True, entropy_coefficient=0.3),
    "aapo_paper_scaled_margin": dataclasses.replace(PAPER, scale_margin=True),
    "grpo_capped_entropy": dataclasses.replace(GRPO, importance_weight_cap=1.1, entropy_coefficient=0.3),
}


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
    distribution = logits[index].log_softmax(-1)
    logprobs = distribution.gather(-1, batch.targets[index][..., None])[..., 0]
    others = {
        "advantages": torch.as_tensor(advantages.reshape(-1, 1)).expand(-1, LIMIT),
        "rollout_logprobs": batch.rollout,
        "old_logprobs": batch.old,
        "reference_logprobs": batch.reference,
    }
    others = {name: values[index] for name, values in others.items()}
    others["entropy"] = -(distribution.exp() * distribution).sum(-1)
    others = {name: values.masked_fill(~valid, torch.nan) for name, values in others.items()}
    tokens = Tokens(logprobs, weights=torch.as_tensor(alpha * weights)[:, None] * valid, **others)
    if objective.config.loss == "sequence_ratio_clip":  # the tokens end to end, without padding
        columns = {name: getattr(tokens, name)[valid] for name in ("logprobs", "weights", *others)}
        tokens = Tokens(**columns, lengths=batch.lengths[rows].tolist())
    return objective.token_loss(tokens)


@pytest.mark.parametrize("aggregation", ["token", "sequence", "fixed_length"])
@pytest.mark.parametrize(
    "config",
    [AAPO, PAPER, capped(AAPO), GPG, GRPO, capped(GRPO), *LEVERS.values(), *NEW.values()],
    ids=["aapo", "aapo_paper", "aapo_capped", "gpg", "grpo", "grpo_capped", *LEVERS, *NEW],
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
