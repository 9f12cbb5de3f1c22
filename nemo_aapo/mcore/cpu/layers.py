"""mcore's local layers, for machines without TransformerEngine: other norms, attention and gated activation."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.tensor_parallel.layers import RowParallelLinear
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build

from nemo_aapo.mcore.cpu.attention import LocalAttention
from nemo_aapo.mcore.cpu.kernels import rms_norm, swiglu
from nemo_aapo.mcore.experts.grouped import GroupedExperts


def local_layer_spec(config: Any) -> TransformerBlockSubmodules:
    """The decoder block for a provider's configuration; ``use_kernels`` completes what is built of it."""
    layer = get_gpt_layer_local_spec(
        num_experts=config.num_moe_experts, qk_layernorm=config.qk_layernorm, normalization=config.normalization
    )
    layer.submodules.input_layernorm = TorchNorm
    layer.submodules.pre_mlp_layernorm = TorchNorm
    attention = layer.submodules.self_attention.submodules
    attention.core_attention = LocalAttention
    if config.qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = TorchNorm
    layers = [layer] * get_num_layers_to_build(config, vp_stage=None, pp_rank=None)
    return TransformerBlockSubmodules(layer_specs=layers, layer_norm=TorchNorm)


def use_kernels(module: torch.nn.Module) -> None:
    """Have the feed-forward layers of a built stage compute SwiGLU by ``kernels.swiglu``, and experts together.

    The layers' specification could say it beforehand, in a form that each release of mcore has changed.
    """
    for layer in module.modules():
        if isinstance(layer, SequentialMLP) and is_swiglu(layer.config):
            layer.__class__ = GroupedExperts
        elif isinstance(layer, MLP) and is_swiglu(layer.config):
            layer.activation_func = swiglu
            layer.config.use_te_activation_func = True  # mcore's word for: call the module's own activation


def add_parts(module: GPTModel) -> None:
    """Add to a built stage what mcore's own layers lack of the model's family (``bridge/families.py``)."""
    config = module.config
    if config.two_rotary_bases:
        module.rotary_pos_emb.register_forward_hook(_stacked)
    for layer in module.decoder.layers:
        if config.two_rotary_bases:
            layer.self_attention.__class__ = TwoBasesAttention
        if config.norms_over_heads:
            size, epsilon = config.kv_channels, config.layernorm_epsilon
            layer.self_attention.q_layernorm = NormOverHeads(size * config.num_attention_heads, eps=epsilon)
            layer.self_attention.k_layernorm = NormOverHeads(size * config.num_query_groups, eps=epsilon)
        for linear in (layer.self_attention.linear_proj, layer.mlp.linear_fc2) if config.post_norms else ():
            linear.post_layernorm = TorchNorm(config, config.hidden_size, config.layernorm_epsilon)
            linear.__class__ = RowParallelThenNorm


def _stacked(_module: torch.nn.Module, _arguments: Any, angles: Any) -> torch.Tensor:
    """Megatron-Bridge 0.3.1 gives a tuple of the two, which recomputation can't keep; later ones a tensor."""
    return torch.stack(angles) if isinstance(angles, tuple) else angles


class TwoBasesAttention(SelfAttention):
    """Gemma 3's: a layer with a window turns queries and keys by other angles than one without."""

    def forward(self, *arguments: Any, rotary_pos_emb: torch.Tensor, **more: Any) -> Any:
        """Args: rotary_pos_emb: [2, s, 1, 1, d], of layers with a window and without."""
        own = rotary_pos_emb[0 if self.core_attention.window is not None else 1]
        return super().forward(*arguments, rotary_pos_emb=own, **more)


class RowParallelThenNorm(RowParallelLinear):
    """Gemma 3's: what attention and feed-forward part add to the residual stream is normalised."""

    post_layernorm: torch.nn.Module

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        out, bias = super().forward(x)
        return self.post_layernorm(out), bias


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
            norms = {"RMSNorm": ZeroCenteredRMSNorm, "LayerNorm": ZeroCenteredLayerNorm}
        norm = norms[config.normalization](hidden_size, eps=eps)
        for parameter in norm.parameters():
            parameter.sequence_parallel = config.sequence_parallel
        return norm


class LocalRMSNorm(torch.nn.RMSNorm):
    """torch's module, computed by ``rms_norm``."""

    eps: float

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return rms_norm(x, self.weight, self.eps)


class NormOverHeads(LocalRMSNorm):
    """OLMoE's, of all heads of a token together: x [..., heads, size], the weight [heads * size]."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.flatten(-2)).view_as(x)


class ZeroCenteredRMSNorm(LocalRMSNorm):
    """Gemma's, which scales by 1 + weight."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return rms_norm(x, 1.0 + self.weight, self.eps)


class ZeroCenteredLayerNorm(torch.nn.LayerNorm):
    """Nemotron's, which scales by 1 + weight."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(x, self.normalized_shape, 1.0 + self.weight, self.bias, self.eps)
