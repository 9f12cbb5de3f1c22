"""mcore's local layers, for machines without TransformerEngine: other norms, attention and gated activation."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build

from nemo_aapo.mcore.cpu.kernels import rms_norm, swiglu
from nemo_aapo.mcore.packing import PackedSequences


def local_layer_spec(config: Any) -> TransformerBlockSubmodules:
    """The decoder block for a provider's configuration, in which it sets ``use_te_activation_func`` for SwiGLU."""
    layer = get_gpt_layer_local_spec(
        num_experts=config.num_moe_experts, qk_layernorm=config.qk_layernorm, normalization=config.normalization
    )
    layer.submodules.input_layernorm = TorchNorm
    layer.submodules.pre_mlp_layernorm = TorchNorm
    attention = layer.submodules.self_attention.submodules
    attention.core_attention = LocalAttention
    if attention.q_layernorm is not IdentityOp:
        attention.q_layernorm = attention.k_layernorm = TorchNorm
    if is_swiglu(config):
        mlp = layer.submodules.mlp.submodules
        (mlp.experts.submodules if config.num_moe_experts else mlp).activation_func = swiglu
        config.use_te_activation_func = True  # mcore's word for: call the module's own activation
    layers = [layer] * get_num_layers_to_build(config, vp_stage=None, pp_rank=None)
    return TransformerBlockSubmodules(layer_specs=layers, layer_norm=TorchNorm)


def is_swiglu(config: Any) -> bool:
    """Whether the feed-forward layer's activation is silu(gate) * up, neither clamped nor offset."""
    plain = config.activation_func_clamp_value is None and not config.glu_linear_offset
    return config.gated_linear_unit and config.activation_func is F.silu and plain


class TorchNorm:
    """RMSNorm or torch's LayerNorm under sequence parallelism.

    mcore's WrappedTorchNorm refuses sequence parallelism although the mathematics is the same: each rank normalises
    its own tokens, and the weights' gradients must be summed over the tensor-parallel ranks. mcore does that
    (finalize_model_grads) for parameters that are marked, so mark them.
    """

    def __new__(  # type: ignore[misc]  # mcore builds what is a class only; this one chooses among three
        cls, config: Any, hidden_size: int, eps: float = 1e-5, **_: Any
    ) -> torch.nn.Module:
        norms = {"RMSNorm": LocalRMSNorm, "LayerNorm": torch.nn.LayerNorm}
        if config.layernorm_zero_centered_gamma:
            norms = {"RMSNorm": ZeroCenteredRMSNorm}
        norm = norms[config.normalization](hidden_size, eps=eps)
        for parameter in norm.parameters():
            parameter.sequence_parallel = config.sequence_parallel
        return norm


class LocalRMSNorm(torch.nn.RMSNorm):
    """torch's module, computed by ``rms_norm``."""

    eps: float

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return rms_norm(x, self.weight, self.eps)


class ZeroCenteredRMSNorm(LocalRMSNorm):
    """Gemma's, which scales by 1 + weight."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return rms_norm(x, 1.0 + self.weight, self.eps)


class LocalAttention(DotProductAttention):
    """mcore's attention by torch's kernel, which holds no scores; also for packed sequences.

    Packed, which mcore leaves to TransformerEngine, each sequence attends to itself alone: there is no mask that a
    mistake could leak through.
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
        if packed_seq_params is not None:
            return self.packed(query, key, value, packed_seq_params)
        plain = attention_mask is None and attention_bias is None and len(query) == len(key)
        if plain and self.is_plainly_causal():
            return self.padded(query, key, value)
        return super().forward(query, key, value, attention_mask, attn_mask_type, attention_bias)

    def is_plainly_causal(self) -> bool:
        """Whether softmax(scale q k) under a causal mask is all that the configuration asks for.

        A window, an offset of the softmax, dropout, and a factor that goes out of the product and into the softmax
        (``apply_query_key_layer_scaling``) are left to mcore. ``attention_softmax_in_fp32`` changes nothing in fp32.
        """
        softmax = self.scale_mask_softmax
        return (
            self.attn_mask_type is AttnMaskType.causal
            and softmax.window_size is None
            and softmax.scale is None
            and self.config.softmax_type == "vanilla"
            and self.attention_dropout.p == 0.0
        )

    def padded(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Causal. query [s, b, heads, size], key and value [s, b, groups, size] -> [s, b, heads * size].

        Rows are padded on the right, so what a real token sees is real; what a padding token gets, nobody reads.
        """
        out = self._attend(*(x.permute(1, 2, 0, 3) for x in (query, key, value)))
        return out.permute(2, 0, 1, 3).flatten(2)

    def packed(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, sequences: PackedSequences
    ) -> torch.Tensor:
        """Causal within each sequence; shapes as of ``forward``. Sequences of like lengths are padded to one batch."""
        batches, place = sequences.attention_batches
        results = []
        for tokens in batches:  # [b, s]
            whole = (x.index_select(0, tokens.flatten()).unflatten(0, tokens.shape) for x in (query, key, value))
            out = self._attend(*(x.transpose(1, 2) for x in whole))
            results.append(out.transpose(1, 2).flatten(0, 1).flatten(1))  # [b * s, heads * size]
        return torch.cat(results).index_select(0, place)

    def _attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """query [b, heads, s, size], key and value [b, groups, s, size] -> [b, heads, s, size]."""
        grouped = query.shape[1] != key.shape[1]
        return F.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=self.softmax_scale, enable_gqa=grouped
        )
