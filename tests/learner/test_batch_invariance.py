"""Over random batches: loss and gradient do not depend on budget, order, packing or data-parallel degree."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from tests.tiny_models import make_config

AGGREGATIONS = ("token", "sequence", "fixed_length")
SEEDS = range(6)
MAX_NEW_TOKENS = 16


def random_groups(seed):
    """Groups of one size: lengths from none to the limit, some groups without any advantage."""
    from nemo_aapo.types import Completion, Group, Prompt

    rng = np.random.default_rng(seed)
    count, size = int(rng.integers(2, 7)), int(rng.integers(1, 6))
    groups = []
    for i in range(count):
        prompt = rng.integers(2, 160, rng.integers(1, 24)).astype(np.int32)
        completions = []
        for _ in range(size):
            tokens = rng.integers(2, 160, rng.integers(0, MAX_NEW_TOKENS + 1)).astype(np.int32)
            completions.append(Completion(tokens, -3 * rng.random(len(tokens), np.float32), "stop", 0))
        advantages = np.zeros(size) if rng.random() < 0.3 and i else rng.normal(size=size)
        groups.append(
            Group(
                prompt=Prompt(str(i), prompt, "", "", ""),
                completions=tuple(completions),
                texts=(),
                rewards=np.zeros(size),
                reward_parts={},
                failed=np.zeros(size, bool),
                advantages=advantages,
            )
        )
    return groups


def shuffled(groups, rng):
    """The same completions with the same advantages, in another order."""
    mixed = []
    for i in rng.permutation(len(groups)):
        order = rng.permutation(len(groups[i].completions))
        completions = tuple(groups[i].completions[k] for k in order)
        mixed.append(dataclasses.replace(groups[i], completions=completions, advantages=groups[i].advantages[order]))
    return mixed


def gradients(path, orders, budgets):
    """Loss and gradient [parameters of this rank] by (seed, order, budget); the weights stay as they are."""
    from nemo_aapo.algorithms.objective import Objective
    from nemo_aapo.learner.learner import Learner
    from nemo_aapo.rollout.spread import own_shard
    from tests.policies import make_policy

    found, kept = {}, []
    policy = make_policy(make_config(path))

    def keep_gradient():
        kept.append(np.concatenate([p.main_grad.double().flatten().numpy() for p in policy.module.parameters()]))

    policy.optimization.optimizer.step_with_ready_grads = keep_gradient
    policy.optimization.optimizer.clip_grad_norm = lambda limit: 1.0
    for seed in SEEDS:
        cap = 2.0 if seed % 2 else None
        aggregation = AGGREGATIONS[seed % len(AGGREGATIONS)]
        config = make_config(path, algorithm__loss_aggregation=aggregation, algorithm__importance_weight_cap=cap)
        for order in orders:
            groups = random_groups(seed)
            if order:
                groups = shuffled(groups, np.random.default_rng(order))
            for budget in budgets:
                learner = Learner(policy, Objective.of(config.algorithm, MAX_NEW_TOKENS), budget, 1, 1)
                loss = learner.update(groups[own_shard(len(groups))])["loss"]
                found[seed, order, budget] = loss, kept.pop()
    return found


@pytest.fixture(scope="module")
def expected(ranks, tiny_models):
    """By seed: one process, one micro-batch or few, in order."""
    [found] = ranks.run(gradients, tiny_models["qwen2_tied"], (0,), (4096,))
    assert all(np.linalg.norm(gradient) > 0 for _, gradient in found.values())
    return {seed: value for (seed, _, _), value in found.items()}


@pytest.mark.parametrize("data_parallel_size", [1, 2, 4])
def test_loss_and_gradient_are_the_same_for_any_budget_order_and_data_parallel_degree(
    ranks, tiny_models, expected, data_parallel_size
):
    answers = ranks.run(gradients, tiny_models["qwen2_tied"], (1,), (40, 90), world=data_parallel_size)
    for found in answers:
        for (seed, _, _), (loss, gradient) in found.items():
            wanted, reference = expected[seed]
            assert loss == pytest.approx(wanted, rel=1e-5, abs=1e-6)
            assert np.linalg.norm(gradient - reference) <= 1e-5 * np.linalg.norm(reference)
