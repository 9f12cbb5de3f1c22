"""Context parallelism: a row cut over ranks gives the loss, the gradient and the log-probs of a whole one."""

from __future__ import annotations

import itertools
from unittest import mock

import numpy as np
import pytest
import torch

from nemo_aapo.distributed import parallel
from nemo_aapo.learner.microbatch import PrefixGroup, collate, mirrored_parts, pad_to
from nemo_aapo.mcore import packing
from nemo_aapo.types import Sample
from tests.learner.test_layouts import (
    DISTRIBUTED_OPTIMIZER,
    FULL_RECOMPUTE,
    GRPO,
    OVERLAP,
    PACKED,
    SELECTIVE_RECOMPUTE,
    SEQUENCE_PARALLEL,
    SHARED,
    learn,
    metrics_of,
    saved_groups,
)
from tests.tiny_models import SIZES, make_config, save_character_tokenizer, save_model

LAYOUTS = {  # key-value heads of the model; TP, PP, CP, DP; what else is set
    "2 heads: 1x1x2": (2, (1, 1, 2, 1), PACKED),
    "2 heads: 1x1x2, shared prompts, full recompute": (2, (1, 1, 2, 1), SHARED | FULL_RECOMPUTE),
    "2 heads: 1x2x2, shared prompts": (2, (1, 2, 2, 1), SHARED),
    "2 heads: 1x1x2x2, distributed optimizer": (2, (1, 1, 2, 2), PACKED | DISTRIBUTED_OPTIMIZER),
    "2 heads: 1x1x2x2, shared prompts, overlap": (2, (1, 1, 2, 2), SHARED | DISTRIBUTED_OPTIMIZER | OVERLAP),
    "4 heads: 2x1x2": (4, (2, 1, 2, 1), PACKED),
    "4 heads: 1x1x4, shared prompts": (4, (1, 1, 4, 1), SHARED),
    # key-value heads are fewer than tensor x context ranks: keys and values are gathered
    "2 heads: 2x1x2+sp, shared prompts, selective recompute": (
        2,
        (2, 1, 2, 1),
        SHARED | SEQUENCE_PARALLEL | SELECTIVE_RECOMPUTE,
    ),
    "2 heads: 1x1x4": (2, (1, 1, 4, 1), PACKED | FULL_RECOMPUTE),
    "1 head: 1x1x2, shared prompts": (1, (1, 1, 2, 1), SHARED),
    "1 head: 1x2x2": (1, (1, 2, 2, 1), PACKED),
}


def context(ranks: int, more: dict) -> dict:
    return more | {"model__context_parallel_size": ranks}


# ---------------------------------------------------------------- the cut


def random_groups(seed: int, shared: bool) -> list[PrefixGroup]:
    generator = np.random.default_rng(seed)
    groups = []
    for _ in range(3):
        prompt = generator.integers(2, 90, generator.integers(1, 20)).astype(np.int32)
        lengths = generator.integers(1, 40, generator.integers(1, 4))
        samples = [
            Sample(prompt, generator.integers(2, 90, n).astype(np.int32), np.full(n, -1.0, np.float32), float(n))
            for n in lengths
        ]
        groups += [PrefixGroup(tuple(samples))] if shared else PrefixGroup.separate(samples)
    return groups


def collated(seed: int, shared: bool, ranks: int, multiple: int = 1):
    groups = random_groups(seed, shared)
    weights = np.ones(sum(len(group.samples) for group in groups))
    device = torch.device("cpu")
    return groups, collate(groups, weights, multiple=multiple, device=device, packed=True, context_parallel_size=ranks)


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_a_sequence_is_cut_as_transformer_engine_cuts_it_into_parts_of_equal_work(ranks):
    bounds = 2 * ranks * np.array([0, 5, 6, 13])
    parts = mirrored_parts(bounds.tolist(), ranks)
    assert sorted(parts.ravel().tolist()) == list(range(bounds[-1]))
    for rank, part in enumerate(parts):
        expected = []
        for start, end in itertools.pairwise(bounds):
            chunk = (end - start) // (2 * ranks)
            for place in (rank, 2 * ranks - 1 - rank):
                expected += range(start + place * chunk, start + (place + 1) * chunk)
        assert part.tolist() == expected
    offsets = parts - bounds[np.searchsorted(bounds, parts, side="right") - 1]
    assert len(set((offsets + 1).sum(1).tolist())) == 1  # the tokens that each rank's attend to


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("multiple", [1, 6])
def test_the_parts_of_a_row_hold_each_token_once_and_every_group_is_padded_for_the_cut(shared, ranks, multiple):
    for seed in range(5):
        groups, whole = collated(seed, shared, ranks, multiple)
        padded = sum(pad_to(group.row_tokens, 2 * ranks) for group in groups)
        assert whole.input_ids.shape[1] == pad_to(padded, np.lcm(multiple, 2 * ranks))
        assert sorted(whole.parts.flatten().tolist()) == list(range(whole.input_ids.shape[1]))
        parts = [whole.part(rank) for rank in range(ranks)]
        for name in ("targets", "advantages", "rollout_logprobs"):
            joined = whole.whole([getattr(part, name).numpy() for part in parts])
            assert joined.tolist() == getattr(whole, name).tolist()
        for part, tokens in zip(parts, whole.parts, strict=True):
            assert part.input_ids[0].tolist() == whole.input_ids[0, tokens].tolist()
            assert part.position_ids[0].tolist() == whole.position_ids[0, tokens].tolist()
            assert sum(part.lengths) == len(part.targets)
        states = [tokens[part.positions].numpy() for part, tokens in zip(parts, whole.parts, strict=True)]
        assert whole.whole(states).tolist() == whole.positions.tolist()
        assert np.sum([part.lengths for part in parts], axis=0).tolist() == list(whole.lengths)


