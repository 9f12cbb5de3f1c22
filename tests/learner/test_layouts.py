"""One saved batch of rollouts gives the same loss and gradient however model and batch are cut up."""

from __future__ import annotations

import numpy as np
import pytest

from tests.marks import exact_for
from tests.tiny_models import SIZES, make_config, save_character_tokenizer, save_model

PACKED = {"model__sequence_packing": True}
SHARED = {**PACKED, "model__share_prompts": True}
SEQUENCE_PARALLEL = {"model__sequence_parallel": True}
DISTRIBUTED_OPTIMIZER = {"model__optim__use_distributed_optimizer": True}
OVERLAP = {"model__optim__overlap_grad_reduce": True, "model__optim__overlap_param_gather": True}
FULL_RECOMPUTE = {"model__recompute_granularity": "full"}
SELECTIVE_RECOMPUTE = {"model__recompute_granularity": "selective", "model__recompute_modules": ["core_attn", "mlp"]}
LAYOUTS = {  # TP, PP, DP; micro-batch budget; what else is set
    "2x1x1": ((2, 1, 1), 128, {}),
    "1x2x1": ((1, 2, 1), 128, {}),
    "2x2x1": ((2, 2, 1), 128, {}),
    "1x1x2": ((1, 1, 2), 128, {}),
    "2x1x2+sp": ((2, 1, 2), 128, SEQUENCE_PARALLEL),
    "1x1x1, small micro-batches": ((1, 1, 1), 48, {}),
    "1x1x1, packed": ((1, 1, 1), 128, PACKED),
    "2x2x1+sp, packed": ((2, 2, 1), 64, SEQUENCE_PARALLEL | PACKED),
    "1x1x2, packed, distributed optimizer": ((1, 1, 2), 128, PACKED | DISTRIBUTED_OPTIMIZER),
    "2x1x2+sp, distributed optimizer": ((2, 1, 2), 128, SEQUENCE_PARALLEL | DISTRIBUTED_OPTIMIZER),
    "1x2x2, packed, distributed optimizer, overlap": ((1, 2, 2), 128, PACKED | DISTRIBUTED_OPTIMIZER | OVERLAP),
    "1x1x1, full recompute": ((1, 1, 1), 128, FULL_RECOMPUTE),
    "2x1x1+sp, packed, selective recompute": ((2, 1, 1), 128, SEQUENCE_PARALLEL | PACKED | SELECTIVE_RECOMPUTE),
    "1x1x1, packed, shared prompts": ((1, 1, 1), 128, SHARED),
    "1x1x1, packed, shared prompts, whole groups": ((1, 1, 1), 1024, SHARED),
    "2x2x1+sp, packed, shared prompts": ((2, 2, 1), 64, SEQUENCE_PARALLEL | SHARED),
    "1x2x2, packed, shared prompts, distributed optimizer": ((1, 2, 2), 128, SHARED | DISTRIBUTED_OPTIMIZER),
    "2x1x1+sp, packed, shared prompts, full recompute": ((2, 1, 1), 128, SEQUENCE_PARALLEL | SHARED | FULL_RECOMPUTE),
    "1x1x1, packed, shared prompts, selective recompute": ((1, 1, 1), 256, SHARED | SELECTIVE_RECOMPUTE),
}


def saved_groups(count: int = 6, size: int = 4, seed: int = 3):
    """Scored groups as a rollout would leave them: mixed lengths, a dead group, a one-token completion."""
    from nemo_aapo.types import Completion, Group, Prompt

    generator = np.random.default_rng(seed)
    groups = []
    for i in range(count):
        prompt = generator.integers(2, 160, generator.integers(1, 20)).astype(np.int32)
        completions = []
        for j in range(size):
            tokens = generator.integers(2, 160, 1 if (i, j) == (1, 0) else generator.integers(2, 16)).astype(np.int32)
            completions.append(Completion(tokens, np.full(len(tokens), -2.0, np.float32), "stop", 0))
        advantages = np.zeros(size) if i == 2 else generator.normal(size=size)
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


