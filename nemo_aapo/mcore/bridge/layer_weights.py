"""The weights of a built layer as the decoder reads them: where the learner keeps them, those of adapters merged."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nemo_aapo.mcore.bridge.lora import base_layer, merged_weight
from nemo_aapo.mcore.experts.weights import LocalExperts, local_experts


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """This rank's part of one layer's weights: h hidden, f feed-forward units, s head size.

    Projections may have another layout than the module's (``layer_weights``).
    """

    attention_norm: Tensor
    """[h]"""
    qkv: Tensor
    """[key-value heads * (queries per key + 2) * s, h]: for each key-value head its queries, its key, its value"""
    qkv_bias: Tensor | None
    query_norm: Tensor | None
    """[s], or of all heads together [heads * s]"""
    key_norm: Tensor | None
    """The same of keys."""
    projection: Tensor
    """[h, heads * s]"""
    attention_post_norm: Tensor | None
    """[h], of what attention adds"""
    mlp_norm: Tensor
    """[h]"""
    mlp_post_norm: Tensor | None
    """[h], of what the feed-forward part adds"""
    gate_and_up: Tensor | None
    """[2 f, h]; None: ``experts`` are in its place."""
    down: Tensor | None
    """[h, f]"""
    experts: LocalExperts | None


def layer_weights(
    layer: torch.nn.Module, convert: Callable[[Tensor], Tensor], gain: Callable[[Tensor], Tensor]
) -> LayerWeights:
    """References to the weights of an mcore TransformerLayer. Collective, where there are adapters.

    Args:
        convert: changes the layout of a projection.
        gain: what a norm multiplies by, of its weight.
    """
    part = layer.get_submodule

    def of_norm(weight: Tensor | None) -> Tensor | None:
        return None if weight is None else gain(weight)

    def post_norm(name: str) -> Tensor | None:
        return of_norm(getattr(getattr(base_layer(part(name)), "post_layernorm", None), "weight", None))

    qkv, mlp = base_layer(part("self_attention.linear_qkv")), part("mlp")
    attention: Any = part("self_attention")
    experts = local_experts(mlp) if hasattr(mlp, "router") else None
    after_mlp_norm = mlp if experts else base_layer(part("mlp.linear_fc1"))
    return LayerWeights(
        attention_norm=gain(_norm_weight(qkv, part("input_layernorm"))),
        qkv=convert(merged_weight(part("self_attention.linear_qkv"))),
        qkv_bias=_bias(qkv),
        query_norm=of_norm(getattr(attention.q_layernorm, "weight", None)),
        key_norm=of_norm(getattr(attention.k_layernorm, "weight", None)),
        projection=convert(merged_weight(part("self_attention.linear_proj"))),
        attention_post_norm=post_norm("self_attention.linear_proj"),
        mlp_norm=gain(_norm_weight(after_mlp_norm, part("pre_mlp_layernorm"))),
        mlp_post_norm=None if experts else post_norm("mlp.linear_fc2"),
        gate_and_up=None if experts else convert(merged_weight(part("mlp.linear_fc1"))),
        down=None if experts else convert(merged_weight(part("mlp.linear_fc2"))),
        experts=experts,
    )


def _norm_weight(linear: torch.nn.Module, norm: torch.nn.Module) -> Tensor:
    """The weight of the norm before a projection; TransformerEngine keeps it in the projection itself."""
    fused = getattr(linear, "layer_norm_weight", None)
    return norm.get_parameter("weight") if fused is None else fused


def _bias(linear: torch.nn.Module) -> Tensor | None:
    """The layer's bias; None where it has none, which TransformerEngine marks by an empty tensor."""
    bias = getattr(linear, "bias", None)
    return bias if bias is not None and bias.numel() else None