def test_padded_rows_and_rows_that_are_not_cut_are_refused():
    groups = random_groups(0, shared=False)
    with pytest.raises(ValueError, match="packed=True is needed"):
        collate(groups, np.ones(len(groups)), multiple=1, device=torch.device("cpu"), context_parallel_size=2)
    with pytest.raises(ValueError, match="not cut for context parallelism"):
        collated(0, False, 1)[1].part(0)


def test_transformer_engine_is_told_of_whole_sequences_that_divide_into_chunks(monkeypatch):
    """On a GPU mcore counts positions by the part that TransformerEngine's kernels expect of each sequence."""
    _, batch = collated(0, False, 2)
    monkeypatch.setattr(parallel, "context_parallel_rank", lambda: 1)
    monkeypatch.setattr(packing, "device", lambda: torch.device("cuda"))
    told = packing.packed_sequences(batch.part(1))
    assert told.cu_seqlens_q.tolist() == batch.cu_seqlens.tolist()
    assert not (told.cu_seqlens_q % 4).any()
    assert told.max_seqlen_q == told.cu_seqlens_q.diff().max()


# ---------------------------------------------------------------- attention


def attention_of_parts(heads: int) -> list[float]:
    """Largest differences of this rank's part of a row from the whole: values and gradients, for rows of each kind."""
    from megatron.core.transformer.enums import AttnMaskType
    from megatron.core.transformer.transformer_config import TransformerConfig

    from nemo_aapo.mcore.cpu.attention import LocalAttention

    size, rank = parallel.context_parallel_size(), parallel.context_parallel_rank()
    config = TransformerConfig(
        num_layers=1, hidden_size=64, num_attention_heads=4, num_query_groups=heads, context_parallel_size=size
    )
    attention = LocalAttention(config, 1, AttnMaskType.causal, "self", attention_dropout=0.0)
    found = []
    for seed, shared in itertools.product(range(3), (False, True)):
        _, batch = collated(seed, shared, size, multiple=16)
        row, own = batch.input_ids.shape[1], batch.parts[rank]
        generator = torch.Generator().manual_seed(seed)
        whole = [torch.randn(row, n, 16, generator=generator, requires_grad=True) for n in (4, heads, heads)]
        upstream = torch.randn(row, 64, generator=generator)
        expected = attention.packed(*whole, packing.packed_sequences(batch.replace(parts=None)))
        expected.backward(upstream)
        parts = [x.detach()[own].requires_grad_() for x in whole]
        with mock.patch.object(packing, "QUERIES_AT_ONCE", 7):  # so that a run has several pieces
            out = attention(*parts, None, packed_seq_params=packing.packed_sequences(batch))
        out.backward(upstream[own])
        found.append(float((out - expected[own]).abs().max()))
        found += [float((part.grad - x.grad[own]).abs().max()) for part, x in zip(parts, whole, strict=True)]
    return found


@pytest.mark.exact
@pytest.mark.parametrize("size", [2, 4])
def test_attention_of_a_cut_row_is_that_of_a_whole_one_for_any_number_of_heads(ranks, size):
    for heads in (1, 2, 4):
        for differences in ranks.run(attention_of_parts, heads, world=size, cp=size):
            assert max(differences) < 1e-5


# ---------------------------------------------------------------- training


@pytest.fixture(scope="module")
def alone(ranks, tmp_path_factory):
    """By the number of key-value heads: a model, and what one process learns from one micro-batch."""
    from transformers import Qwen2Config

    found = {}
    for heads in (1, 2, 4):
        folder = tmp_path_factory.mktemp(f"heads{heads}")
        sizes = SIZES | {"num_key_value_heads": heads, "num_hidden_layers": 2}
        save_model(Qwen2Config(**sizes, tie_word_embeddings=True), folder)
        save_character_tokenizer(folder)
        found[heads] = folder, ranks.run(learn, folder, 1, 1, 1024, {})[0]
    return found


