"""The weight map: bytes survive the round trip, and the learner computes what transformers computes."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch

from tests.marks import exact_for
from tests.tiny_models import make_config

LAYOUTS = {"1x1": (1, 1, 1, False), "2x1": (2, 2, 1, False), "1x2": (2, 1, 2, False), "2x2+sp": (4, 2, 2, True)}


EXPERT_LAYOUTS = {  # ranks, TP, PP, sequence parallelism, EP
    "1": (1, 1, 1, False, 1),
    "EP 2": (2, 1, 1, False, 2),
    "TP 2": (2, 2, 1, True, 1),
    "TP 2, EP 2": (2, 2, 1, True, 2),
    "PP 2, EP 2": (4, 1, 2, False, 2),
}


def _round_trip(path, tp, pp, sp, ep=1):
    from nemo_aapo.learner.microbatch import PrefixGroup, collate
    from nemo_aapo.types import Sample
    from tests.policies import make_policy

    config = make_config(
        path,
        model__tensor_model_parallel_size=tp,
        model__pipeline_model_parallel_size=pp,
        model__sequence_parallel=sp,
        model__expert_model_parallel_size=ep,
        rollout__temperature=0.7,
    )
    policy = make_policy(config)
    weights = {name: tensor.numpy().copy() for name, tensor in policy.named_weights()}
    samples = [Sample(p, c, np.zeros(len(c), np.float32), 1.0) for p, c in sequences()]
    batch = collate(
        PrefixGroup.separate(samples), [1.0] * len(samples), multiple=2 if sp else 1, device=torch.device("cpu")
    )
    return weights, policy.score([batch, batch])


def sequences():
    generator = np.random.default_rng(0)
    return [
        (generator.integers(2, 160, p).astype(np.int32), generator.integers(2, 160, t).astype(np.int32))
        for p, t in ((5, 7), (1, 12), (9, 1), (3, 3))
    ]


def _devices_of_an_export(path):
    from tests.policies import make_policy

    policy = make_policy(make_config(path), trains=False)
    policy.module.to("meta")
    return [tensor.device.type for _, tensor in policy.named_weights()]


def test_an_export_stays_where_the_weights_lie(ranks, tiny_models):
    """On a GPU an engine reads it there. Here the weights lie on meta, from which nothing can be copied to the host."""
    (devices,) = ranks.run(_devices_of_an_export, tiny_models["qwen2"])
    assert len(devices) > 20
    assert set(devices) == {"meta"}


@pytest.mark.parametrize("name", ["qwen2", "qwen2_tied", "qwen3", "llama"])
@pytest.mark.parametrize("layout", exact_for(LAYOUTS, "1x1", "2x2+sp"))
def test_weights_survive_the_round_trip_and_logprobs_equal_those_of_transformers(ranks, tiny_models, name, layout):
    world, tp, pp, sp = LAYOUTS[layout]
    results = ranks.run(_round_trip, tiny_models[name], tp, pp, sp, world=world, tp=tp, pp=pp)
    compare(tiny_models[name], results)


@pytest.mark.exact
@pytest.mark.parametrize("layout", list(EXPERT_LAYOUTS))
def test_so_do_those_of_experts_wherever_they_are(ranks, tiny_models, layout):
    world, tp, pp, sp, ep = EXPERT_LAYOUTS[layout]
    path = tiny_models["qwen3_moe"]
    compare(path, ranks.run(_round_trip, path, tp, pp, sp, ep, world=world, tp=tp, pp=pp, ep=ep))


@pytest.mark.exact
@pytest.mark.parametrize("written", [{"norm_topk_prob": False}, {}])
def test_shares_of_all_experts_are_those_of_transformers_too(ranks, tiny_models, tmp_path, written):
    """Where ``norm_topk_prob`` is false, or left out, the weights of a token's experts do not add up to 1."""
    path = shutil.copytree(tiny_models["qwen3_moe"], tmp_path / "model")
    config = json.loads((path / "config.json").read_text())
    del config["norm_topk_prob"]
    (path / "config.json").write_text(json.dumps({**config, **written}))
    compare(path, ranks.run(_round_trip, path, 1, 1, False))


def compare(path, results):
    """Hold weights against those in the file, and log-probs against those of transformers, the latter to 1e-5."""
    from safetensors.numpy import load_file
    from transformers import AutoModelForCausalLM

    reference = AutoModelForCausalLM.from_pretrained(path).eval()
    expected = []
    with torch.no_grad():
        for prompt, completion in sequences():
            ids = torch.from_numpy(np.concatenate([prompt, completion])).long()[None]
            logprobs = torch.log_softmax(reference(ids).logits[0] / 0.7, dim=-1)
            expected.append(logprobs[len(prompt) - 1 : -1].gather(1, ids[0, len(prompt) :, None])[:, 0].numpy())
    state = load_file(path / "model.safetensors")
    for weights, scored in results:
        assert sorted(weights) == sorted(state)
        assert all(np.array_equal(weights[key], state[key]) for key in state)
        for logprobs in scored:
            np.testing.assert_allclose(logprobs, np.concatenate(expected), atol=1e-5)