def failed_in(groups, gone=False):
    """Where scoring failed for some completions of the last groups, for all of one; ``gone``: these are not there."""
    from nemo_aapo.types import Group

    lost = {3: [0, 2], 4: [0, 1, 2, 3], 5: [1]}

    def without(group: Group, failed: np.ndarray) -> Group:
        if not gone:
            return group.replace(failed=failed, advantages=np.where(failed, np.nan, group.advantages))
        there = tuple(c for c, is_lost in zip(group.completions, failed, strict=True) if not is_lost)
        return group.replace(completions=there, advantages=group.advantages[~failed], failed=failed[~failed])

    changed = [without(group, np.isin(np.arange(4), lost.get(i, []))) for i, group in enumerate(groups)]
    return [group for group in changed if group.completions]


def learn(path, tp, pp, budget, more, updates=1, change=None, gone=False):
    """Metrics and the weights after the updates, on this rank."""
    policy, metrics = update(path, tp, pp, budget, more, updates, change, gone)
    return metrics, {name: tensor.numpy().copy() for name, tensor in policy.named_weights()}


def metrics_of(*arguments):
    """``learn`` without the weights, which take a large model long to gather and to send."""
    return update(*arguments)[1]


def update(path, tp, pp, budget, more, updates=1, change=None, gone=False, before=lambda policy: None):
    """The policy after the updates, and their metrics. ``before`` is shown it as it was."""
    from nemo_aapo.algorithms.objective import Objective
    from nemo_aapo.config import pad_multiple
    from nemo_aapo.learner.learner import Learner
    from nemo_aapo.rollout.spread import own_shard
    from tests.policies import make_policy

    config = make_config(
        path,
        model__tensor_model_parallel_size=tp,
        model__pipeline_model_parallel_size=pp,
        model__optim__lr=1e-3,
        model__optim__eps=1e-3,  # with 1e-8 Adam's first update is the gradient's sign, noise included
        max_tokens_per_microbatch=budget,
        **more,
    )
    policy = make_policy(config)
    before(policy)
    if config.algorithm.kl_coefficient:
        policy.keep_reference()
    learner = Learner(
        policy,
        Objective.of(config.algorithm, 16),
        budget,
        updates,
        pad_multiple(policy.config),
        packed=config.model.sequence_packing,
        share_prompts=config.model.share_prompts,
    )
    groups = saved_groups() if change is None else change(saved_groups(), gone)
    return policy, learner.update(groups[own_shard(len(groups))])


GRPO = {
    "algorithm__name": "grpo",
    "algorithm__reference": None,
    "algorithm__reference_samples": None,
    "algorithm__reference_store": None,
    "algorithm__margin": None,
    "algorithm__loss": "ratio_clip",
    "algorithm__clip": {"low": 0.2, "high": 0.2},
    "algorithm__kl_coefficient": 0.04,
    "algorithm__loss_aggregation": "sequence",
}


@pytest.fixture(scope="module")
def alone(ranks, tiny_models):
    """What one process learns from one micro-batch."""
    [learned] = ranks.run(learn, tiny_models["qwen2_tied"], 1, 1, 1024, {})
    return learned