@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_loss_and_gradient_are_those_of_one_process(ranks, alone, layout):
    heads, (tp, pp, cp, dp), more = LAYOUTS[layout]
    path, (expected, weights) = alone[heads]
    words = (path, tp, pp, 128, context(cp, more))
    for metrics, updated in ranks.run(learn, *words, world=tp * pp * cp * dp, tp=tp, pp=pp, cp=cp):
        assert metrics["loss"] == pytest.approx(expected["loss"], rel=1e-6, abs=1e-7)
        assert metrics["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-5)
        for key in ("entropy", "negative_advantage_logprob", "parity/mult_prob_error", "parity/gen_kl"):
            assert metrics[key] == pytest.approx(expected[key], rel=1e-5), key
        for name, tensor in updated.items():
            np.testing.assert_allclose(tensor, weights[name], atol=2e-6, err_msg=name)


def test_so_are_those_of_a_mixture_of_experts(ranks, tiny_models):
    """The experts of a layer lie on the ranks that cut a sequence among them, and gradients reach each expert once."""
    path = tiny_models["qwen3_moe"]
    ((expected, weights),) = ranks.run(learn, path, 1, 1, 1024, {})
    for tp, more in ((1, SHARED | FULL_RECOMPUTE), (2, PACKED | SEQUENCE_PARALLEL | DISTRIBUTED_OPTIMIZER)):
        words = (path, tp, 1, 128, context(2, more | {"model__expert_model_parallel_size": 2}))
        for metrics, updated in ranks.run(learn, *words, world=2 * tp, tp=tp, cp=2, ep=2):
            assert metrics["loss"] == pytest.approx(expected["loss"], rel=1e-6, abs=1e-7)
            assert metrics["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-5)
            for key in ("entropy", "router/load", "router/entropy", "router/dropped"):
                assert metrics[key] == pytest.approx(expected[key], rel=1e-5), key
            for name, tensor in updated.items():
                np.testing.assert_allclose(tensor, weights[name], atol=2e-6, err_msg=name)


@pytest.mark.parametrize("loss", ["ratio_clip", "sequence_ratio_clip"])
def test_the_old_policys_and_the_references_log_probs_reach_every_rank(ranks, alone, loss):
    """GRPO with its KL term: several updates need the log-probs of all tokens, whoever computed them. GSPO's loss: a
    sequence has one ratio, whose tokens lie on several ranks."""
    path, _ = alone[2]
    settings = GRPO | {"algorithm__loss": loss}
    [expected] = ranks.run(metrics_of, path, 1, 1, 1024, PACKED | settings, 2)
    assert expected["ratio/mean"] == pytest.approx(1.0, abs=1e-6)
    for metrics in ranks.run(metrics_of, path, 1, 1, 128, context(2, PACKED | settings), 2, world=2, cp=2):
        assert metrics["loss"] == pytest.approx(expected["loss"], rel=1e-6, abs=1e-7)
        assert metrics["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-5)
        for key in ("kl", "entropy", "ratio/mean", "ratio/clipped_low_fraction", "ratio/clipped_high_fraction"):
            assert metrics[key] == pytest.approx(expected[key], rel=1e-5, abs=1e-9), key


def test_adapters_are_trained_as_by_one_process(ranks, alone):
    lora = {"rank": 4, "alpha": 8, "target_modules": ["linear_qkv", "linear_proj", "linear_fc1"]}
    more = PACKED | {"model__lora": lora}
    path, _ = alone[1]
    [expected] = ranks.run(metrics_of, path, 1, 1, 1024, more)
    for metrics in ranks.run(metrics_of, path, 1, 1, 128, context(2, more), world=2, cp=2):
        assert metrics["loss"] == pytest.approx(expected["loss"], rel=1e-6, abs=1e-7)
        assert metrics["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-5)


def gate(path, more):
    """The parity gate's figures, the log-probs that it compared, and those of each completion by its number."""
    from nemo_aapo.algorithms.objective import Objective
    from nemo_aapo.learner.learner import Learner
    from nemo_aapo.rollout.spread import own_shard
    from tests.policies import make_policy

    config = make_config(path, max_tokens_per_microbatch=1024, **more)
    policy = make_policy(config, trains=False)
    learner = Learner(policy, Objective.of(config.algorithm, 16), 1024, 1, packed=True, share_prompts=True)
    groups = saved_groups(2)[own_shard(2)]
    batches, _ = learner._microbatches(groups)
    first = [own_shard(2).start * 100 + 100 * i for i in range(len(groups))]
    return learner.parity(groups), policy.score(batches), learner.token_figures(groups, first)


def test_scoring_returns_every_token_to_every_rank(ranks, alone):
    path, _ = alone[2]
    [(figures, scored, kept)] = ranks.run(gate, path, {})
    assert np.sort(np.concatenate(scored)) == pytest.approx(np.sort(np.hstack([of[0] for of in kept.values()])))
    more = context(2, {"model__pipeline_model_parallel_size": 2})
    for cut_figures, cut_scored, cut_kept in ranks.run(gate, path, more, world=4, pp=2, cp=2):
        assert cut_kept.keys() == kept.keys()
        for number, of in kept.items():
            np.testing.assert_allclose(cut_kept[number], of, atol=1e-5)
        np.testing.assert_allclose(np.concatenate(cut_scored), np.concatenate(scored), atol=1e-5)
        assert cut_figures == pytest.approx(figures, rel=1e-6)
