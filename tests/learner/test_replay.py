"""The learner sends tokens to the experts that the engine sent them to: the same loss on every layout, given routes."""

from __future__ import annotations

import shutil

import numpy as np
import pytest

from nemo_aapo.types import NO_ROUTE, Group, Prompt, Routes
from tests.learner.test_layouts import GRPO, learn, metrics_of, saved_groups
from tests.tiny_models import make_config

LAYERS, EXPERTS = 4, 8
REPLAY = {"rollout__replay_routes": True}
PACKED = {"model__sequence_packing": True, "model__share_prompts": False}
SHARED = {"model__sequence_packing": True, "model__share_prompts": True}
PADDED = {"model__sequence_packing": False, "model__share_prompts": False}
SEQUENCE_PARALLEL = {"model__sequence_parallel": True}
FULL_RECOMPUTE = {"model__recompute_granularity": "full"}
SELECTIVE_RECOMPUTE = {"model__recompute_granularity": "selective", "model__recompute_modules": ["core_attn", "moe"]}
LAYOUTS = {  # TP, PP, DP x CP; CP, EP; micro-batch budget; what else is set
    "1x1x1, selective recompute": ((1, 1, 1), (1, 1), 128, PADDED | SELECTIVE_RECOMPUTE),
    "2x1x1+sp, EP2": ((2, 1, 1), (1, 2), 128, PADDED | SEQUENCE_PARALLEL),
    "1x1x2, EP2, shared prompts": ((1, 1, 2), (1, 2), 128, SHARED),
    "1x2x2, EP2, packed, full recompute": ((1, 2, 2), (1, 2), 64, PACKED | FULL_RECOMPUTE),
    "2x2x1+sp, EP2, shared prompts, full recompute": (
        (2, 2, 1),
        (1, 2),
        64,
        SHARED | SEQUENCE_PARALLEL | FULL_RECOMPUTE,
    ),
    "CP2, EP2, shared prompts": ((1, 1, 2), (2, 2), 128, SHARED),
}


def routed(groups, gone=False):
    """The groups with routes of each token's own, far from what the router would choose."""
    return [group.replace(completions=tuple(_routed(group, c) for c in group.completions)) for group in groups]


def _routed(group: Group, completion):
    import dataclasses

    ids = np.concatenate([group.prompt.token_ids, completion.token_ids[:-1]]).astype(int)[:, None]
    first = (ids * 7 + np.arange(LAYERS)) % EXPERTS
    routes = np.stack([first, (first + 1 + ids % (EXPERTS - 1)) % EXPERTS], 2).astype(np.uint8)
    length = len(group.prompt.token_ids)
    routes[: length - 1, -1] = NO_ROUTE  # as the engine leaves them
    return dataclasses.replace(completion, routes=Routes(routes[:length], routes[length:]))


def run(ranks, function, path, layout, change):
    """``function`` of test_layouts on the ranks of a layout."""
    (tp, pp, dp), (cp, ep), budget, more = layout
    more = more | REPLAY | {"model__context_parallel_size": cp, "model__expert_model_parallel_size": ep}
    arguments = (path, tp, pp, budget, more, 1, change)
    return ranks.run(function, *arguments, world=tp * pp * dp, tp=tp, pp=pp, cp=cp, ep=ep)


ALONE = ((1, 1, 1), (1, 1), 1024, PADDED)


@pytest.fixture(scope="module")
def alone(ranks, tiny_models):
    """What one process learns from routed tokens in one micro-batch."""
    [learned] = run(ranks, learn, tiny_models["qwen3_moe"], ALONE, routed)
    return learned


