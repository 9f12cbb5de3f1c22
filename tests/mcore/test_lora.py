"""LoRA: what is trained, drawn from, saved and exported is one function, whatever the layout."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.checkpoint_runs import make_checkpointer, same, state_of, train, weights
from tests.tiny_models import make_config

LAYOUTS = {"2x1+sp": (2, 2, 1, True), "1x2": (2, 1, 2, False), "2x2": (4, 2, 2, False)}
TARGETS = ["linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"]


def make_policy(path, tp=1, pp=1, sp=False, trains=True):
    """A policy with adapters of rank 4 on all layers."""
    from tests.policies import make_policy

    config = make_config(
        path,
        model__tensor_model_parallel_size=tp,
        model__pipeline_model_parallel_size=pp,
        model__sequence_parallel=sp,
        model__lora={"rank": 4, "alpha": 8, "target_modules": TARGETS},
        model__optim__lr=0.02,
    )
    return make_policy(config, trains=trains)


def _train(path, tp=1, pp=1, sp=False):
    """Weights before and after two steps, those of the reference, of the frozen layers, and what the engine draws."""
    policy = make_policy(path, tp, pp, sp)
    policy.keep_reference()
    before = weights(policy)
    frozen = [p.detach().clone() for p in policy.module.parameters() if not p.requires_grad]
    for step in (1, 2):
        train(policy, step)
    with policy.reference_weights():
        reference = weights(policy)
    unchanged = all(torch.equal(p, q) for p, q in zip(_frozen(policy), frozen, strict=True))
    return before, weights(policy), reference, unchanged, *_rollout(policy)


def _frozen(policy):
    return [p for p in policy.module.parameters() if not p.requires_grad]


def _rollout(policy):
    """The engine's log-probs of what it draws, and the learner's of the same tokens; None on ranks that get none."""
    from nemo_aapo.engines.megatron.engine import MegatronEngine
    from nemo_aapo.learner.microbatch import PrefixGroup, collate
    from nemo_aapo.types import Sample, SamplingSpec

    engine = MegatronEngine(policy.module, 160, 512)
    prompts = [np.arange(5, 5 + n, dtype=np.int32) for n in (3, 7)]
    rows = engine.generate(prompts, SamplingSpec(1.0, 8, (1,)), seeds=[[11], [12]])
    completions = [row[0] for row in rows]
    samples = [Sample(p, c.token_ids, c.logprobs, 1.0) for p, c in zip(prompts, completions, strict=True)]
    multiple = policy.config.model.tensor_model_parallel_size
    batch = collate(PrefixGroup.separate(samples), [1.0] * len(samples), multiple=multiple, device=torch.device("cpu"))
    [learner] = policy.score([batch])
    return np.concatenate([c.logprobs for c in completions]), learner


@pytest.fixture(scope="module")
def trained(ranks, tiny_models):
    """One rank's figures, by model."""
    return {name: ranks.run(_train, tiny_models[name])[0] for name in ("qwen2_tied",)}


def test_only_adapters_are_trained_and_the_reference_is_the_base_model(trained):
    before, after, reference, unchanged, *_ = trained["qwen2_tied"]
    assert unchanged
    assert same(before, reference)
    changed = {name for name in after if not np.array_equal(after[name], before[name])}
    assert changed == {name for name in after if name.endswith("_proj.weight")}


def test_the_engine_draws_from_what_the_learner_trains(trained):
    *_, engine, learner = trained["qwen2_tied"]
    np.testing.assert_allclose(engine, learner, atol=1e-5)


@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_every_layout_trains_the_same_adapters(ranks, tiny_models, trained, layout):
    world, *cut = LAYOUTS[layout]
    _, after, *_ = trained["qwen2_tied"]
    for answer in ranks.run(_train, tiny_models["qwen2_tied"], *cut, world=world, tp=cut[0], pp=cut[1]):
        _, other, _, unchanged, engine, learner = answer
        assert unchanged
        for name in after:
            np.testing.assert_allclose(other[name], after[name], atol=2e-5, err_msg=name)
        np.testing.assert_allclose(engine, learner, atol=1e-5)


def _in_bf16(path, tp):
    """Whether all projections have their adapters beside them; log-probs of the engine and the learner."""
    from nemo_aapo.engines.megatron.decoder import Decoder
    from nemo_aapo.engines.megatron.matmul import Adapted

    policy = make_policy(path, tp, trains=False)
    policy.module.bfloat16()
    for name, parameter in policy.module.named_parameters():
        if name.endswith("adapter.linear_out.weight"):
            parameter.data.fill_(0.05)
    engine, learner = _rollout(policy)
    layer = Decoder(policy.module)._layers[0]
    apart = all(isinstance(w, Adapted) for w in (layer.qkv, layer.projection, layer.gate_and_up, layer.down))
    return apart, engine, learner


@pytest.mark.parametrize("tp", [1, 2])
def test_in_bf16_the_engine_applies_adapters_beside_the_weights_as_the_learner_does(ranks, tiny_models, tp):
    for apart, engine, learner in ranks.run(_in_bf16, tiny_models["qwen2_tied"], tp, world=tp, tp=tp):
        assert apart
        np.testing.assert_allclose(engine, learner, atol=0.2)  # bf16's noise is 0.05; without the adapters it is 2


def _save_at_one(path, directory):
    policy = make_policy(path, 2, 1)
    train(policy, 1)
    make_checkpointer(directory).save(1, policy, state_of(1))
    train(policy, 2)
    return weights(policy)


def _resume(path, directory, pp):
    policy = make_policy(path, 1, pp)
    policy.keep_reference()
    make_checkpointer(directory).resume(policy)
    train(policy, 2)
    with policy.reference_weights():
        reference = weights(policy)
    return weights(policy), reference


def test_a_resumed_run_is_the_uninterrupted_one_on_another_layout_too(ranks, tiny_models, tmp_path):
    path = tiny_models["qwen2_tied"]
    later = ranks.run(_save_at_one, path, tmp_path / "checkpoints", world=2, tp=2)[0]
    for resumed, reference in ranks.run(_resume, path, tmp_path / "checkpoints", 2, world=2, pp=2):
        for name in later:
            np.testing.assert_allclose(resumed[name], later[name], atol=2e-5, err_msg=name)
        assert not same(reference, resumed)
