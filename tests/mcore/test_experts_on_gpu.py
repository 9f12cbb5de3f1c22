"""What is asked of mcore for experts on a GPU, as far as a CPU can tell: no such product has run here."""

from __future__ import annotations

import types


def _asked_for():
    import inspect

    import torch
    from megatron.core.models.gpt import gpt_layer_specs
    from megatron.core.transformer.transformer_config import TransformerConfig

    from nemo_aapo.mcore.experts.model import expert_fields
    from nemo_aapo.mcore.precision import transformer_engine_layer_spec

    real, found = gpt_layer_specs.get_gpt_layer_with_transformer_engine_spec, {}
    known, is_available = set(inspect.signature(real).parameters), torch.cuda.is_available
    layer, attention = (types.SimpleNamespace() for _ in range(2))
    layer.submodules = types.SimpleNamespace(self_attention=types.SimpleNamespace(submodules=attention))
    attention.core_attention = type("Attention", (), {})
    provider = types.SimpleNamespace(num_moe_experts=8, moe_grouped_gemm=True, qk_layernorm=True)
    try:
        gpt_layer_specs.get_gpt_layer_with_transformer_engine_spec = lambda **given: found.update(given) or layer
        torch.cuda.is_available = lambda: True
        transformer_engine_layer_spec(provider)
        fields = expert_fields(provider)
    finally:
        gpt_layer_specs.get_gpt_layer_with_transformer_engine_spec = real
        torch.cuda.is_available = is_available
    return found, set(found) <= known, fields, set(fields) <= set(TransformerConfig.__dataclass_fields__)


def test_transformer_engines_grouped_product_is_asked_for_by_names_that_mcore_knows(ranks):
    [(given, are_known, fields, are_fields)] = ranks.run(_asked_for)
    assert given == {"num_experts": 8, "moe_grouped_gemm": True, "qk_layernorm": True}
    assert are_known
    assert are_fields
    assert fields["moe_grouped_gemm"]
    assert fields["moe_permute_fusion"]
    assert (fields["moe_router_dtype"], fields["moe_aux_loss_coeff"]) == ("fp32", 0.0)