@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_given_the_same_routes_loss_and_gradient_are_those_of_one_process(ranks, tiny_models, alone, layout):
    expected, weights = alone
    assert expected["router/replay_disagreement"] > 0.8  # the routes are not the router's own
    for metrics, updated in run(ranks, learn, tiny_models["qwen3_moe"], LAYOUTS[layout], routed):
        assert metrics["loss"] == pytest.approx(expected["loss"], rel=1e-6, abs=1e-7)
        assert metrics["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-5)
        assert metrics["entropy"] == pytest.approx(expected["entropy"], rel=1e-5)
        share = "router/replay_disagreement"
        assert metrics[share] == pytest.approx(expected[share], abs=1e-9)
        for name, tensor in updated.items():
            np.testing.assert_allclose(tensor, weights[name], atol=2e-6, err_msg=name)


def few(groups, gone=False):
    """One group, without routes."""
    return groups[1:2]


def few_routed(groups, gone=False):
    return routed(groups[1:2])


@pytest.fixture(scope="module")
def near_ties(tiny_models, tmp_path_factory):
    """The model with a first router to which three experts are equally good for every token of ``few``, but for
    rounding: their scores differ by what no token's hidden state has."""
    import torch
    from safetensors.torch import load_file, save_file
    from transformers import AutoModelForCausalLM

    path = tmp_path_factory.mktemp("near_ties") / "model"
    shutil.copytree(tiny_models["qwen3_moe"], path)
    model, seen = AutoModelForCausalLM.from_pretrained(path).eval(), []
    model.model.layers[0].mlp.gate.register_forward_hook(lambda _, inputs, out: seen.append(inputs[0].flatten(0, -2)))
    (group,) = few(saved_groups())
    with torch.no_grad():
        for completion in group.completions:
            model(torch.from_numpy(np.concatenate([group.prompt.token_ids, completion.token_ids])).long()[None])
    prompt = len(group.prompt.token_ids)
    hidden = torch.cat([seen[0], *(rows[prompt:] for rows in seen[1:])]).double()
    assert len(hidden) < hidden.shape[1]  # as many conditions as a router's row can meet
    _, _, directions = torch.linalg.svd(hidden)
    row = torch.linalg.pinv(hidden) @ torch.ones(len(hidden), dtype=torch.double)
    router = torch.zeros(EXPERTS, hidden.shape[1], dtype=torch.double)
    router[[1, 4, 6]] = torch.stack([row, row + directions[-1], row + directions[-2]])
    weights = load_file(path / "model.safetensors")
    weights["model.layers.0.mlp.gate.weight"] = router.float()
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    return path


def test_near_ties_of_a_router_give_the_same_loss_on_every_layout_only_if_routes_are_replayed(ranks, near_ties):
    layouts = (((2, 1, 1), (1, 2), 128, PADDED | SEQUENCE_PARALLEL), ((1, 1, 2), (1, 2), 48, PADDED))
    for change, replayed in ((few, False), (few_routed, True)):
        ((expected),) = run(ranks, metrics_of, near_ties, ALONE, change)
        losses = [run(ranks, metrics_of, near_ties, layout, change)[0]["loss"] for layout in layouts]
        differences = [abs(loss - expected["loss"]) for loss in losses]
        if replayed:
            assert max(differences) <= max(1e-6 * abs(expected["loss"]), 1e-7)
        else:
            assert max(differences) > 1e-4 * abs(expected["loss"])


def test_old_log_probs_replay_the_policys_routes_and_the_reference_routes_by_itself(ranks, tiny_models):
    """At the first update policy and reference have the same weights: only their routes differ."""
    arguments = (tiny_models["qwen3_moe"], 1, 1, 1024, GRPO | PACKED | REPLAY, 2)
    (forced,) = ranks.run(metrics_of, *arguments, routed)
    (own,) = ranks.run(metrics_of, *arguments)
    assert forced["ratio/mean"] == pytest.approx(1.0, abs=1e-6)
    assert forced["kl"] > 1e-3
    assert own["kl"] == 0.0


def _generated_and_learned(path):
    """Metrics of an update on what the engine drew from the same weights, and of the parity gate."""
    from nemo_aapo.algorithms.objective import Objective
    from nemo_aapo.engines.megatron.engine import MegatronEngine
    from nemo_aapo.learner.learner import Learner
    from tests.engines.megatron.generation import ROOMY, SEEDS, SPEC, VOCAB_SIZE, prompts
    from tests.policies import make_policy

    config = make_config(path, rollout__temperature=SPEC.temperature, **SHARED, **REPLAY)
    policy = make_policy(config)
    engine = MegatronEngine(policy.module, VOCAB_SIZE, ROOMY, record_routes=True)
    completions = engine.generate(prompts(), SPEC, SEEDS)
    groups = [
        Group(
            prompt=Prompt(str(i), ids, "", "", ""),
            completions=tuple(row),
            texts=(),
            rewards=np.zeros(len(row)),
            reward_parts={},
            failed=np.zeros(len(row), bool),
            advantages=np.linspace(-1, 1, len(row)),
        )
        for i, (ids, row) in enumerate(zip(prompts(), completions, strict=True))
        if len(row) > 1
    ]
    learner = Learner(policy, Objective.of(config.algorithm, 24), 1024, 1, packed=True, share_prompts=True)
    routers = [layer.mlp.router for layer in policy.module.decoder.layers]
    metrics = learner.update(groups)
    assert all(router.router_replay is None for router in routers)  # nothing stays behind
    return metrics


def test_engine_and_learner_agree_in_every_choice(ranks, tiny_models):
    (metrics,) = ranks.run(_generated_and_learned, tiny_models["qwen3_moe"])
    assert metrics["router/replay_disagreement"] == 0.0


def test_a_layer_that_is_computed_again_gets_the_routes_of_its_own_micro_batch():
    """With two micro-batches under way: their backward passes come later, in the order of their forward passes."""
    import torch

    from nemo_aapo.mcore.experts.routing import RouterReplay

    def choose(replay, routes, gradients):
        replay.routes = routes
        with torch.set_grad_enabled(gradients):
            return replay.get_replay_topk(scores, 2, None, None, lambda scores, k, *_: scores.topk(k))[1].tolist()

    scores = torch.tensor([[3.0, 2.0, 1.0, 0.0]])
    first, second, none = (torch.tensor([row], dtype=torch.uint8) for row in ([3, 2], [0, 2], [NO_ROUTE] * 2))
    replay = RouterReplay(trains=True)
    assert [choose(replay, routes, False) for routes in (first, second, none)] == [[[3, 2]], [[0, 2]], [[0, 1]]]
    assert [choose(replay, none, True) for _ in range(3)] == [[[3, 2]], [[0, 2]], [[0, 1]]]
    assert (replay.known, replay.otherwise) == (2, 2)  # each once, and that without a route not at all
    assert [choose(replay, routes, True) for routes in (second, first)] == [[[0, 2]], [[3, 2]]]  # not computed again
    assert [choose(RouterReplay(trains=False), first, False) for _ in range(2)] == [[[3, 2]]] * 2


def test_the_weights_of_replayed_experts_are_the_routers_scores_and_have_a_gradient():
    import torch

    from nemo_aapo.mcore.experts.routing import RouterReplay

    scores = torch.tensor([[3.0, 2.0, 1.0, 0.0]], requires_grad=True)
    replay = RouterReplay(trains=True)
    replay.routes = torch.tensor([[3, 1]], dtype=torch.uint8)
    values, _ = replay.get_replay_topk(scores, 2, None, None, lambda scores, k, *_: scores.topk(k))
    values.sum().backward()
    assert values.tolist() == [[0.0, 2.0]]
    assert scores.grad.tolist() == [[0.0, 1.0, 0.0, 1.0]]
