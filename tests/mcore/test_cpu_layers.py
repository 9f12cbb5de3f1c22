"""Attention of the local layers is mcore's, and mcore's itself where torch's kernel can't say what is asked for."""

from __future__ import annotations

import pytest

pytestmark = pytest.mark.exact

CONFIGS = {
    "plain": {},
    "one group": {"num_query_groups": 1},
    "no groups": {"num_query_groups": 4},
    "a scale of its own": {"softmax_scale": 0.4},
    "a window": {"window_size": (2, 0)},
    "a window in every other layer": {"window_size": (2, 0), "window_attn_skip_freq": 2},
    "query-key layer scaling": {"apply_query_key_layer_scaling": True, "attention_softmax_in_fp32": True},
    "an offset": {"softmax_type": "off-by-one"},
}
BY_TORCH = ("plain", "one group", "no groups", "a scale of its own", "a window", "a window in every other layer")


def compare_with_mcore(changes: dict, by_torch: bool) -> None:
    import torch
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.dot_product_attention import DotProductAttention
    from megatron.core.transformer.enums import AttnMaskType

    from nemo_aapo.mcore.cpu.layers import LocalAttention

    fields = {"num_query_groups": 2, "attention_dropout": 0.0, **changes}
    scale = fields.pop("softmax_scale", None)
    config = TransformerConfig(num_layers=2, hidden_size=24, num_attention_heads=4, **fields)
    generator = torch.Generator().manual_seed(1)
    heads = (4, config.num_query_groups, config.num_query_groups)
    tensors = [torch.randn(7, 3, n, 6, generator=generator).requires_grad_() for n in heads]
    grad = torch.randn(7, 3, 24, generator=generator)
    for layer in (1, 2):
        made = [
            kind(config, layer, AttnMaskType.causal, "self", softmax_scale=scale)
            for kind in (LocalAttention, DotProductAttention)
        ]
        if by_torch:
            assert made[0].is_known()
        mask = torch.ones(7, 7, dtype=torch.bool).triu(2)
        for given in (None, mask):  # a mask of the caller's own is not ours to guess at
            outs = [attention(*tensors, given) for attention in made]
            torch.testing.assert_close(*outs)
            torch.testing.assert_close(*(torch.autograd.grad(out, tensors, grad) for out in outs))


@pytest.mark.parametrize("name", CONFIGS)
def test_attention_is_mcores_whatever_the_configuration(ranks, name):
    ranks.run(compare_with_mcore, CONFIGS[name], name in BY_TORCH)
