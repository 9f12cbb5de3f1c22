"""A mixture of experts learns the same from one saved batch, however model, experts and batch are cut up."""

from __future__ import annotations

import numpy as np
import pytest

from tests.learner.test_layouts import (
    DISTRIBUTED_OPTIMIZER,
    FULL_RECOMPUTE,
    OVERLAP,
    PACKED,
    SEQUENCE_PARALLEL,
    SHARED,
    learn,
    update,
)
from tests.tiny_models import make_config

RECOMPUTED_EXPERTS = {"model__recompute_granularity": "selective", "model__recompute_modules": ["core_attn", "moe"]}
LAYOUTS = {  # TP, PP, DP, EP; micro-batch budget; what else is set
    "2x1x1+sp, all experts on each rank": ((2, 1, 1, 1), 128, SEQUENCE_PARALLEL),
    "2x1x1+sp, EP 2, packed": ((2, 1, 1, 2), 128, SEQUENCE_PARALLEL | PACKED),
    "1x1x2, EP 2, selective recompute": ((1, 1, 2, 2), 128, PACKED | RECOMPUTED_EXPERTS),
    "2x1x2+sp, EP 4, shared prompts": ((2, 1, 2, 4), 128, SEQUENCE_PARALLEL | SHARED),
    "2x1x2+sp, EP 2, distributed optimizer": ((2, 1, 2, 2), 128, SEQUENCE_PARALLEL | DISTRIBUTED_OPTIMIZER),
    "1x2x2, EP 2, shared prompts, full recompute": ((1, 2, 2, 2), 128, SHARED | FULL_RECOMPUTE),
    "2x2x1+sp, EP 2, packed": ((2, 2, 1, 2), 64, SEQUENCE_PARALLEL | PACKED),
    "1x1x4, EP 2, distributed optimizer, overlap": ((1, 1, 4, 2), 128, PACKED | DISTRIBUTED_OPTIMIZER | OVERLAP),
}


@pytest.fixture(scope="module")
def model(tiny_models):
    return tiny_models["qwen3_moe"]


@pytest.fixture(scope="module")
def alone(ranks, model):
    """What one process learns from one micro-batch."""
    [learned] = ranks.run(learn, model, 1, 1, 1024, {})
    return learned


@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_loss_gradient_and_routers_are_those_of_one_process(ranks, model, alone, layout):
    (tp, pp, dp, ep), budget, more = LAYOUTS[layout]
    expected, weights = alone
    more = {**more, "model__expert_model_parallel_size": ep}
    for metrics, updated in ranks.run(learn, model, tp, pp, budget, more, world=tp * pp * dp, tp=tp, pp=pp, ep=ep):
        assert metrics["loss"] == pytest.approx(expected["loss"], rel=1e-6, abs=1e-7)
        assert metrics["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-5)
        assert metrics["entropy"] == pytest.approx(expected["entropy"], rel=1e-5)
        assert metrics["router/load"] == expected["router/load"]
        assert metrics["router/entropy"] == pytest.approx(expected["router/entropy"], rel=1e-6)
        assert metrics["router/dropped"] == 0.0
        for name, tensor in updated.items():
            np.testing.assert_allclose(tensor, weights[name], atol=2e-6, err_msg=name)


def test_the_routers_metrics_are_plausible(alone):
    metrics, _ = alone
    assert 1.0 < metrics["router/load"] < 4.0  # 8 experts, 2 for each token
    assert 0.5 < metrics["router/entropy"] < np.log(8)


def _clipped(path):
    """Norm before, and norm over dense and experts' gradients after clipping to a tenth."""
    import torch

    from nemo_aapo.mcore.optimizer import parts

    policy, metrics = update(path, 1, 1, 1024, {"model__optim__clip_grad": 0.1})
    gradients = [p.grad for part in parts(policy.optimization.optimizer) for p in part.get_parameters()]
    every = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g) for g in gradients]))
    return metrics["grad_norm"], float(every), len(parts(policy.optimization.optimizer))


def test_gradients_of_experts_and_of_the_rest_are_clipped_to_one_norm(ranks, model, alone):
    [(before, after, optimizers)] = ranks.run(_clipped, model)
    assert optimizers == 2
    assert before == pytest.approx(alone[0]["grad_norm"], rel=1e-6)
    assert after == pytest.approx(0.1, rel=1e-4)


def _grouped_and_one_by_one(path):
    """Output and gradients of a layer's experts, computed together and by mcore's own modules; some have no token."""
    import torch
    from megatron.core.transformer.moe.experts import SequentialMLP

    from nemo_aapo.mcore.experts.grouped import GroupedExperts
    from tests.policies import make_policy

    experts = make_policy(make_config(path), trains=False).module.decoder.layers[0].mlp.experts
    counts = torch.tensor([3, 0, 5, 1, 0, 4, 2, 2])
    generator = torch.Generator().manual_seed(0)
    x, probs, grad = (torch.randn(*shape, generator=generator) for shape in ((17, 64), (17,), (17, 64)))
    found = []
    for kind in (GroupedExperts, SequentialMLP):
        assert isinstance(experts, GroupedExperts)
        x, probs = x.detach().requires_grad_(), probs.detach().requires_grad_()
        out, _ = kind.forward(experts, x, counts, probs)
        out.backward(grad)
        weights = [torch.zeros_like(p) if p.grad is None else p.grad for p in experts.parameters()]
        found.append([out, x.grad, probs.grad, *weights])
        experts.zero_grad()
    return max((a - b).abs().max().item() for a, b in zip(*found, strict=True)), len(found[0])


def test_experts_computed_together_are_mcores_one_after_the_other(ranks, model):
    [(difference, tensors)] = ranks.run(_grouped_and_one_by_one, model)
    assert tensors == 3 + 2 * 8
    assert difference < 2e-5