@pytest.mark.parametrize(
    "layout",
    exact_for(
        LAYOUTS,
        "1x1x2",
        "2x2x1+sp, packed",
        "1x2x2, packed, distributed optimizer, overlap",
        "1x1x1, full recompute",
        "1x1x1, packed, shared prompts, whole groups",
        "2x2x1+sp, packed, shared prompts",
    ),
)
def test_loss_and_gradient_are_those_of_one_process(ranks, tiny_models, alone, layout):
    (tp, pp, dp), budget, more = LAYOUTS[layout]
    expected, weights = alone
    answers = ranks.run(learn, tiny_models["qwen2_tied"], tp, pp, budget, more, world=tp * pp * dp, tp=tp, pp=pp)
    for metrics, updated in answers:
        assert metrics["loss"] == pytest.approx(expected["loss"], rel=1e-6, abs=1e-7)
        assert metrics["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-5)
        assert metrics["entropy"] == pytest.approx(expected["entropy"], rel=1e-5)
        for name, tensor in updated.items():
            np.testing.assert_allclose(tensor, weights[name], atol=2e-6, err_msg=name)


def test_an_entropy_coefficient_gives_what_one_process_gives_also_to_groups_without_advantage(
    ranks, tiny_models, alone
):
    path, more = tiny_models["qwen2_tied"], PACKED | {"algorithm__entropy_coefficient": 0.3}
    [(expected, weights)] = ranks.run(learn, path, 1, 1, 1024, more)
    live, _ = alone  # without the group whose advantages are all zero
    assert expected["loss"] == pytest.approx(live["loss"] - 0.3 * expected["entropy"], rel=1e-6)
    assert abs(expected["entropy"] - live["entropy"]) > 1e-4
    for tp, pp, cp, set_besides in ((2, 1, 1, SEQUENCE_PARALLEL), (1, 2, 1, {}), (1, 1, 2, {}), (1, 1, 1, {})):
        layout = more | set_besides | {"model__context_parallel_size": cp}
        for metrics, updated in ranks.run(learn, path, tp, pp, 128, layout, world=2, tp=tp, pp=pp, cp=cp):
            for key, bound in (("loss", 1e-6), ("grad_norm", 1e-5), ("entropy", 1e-5)):
                assert metrics[key] == pytest.approx(expected[key], rel=bound), key
            for name, tensor in updated.items():
                np.testing.assert_allclose(tensor, weights[name], atol=2e-6, err_msg=name)


@pytest.fixture(scope="module")
def large_embedding(tmp_path_factory):
    """A model of two layers with an embedding of 30 million entries, which three ranks can share."""
    from transformers import Qwen2Config

    heads = {"num_attention_heads": 6, "num_key_value_heads": 3}
    width = {"hidden_size": 384, "intermediate_size": 192, "vocab_size": 78_336}
    folder = tmp_path_factory.mktemp("large_embedding")
    save_model(Qwen2Config(**SIZES | width | heads | {"num_hidden_layers": 2}, tie_word_embeddings=True), folder)
    save_character_tokenizer(folder)
    return folder


@pytest.mark.once
def test_the_gradient_norm_of_a_large_embedding_is_that_of_one_process(ranks, large_embedding):
    """A norm that loses digits with a tensor's size differs where the tensor is cut."""
    [expected], *cut = (
        ranks.run(metrics_of, large_embedding, tp, pp, 1024, {}, world=tp * pp, tp=tp, pp=pp)
        for tp, pp in ((1, 1), (1, 2), (3, 1))
    )
    for metrics in (metrics for answers in cut for metrics in answers):
        # log-probs of some 16 nats, half of them with a negative weight, add up to a loss of 0.6
        assert metrics["loss"] == pytest.approx(expected["loss"], abs=16e-7)
        assert metrics["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-6)


@pytest.mark.parametrize("algorithm", ["aapo", "gpg", "grpo"])
def test_completions_that_failed_on_one_rank_are_nowhere_as_if_they_had_not_been_sampled(ranks, tiny_models, algorithm):
    """Loss, norm, GPG's factor and the new weights: on two data-parallel ranks, and on one that never saw them."""
    gpg = {"algorithm__rescale_dead_groups": True, "algorithm__loss_aggregation": "fixed_length"}
    more = {"aapo": SHARED, "gpg": gpg, "grpo": GRPO}[algorithm]
    path = tiny_models["qwen2_tied"]
    ((expected, weights),) = ranks.run(learn, path, 1, 1, 1024, more, 1, failed_in, True)
    assert algorithm != "gpg" or expected["alpha"] == 5 / 4
    for metrics, updated in ranks.run(learn, path, 1, 1, 128, more, 1, failed_in, world=2):
        for key in ("loss", "grad_norm", "entropy", "alpha", *(["kl"] if algorithm == "grpo" else [])):
            assert metrics[key] == pytest.approx(expected[key], rel=1e-5, abs=1e-7), key
        for name, tensor in updated.items():
            np.testing.assert_allclose(tensor, weights[name], atol=2e-6, err_msg=name)


def scored_among_others(path, other_seed, share_prompts, first=13, last=20):
    """Log-probs of one sequence in the middle of a row, whose other sequences depend on the seed.

    With shared prompts, two of those stand behind the same prompt.
    """
    import torch

    from nemo_aapo.learner.microbatch import PrefixGroup, collate
    from nemo_aapo.types import Sample
    from tests.policies import make_policy

    config = make_config(path, model__sequence_packing=True, model__share_prompts=share_prompts)
    policy = make_policy(config)

    def sample(seed, length):
        tokens = np.random.default_rng(seed).integers(2, 160, length).astype(np.int32)
        prompt = np.arange(5, dtype=np.int32) + 2 if share_prompts else tokens[:5]
        return Sample(prompt, tokens[5:], np.zeros(length - 5, np.float32), 1.0)

    samples = (sample(other_seed, first), sample(1, 17), sample(other_seed + 1, last))
    groups = [PrefixGroup(tuple(samples))] if share_prompts else PrefixGroup.separate(samples)
    batch = collate(groups, [1.0] * 3, multiple=8, device=torch.device("cpu"), packed=True)
    assert (batch.expand is not None) is share_prompts
    return policy.score([batch])[0][first - 5 : first - 5 + 12]


@pytest.mark.parametrize("share_prompts", [False, True])
def test_no_attention_leaks_between_packed_sequences(ranks, tiny_models, share_prompts):
    """What neighbours say changes nothing of a sequence's log-probs, not even the last bit; their lengths do that."""
    ((first,), (second,), (third,)) = (
        ranks.run(scored_among_others, tiny_models["qwen3"], seed, share_prompts, *lengths)
        for seed, lengths in ((10, ()), (20, ()), (30, (45, 9)))
    )
    assert first.tolist() == second.tolist()
    np.testing.assert_allclose(first, third, atol=1e-5)
    assert len(set(first.tolist())) == 12


def tokens_of_one_group(path):
    """Completion tokens that this of two ranks trains on, of a step with a single group."""
    from nemo_aapo.algorithms.objective import Objective
    from nemo_aapo.learner.learner import Learner
    from nemo_aapo.rollout.spread import own_shard
    from tests.policies import make_policy

    config = make_config(path, max_tokens_per_microbatch=1024)
    policy = make_policy(config)
    learner = Learner(policy, Objective.of(config.algorithm, 16), 1024, 1, packed=True, share_prompts=True)
    batches, metrics = learner._microbatches(saved_groups(1, size=8)[own_shard(1)])
    assert metrics["shared_prompt_fraction"] > 0.1
    return sum(batch.targets.numel() for batch in batches)


def test_a_single_group_with_a_shared_prompt_is_spread_over_the_ranks(ranks, tiny_models):
    tokens = ranks.run(tokens_of_one_group, tiny_models["qwen2"], world=2)
    assert min(tokens) > 0.3 * sum(tokens)


def test_several_grpo_updates_with_kl_agree_between_layouts(ranks, tiny_models):
    path = tiny_models["qwen3"]
    ((expected, weights),) = ranks.run(learn, path, 1, 1, 1024, GRPO, 3)
    assert expected["kl"] == 0.0  # the first update starts at the reference
    assert expected["ratio/mean"] == pytest.approx(1.0, abs=1e-6)
    for metrics, updated in ranks.run(learn, path, 2, 2, 128, GRPO, 3, world=4, tp=2, pp=2):
        assert metrics["loss"] == pytest.approx(expected["loss"], rel=1e-4)
        for name, tensor in updated.items():
            np.testing.assert_allclose(tensor, weights[name], atol=1e-5, err_msg=name)


def test_a_loss_that_is_not_finite_leaves_the_weights_alone_on_every_rank(ranks, tiny_models):
    for message in ranks.run(_learn_nan, tiny_models["qwen2"], world=2, pp=2):
        assert "loss nan" in message


def _learn_nan(path):
    import torch

    from nemo_aapo.errors import NonFiniteError
    from nemo_aapo.learner.microbatch import PrefixGroup, collate
    from nemo_aapo.types import Sample
    from tests.policies import make_policy

    policy = make_policy(make_config(path, model__pipeline_model_parallel_size=2))
    before = [parameter.detach().clone() for parameter in policy.module.parameters()]
    sample = Sample(np.array([3, 4], np.int32), np.array([5], np.int32), np.zeros(1, np.float32), float("nan"))
    batch = collate([PrefixGroup((sample,))], [1.0], multiple=1, device=torch.device("cpu"))
    try:
        policy.optimization.train_step([batch], lambda logprobs, entropy, b: ((b.advantages * logprobs).sum(), {}))
    except NonFiniteError as error:
        assert all(torch.equal(a, b) for a, b in zip(before, policy.module.parameters(), strict=True))
        assert policy.version == 0
        return str(error)
    return "no error"
