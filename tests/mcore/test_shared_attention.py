"""Attention over shared prompts, merged by log-sum-exps, is that over whole sequences, values and gradients."""

from __future__ import annotations

import itertools
import types
from unittest import mock

import numpy as np
import pytest
import torch

from nemo_aapo.learner.microbatch import PrefixGroup, collate
from nemo_aapo.mcore.attention import flash_gpu, merged
from nemo_aapo.mcore.attention.merged import attend
from nemo_aapo.mcore.attention.sharing import sharing
from nemo_aapo.mcore.attention.spans import RowAttention
from nemo_aapo.mcore.micro_batch import MicroBatch
from nemo_aapo.mcore.packing import packed_sequences
from nemo_aapo.types import Sample

Gradients = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def random_row(seed: int, device: str = "cpu") -> MicroBatch:
    """Groups that share a prompt beside sequences that share none, completions of one token, and padding."""
    generator = np.random.default_rng(seed)

    def sample(prompt: np.ndarray, length: int) -> Sample:
        return Sample(prompt, np.ones(length, np.int32), np.zeros(length, np.float32), 1.0)

    groups = []
    for count in (1, *generator.integers(1, 6, 3), 3):
        prompt = np.ones(generator.integers(1, 50), np.int32)
        lengths = [1, *generator.integers(1, 30, count - 1)]
        groups.append(PrefixGroup(tuple(sample(prompt, n) for n in lengths)))
    weights = np.ones(sum(len(group.samples) for group in groups))
    return collate(groups, weights, multiple=16, device=torch.device(device), packed=True)


