"""mcore's local layers, for machines without TransformerEngine: norms under sequence parallelism, packed attention."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build

from nemo_aapo.policy.packing import PackedSequences


def local_layer_spec(config: Any) -> TransformerBlockSubmodules:
    """The decoder block for a provider's configuration."""
    layer = get_gpt_layer_local_spec(qk_layernorm=config.qk_layernorm, normalization=config.normalization)
    layer.submodules.input_layernorm = TorchNorm
    layer.submodules.pre_mlp_layernorm = TorchNorm
    attention = layer.submodules.self_attention.submodules
    attention.core_attention = LocalAttention
    if attention.q_layernorm is not IdentityOp:
        attention.q_layernorm = attention.k_layernorm = TorchNorm
    layers = [layer] * get_num_layers_to_build(config, vp_stage=None, pp_rank=None)
    return TransformerBlockSubmodules(layer_specs=layers, layer_norm=TorchNorm)


class TorchNorm:
    """torch's RMSNorm or LayerNorm under sequence parallelism.

    mcore's WrappedTorchNorm refuses sequence parallelism although the mathematics is the same: each rank normalises
    its own tokens, and the weights' gradients must be summed over the tensor-parallel ranks. mcore does that
    (finalize_model_grads) for parameters that are marked, so mark them.
    """

    def __new__(cls, config: Any, hidden_size: int, eps: float = 1e-5, **_: Any) -> torch.nn.Module:
        norms = {"RMSNorm": torch.nn.RMSNorm, "LayerNorm": torch.nn.LayerNorm}
        if config.layernorm_zero_centered_gamma:
            norms = {"RMSNorm": ZeroCenteredRMSNorm}
        norm = norms[config.normalization](hidden_size, eps=eps)
        for parameter in norm.parameters():
            parameter.sequence_parallel = config.sequence_parallel
        return norm


class ZeroCenteredRMSNorm(torch.nn.RMSNorm):
    """Gemma's: scales by 1 + weight."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, self.normalized_shape, 1.0 + self.weight, self.eps)


class LocalAttention(DotProductAttention):
    """mcore's attention, and the same for packed sequences, which mcore leaves to TransformerEngine.

    Each sequence attends to itself alone: there is no mask that a mistake could leak through.
    """

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        attn_mask_type: Any = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: PackedSequences | None = None,
    ) -> torch.Tensor:
        """Padded: as in mcore. Packed: query [t, heads, size], key and value [t, groups, size] -> [t, heads * size]."""
        if packed_seq_params is None:
            return super().forward(query, key, value, attention_mask, attn_mask_type, attention_bias)
        return self._packed(query, key, value, packed_seq_params)

    def _packed(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, sequences: PackedSequences
    ) -> torch.Tensor:
        batches, place = sequences.attention_batches
        results = []
        for tokens in batches:  # [b, s]
            q, k, v = (
                x.index_select(0, tokens.flatten()).unflatten(0, tokens.shape).transpose(1, 2)  # [b, heads, s, size]
                for x in (query, key, value)
            )
            grouped = q.shape[1] != k.shape[1]
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.softmax_scale, enable_gqa=grouped)
            results.append(out.transpose(1, 2).flatten(0, 1).flatten(1))  # [b * s, heads * size]
        return torch.cat(results).index_select(0, place)
