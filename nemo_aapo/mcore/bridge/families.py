"""What sets model families apart, in mcore's words: windows, rotary angles, scaled embeddings, norms after a layer.

Megatron-Bridge has providers of its own for some families, with classes made of TransformerEngine's. ``adapt`` says the
same to layers without it (``cpu/layers.py``); the other functions tell whoever reads the weights of a built model.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.activations import fast_gelu
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.utils import is_layer_window_attention


def adapt(provider: Any, config: Any) -> None:
    """Have mcore's fields of a Bridge's provider say what the family's model computes.

    Args:
        provider: as ``AutoBridge.to_megatron_provider`` returned it.
        config: transformers' configuration of the model.
    """
    family = config.architectures[0]
    is_gemma3 = family == "Gemma3ForCausalLM"
    if is_gemma3 or (family == "MistralForCausalLM" and config.sliding_window):
        provider.window_size = (config.sliding_window - 1, 0)  # transformers counts the token itself, mcore does not
    if is_gemma3:
        provider.window_attn_skip_freq = [int(kind == "sliding_attention") for kind in config.layer_types]
        provider.qk_layernorm = True
    provider.embedding_scale = config.hidden_size**0.5 if family.startswith("Gemma") else 1.0
    provider.post_norms = provider.two_rotary_bases = is_gemma3
    provider.norms_over_heads = family == "OlmoeForCausalLM"


ACTIVATIONS = {F.silu: "silu", fast_gelu: "gelu_pytorch_tanh"}


def activation(config: Any) -> str:
    """The activation of a feed-forward part by transformers' name; ``other``: none of ``ACTIVATIONS``."""
    return ACTIVATIONS.get(config.activation_func, "other")


def window(config: Any, layer_number: int) -> int | None:
    """Keys that a token sees in a layer (counted from 1 over all stages), its own among them; None: all before it."""
    if not is_layer_window_attention(config.window_size, config.window_attn_skip_freq, layer_number):
        return None
    return config.window_size[0] + 1


def layer_angles(model: GPTModel, length: int) -> list[torch.Tensor]:
    """Rotary angles of each layer of this stage, float32 [length, rotated part of a head].

    Layers with equal angles have one tensor.
    """
    angles = model.rotary_pos_emb(length, packed_seq=True)[..., 0, 0, :]  # whole: sequences are not cut here
    if not model.config.two_rotary_bases:
        return [angles] * len(model.decoder.layers)
    local, everywhere = angles
    windows = [window(model.config, layer.layer_number) for layer in model.decoder.layers]
    return [everywhere if of_layer is None else local for of_layer in windows]
