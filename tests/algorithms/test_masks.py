"""Masks for tokens that another policy sampled: which tokens each lets through, and what is left of the loss."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from nemo_aapo.algorithms import Tokens
from nemo_aapo.algorithms.objective import Objective
from nemo_aapo.config.schema import Band
from tests.algorithms.test_algorithms import AAPO, GRPO

LENGTHS = [2, 1, 3]
LEARNER = torch.tensor([0.5, 0.2, 0.1, 0.9, 0.3, 0.4], dtype=torch.float64).log()
ENGINE = torch.tensor([0.5, 0.8, 0.01, 0.6, 0.3, 0.5], dtype=torch.float64).log()
ADVANTAGES = torch.tensor([1.0, 1.0, -1.0, 1.0, 1.0, 1.0], dtype=torch.float64)
BAND = Band(low=0.5, high=5.0)


def by_hand(setting: str) -> list[bool]:
    """Token by token from the definitions."""
    ratios = (LEARNER - ENGINE).exp().tolist()
    sequences = [ratios[:2], ratios[2:3], ratios[3:]]
    if setting == "token_mask":
        return [0.5 <= r <= 5.0 for r in ratios]
    if setting == "sequence_mask":
        kept = [0.6 <= math.prod(row) ** (1 / len(row)) <= 5.0 for row in sequences]
    elif setting == "sequence_kl_limit":
        kept = [math.fsum(r - math.log(r) - 1 for r in row) / len(row) <= 0.5 for row in sequences]
    else:  # the third token has risen against its advantage, the fourth with it
        moved = [0.0, -0.6, 0.09, 0.3, 0.0, -0.1]
        return [not m * math.copysign(1, a) > 0.2 for m, a in zip(moved, ADVANTAGES.tolist(), strict=True)]
    return [keep for keep, row in zip(kept, sequences, strict=True) for _ in row]


@pytest.mark.parametrize("config", [AAPO, GRPO], ids=["cross_entropy", "ratio_clip"])
@pytest.mark.parametrize(
    ("setting", "value", "most"),
    [
        ("token_mask", BAND, 4),
        ("sequence_mask", Band(low=0.6, high=5.0), 3),
        ("sequence_kl_limit", 0.5, 5),
        ("probability_change_limit", 0.2, 5),
    ],
)
def test_a_mask_drops_the_tokens_of_its_definition_and_leaves_the_denominator(config, setting, value, most):
    """What is left is the loss with the value of the masked tokens 0: no other token's weight changes."""
    config = dataclasses.replace(config, kl_coefficient=0.0)
    kept = torch.tensor(by_hand(setting))
    assert kept.sum() == most
    results = []
    for settings, weights in (
        (dataclasses.replace(config, **{setting: value}), torch.ones(6)),
        (config, torch.ones(6)),
    ):
        leaf = LEARNER.clone().requires_grad_()
        tokens = Tokens(leaf, ADVANTAGES, weights.double() / 6, ENGINE, old_logprobs=LEARNER, lengths=LENGTHS)
        loss, sums = Objective.of(settings, 8).token_loss(tokens)
        loss.backward()
        results.append((loss.item(), leaf.grad, sums))
    (loss, gradient, sums), (_, plain, plain_sums) = results
    assert torch.equal(gradient, plain * kept)
    values = -ADVANTAGES / 6 * (LEARNER if config is not GRPO and config.loss == "cross_entropy" else 1.0)
    assert loss == pytest.approx((values * kept).sum().item())
    assert sums["masked_fraction"] == 6 - most
    assert sums["tokens"] == 6
    assert "masked_fraction" not in plain_sums


def test_masks_go_together_and_with_the_truncated_weight():
    config = dataclasses.replace(
        AAPO, token_mask=BAND, sequence_mask=Band(low=0.6, high=5.0), importance_weight_cap=1.2
    )
    leaf = LEARNER.clone().requires_grad_()
    loss, sums = Objective.of(config, 8).token_loss(
        Tokens(leaf, ADVANTAGES, torch.ones(6).double(), ENGINE, lengths=LENGTHS)
    )
    loss.backward()
    kept = torch.tensor(by_hand("token_mask")) & torch.tensor(by_hand("sequence_mask"))
    weight = (LEARNER - ENGINE).exp().clamp(max=1.2)
    torch.testing.assert_close(leaf.grad, -ADVANTAGES * weight * kept)
    assert sums["masked_fraction"] == (~kept).sum()