def tensors(batch: MicroBatch, seed: int, groups: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """Query, key and value, four heads of 8, and an upstream gradient."""
    generator = torch.Generator().manual_seed(seed)
    made = [
        torch.randn(batch.input_ids.shape[1], n, 8, generator=generator, dtype=dtype) for n in (4, groups, groups, 4)
    ]
    return [x.requires_grad_(i < 3) for i, x in enumerate(made)]


def over_whole_sequences(
    batch: MicroBatch, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
) -> torch.Tensor:
    """Each sequence copied together and attended to by itself, its results taken back: the definition."""
    results = []
    for start, stop in itertools.pairwise(batch.cu_seqlens.tolist()):
        tokens = torch.arange(start, stop) if batch.expand is None else batch.expand[start:stop]
        q, k, v = (x[tokens].transpose(0, 1) for x in (query, key, value))
        k, v = (x.repeat_interleave(len(q) // len(x), 0) for x in (k, v))
        scores = (0.3 * q @ k.mT).masked_fill(torch.ones(len(tokens), len(tokens)).triu(1).bool(), -torch.inf)
        results.append((scores.softmax(-1) @ v).transpose(0, 1))
    together = torch.cat(results)
    return together if batch.contract is None else together[batch.contract]


@pytest.mark.exact
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_merged_attention_is_that_over_whole_sequences(groups):
    for seed in range(10):
        batch = random_row(seed)
        *given, upstream = tensors(batch, seed, groups, torch.float32)
        exact = [x.detach().double().requires_grad_() for x in given]
        expected = over_whole_sequences(batch, *exact)
        out = attend(*given, batch.row, 0.3)
        torch.testing.assert_close(out.double(), expected, rtol=0, atol=1e-6)
        found = torch.autograd.grad(out, given, upstream)
        for gradient, right in zip(found, torch.autograd.grad(expected, exact, upstream.double()), strict=True):
            torch.testing.assert_close(gradient.double(), right, rtol=1e-5, atol=1e-5)


# ---------------------------------------------------------------- the kernels of a GPU, by a stand-in


class FlashByDefinition:
    """torch's flash operators for sequences end to end, by definition; takes what their schemas take."""

    def __init__(self) -> None:
        ops = torch.ops.aten
        self.schemas = {
            True: ops._flash_attention_forward.default._schema,
            False: ops._flash_attention_backward.default._schema,
        }
        self.calls = 0

    def forward(self, *arguments: object, **options: object) -> tuple[torch.Tensor, ...]:
        said = self._bound(True, arguments, options)
        out, lse = torch.zeros_like(said["query"]), said["query"].new_zeros(said["query"].shape[1::-1])
        for queries, keys, p, scores in self._spans(said):
            out[queries] = (p @ self._heads(said["value"][keys], said)).transpose(0, 1)
            lse[:, queries] = scores.logsumexp(-1)
        nothing = torch.empty(0)
        return out, lse, nothing, nothing, nothing

    def backward(self, *arguments: object, **options: object) -> Gradients:
        said = self._bound(False, arguments, options)
        q, k, v, grad, out, scale = (said[name] for name in ("query", "key", "value", "grad_out", "out", "scale"))
        dq, dk, dv = map(torch.zeros_like, (q, k, v))
        for queries, keys, p, _ in self._spans(said):
            do = grad[queries].transpose(0, 1)
            of_values = do @ self._heads(v[keys], said).mT
            ds = scale * p * (of_values - (do * out[queries].transpose(0, 1)).sum(-1, keepdim=True))
            dq[queries] = (ds @ self._heads(k[keys], said)).transpose(0, 1)
            for whole, part in ((dk, ds.mT @ q[queries].transpose(0, 1)), (dv, p.mT @ do)):
                whole[keys] = part.unflatten(0, (k.shape[1], -1)).sum(1).transpose(0, 1)
        return dq, dk, dv

    def _bound(self, is_forward: bool, arguments: tuple, options: dict) -> dict:
        self.calls += 1
        taken = self.schemas[is_forward].arguments
        places = [a.name for a in taken if not a.kwarg_only]
        assert len(arguments) == len(places)
        assert options.keys() <= {a.name for a in taken if a.kwarg_only}
        said = dict(zip(places, arguments, strict=True)) | options
        assert said["dropout_p"] == 0.0
        for side in ("q", "k"):
            assert said[f"cum_seq_{side}"].dtype is torch.int32
            assert said[f"max_{side}"] == said[f"cum_seq_{side}"].diff().max() > 0
            assert said[f"cum_seq_{side}"][-1] == len(said["query" if side == "q" else "key"])
        assert all(said[name].stride(-1) == 1 for name in ("query", "key", "value"))
        return said

    def _spans(self, said: dict):
        for queries, keys in zip(*(itertools.pairwise(said[f"cum_seq_{side}"].tolist()) for side in "qk"), strict=True):
            q, k = said["query"][slice(*queries)].transpose(0, 1), self._heads(said["key"][slice(*keys)], said)
            scores = said["scale"] * q @ k.mT
            if said["is_causal"]:
                scores = scores.masked_fill(torch.ones(scores.shape[1:]).triu(1).bool(), -torch.inf)
            lse = said["logsumexp"][:, slice(*queries)] if "logsumexp" in said else scores.logsumexp(-1)
            yield slice(*queries), slice(*keys), (scores - lse.unsqueeze(-1)).exp(), scores

    def _heads(self, x: torch.Tensor, said: dict) -> torch.Tensor:
        return x.transpose(0, 1).repeat_interleave(said["query"].shape[1] // x.shape[1], 0)


def test_the_kernels_of_a_gpu_are_called_as_their_schemas_say_and_the_merge_is_exact(monkeypatch):
    """In float64, so that nothing but the mathematics decides."""
    stand_in = FlashByDefinition()
    monkeypatch.setattr(flash_gpu, "_forward", stand_in.forward)
    monkeypatch.setattr(flash_gpu, "_backward", stand_in.backward)
    monkeypatch.setattr(merged, "_kernels", lambda device: flash_gpu)
    for seed in range(3):
        batch = random_row(seed)
        *given, upstream = tensors(batch, seed, 2, torch.float64)
        out, expected = attend(*given, batch.row, 0.3), over_whole_sequences(batch, *given)
        torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)
        pair = (torch.autograd.grad(result, given, upstream) for result in (out, expected))
        for found, right in zip(*pair, strict=True):
            torch.testing.assert_close(found, right, rtol=0, atol=1e-12)
    assert stand_in.calls == 3 * 4  # own segments and prompts, forward and backward


def test_torchs_own_shapes_for_these_kernels_are_those_that_are_merged():
    """On tensors without data, which torch checks by the rules of its CUDA kernels."""
    batch = random_row(0, "meta")
    query, key, value, upstream = (
        x.detach().to("meta", torch.bfloat16).requires_grad_() for x in tensors(batch, 0, 2, torch.float32)
    )
    out = attend(query, key, value, batch.row, 0.3)
    assert (out.shape, out.dtype) == (query.shape, torch.bfloat16)
    found = torch.autograd.grad(out, (query, key, value), upstream)
    assert [(x.shape, x.dtype) for x in found] == [(x.shape, torch.bfloat16) for x in (query, key, value)]


# ---------------------------------------------------------------- in place of TransformerEngine's attention


class AnyAttention:
    """A class of mcore's that has no kernels for shared prompts."""

    def __init__(self, config: object, layer: int, *, softmax_scale: float | None = None) -> None:
        self.told = softmax_scale

    def forward(self, query: torch.Tensor, *arguments: object, packed_seq_params: object, **more: object) -> str:
        return f"{len(query)} tokens, {more}"


def test_attention_of_a_gpu_gets_the_rows_that_share_no_prompt_and_ours_the_others():
    config = types.SimpleNamespace(kv_channels=8)
    attention = sharing(AnyAttention)(config, 1, softmax_scale=0.3)
    assert attention.told == 0.3
    batch = random_row(1)
    *given, _ = tensors(batch, 1, 2, torch.float32)
    out = attention.forward(*given, None, attn_mask_type="causal", packed_seq_params=packed_sequences(batch))
    torch.testing.assert_close(out, over_whole_sequences(batch, *given).flatten(1), rtol=0, atol=1e-6)
    apart = types.SimpleNamespace(row=RowAttention(batch.row.own))
    for packing in (apart, None):
        said = attention.forward(*given, None, attn_mask_type="causal", packed_seq_params=packing)
        assert said == f"{len(given[0])} tokens, {{'attn_mask_type': 'causal'}}"
    assert sharing(AnyAttention)(config, 1)._scale == 8**-0.5


def checked_at_the_start(path: str, wrong: bool) -> tuple[dict[str, float], str]:
    """The differences that a run's start finds, and why it refuses. wrong: the merge gets a constant weight."""
    from nemo_aapo.errors import ConfigError
    from nemo_aapo.learner.sharing_check import check_shared_prompts, shared_prompt_differences
    from tests.policies import make_policy
    from tests.tiny_models import make_config

    module = make_policy(make_config(path), trains=False).module
    if not wrong:
        check_shared_prompts(module)
        return shared_prompt_differences(module), ""
    with mock.patch.object(torch, "sigmoid", torch.zeros_like), pytest.raises(ConfigError) as refused:
        check_shared_prompts(module)
    return {}, str(refused.value)


@pytest.mark.exact
def test_a_run_starts_only_where_attention_over_shared_prompts_is_that_over_whole_sequences(ranks, tiny_models):
    [(differences, _)] = ranks.run(checked_at_the_start, tiny_models["qwen2"], False)
    assert max(differences.values()) < 1e-6
    [(_, said)] = ranks.run(checked_at_the_start, tiny_models["qwen2"], True)
    assert "is not that over whole sequences" in said
    assert "model.share_prompts=true" in said


def test_a_difference_that_is_nan_is_refused_wherever_it_stands():
    from nemo_aapo.errors import ConfigError
    from nemo_aapo.learner import sharing_check

    module = torch.nn.Linear(1, 1)
    module.config = mock.Mock(window_size=None)
    differences = {"result": 0.0, "query": float("nan"), "key": 0.0}
    with (
        mock.patch.object(sharing_check, "shared_prompt_differences", return_value=differences),
        pytest.raises(ConfigError, match="query nan"),
    ):
        sharing_check.check_shared_prompts(module)


def test_the_rows_example_says_what_it_says():
    row = RowAttention.of([0, 3, 5, 9, 14], [(0, 3, 9)], torch.device("cpu"))
    assert (row.shared.queries.tolist(), row.shared.keys.tolist()) == ([0, 6], [0, 3])
    assert (row.shared.query_tokens.tolist(), row.shared.key_tokens.tolist()) == ([3, 4, 5, 6, 7, 8], [0, 1, 2])
