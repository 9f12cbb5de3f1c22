"""Numbers and kernels: what a precision means for Megatron on this machine. The only place for TransformerEngine.

On CPU the layers are mcore's local ones in fp32; on GPU TransformerEngine's. ``config/precision.py`` has the precisions
as data, and what can be refused without looking at the machine.
"""

from __future__ import annotations

from typing import Any

import torch

from nemo_aapo.config import Config, PrecisionKind, kind_of
from nemo_aapo.mcore.attention.sharing import sharing


def dtype(config: Config) -> torch.dtype:
    """The dtype of weights and activations."""
    return torch.bfloat16 if kind_of(config).bf16 else torch.float32


def model_fields(config: Config) -> dict[str, Any]:
    """Fields of mcore's TransformerConfig that the precision and the machine decide."""
    return {**machine_fields(dtype(config)), **_fp8_fields(config, kind_of(config))}


def machine_fields(dtype: torch.dtype) -> dict[str, Any]:
    """Those that the machine and the dtype of the weights decide."""
    fused = torch.cuda.is_available()
    return {
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "autocast_dtype": dtype,
        "bf16": dtype is torch.bfloat16,
        "fp16": False,
        "use_cpu_initialization": not fused,
        # mcore would want apex for it; fuse_weight_gradients() tells the layers themselves
        "gradient_accumulation_fusion": False,
        # torch compiles mcore's SwiGLU. TransformerEngine's is as fast, but a module that mcore 0.16 can't save.
        "bias_activation_fusion": fused,
        "bias_dropout_fusion": fused,
        "masked_softmax_fusion": fused,
        "persist_layer_norm": fused,
        "apply_rope_fusion": fused,
        "cross_entropy_loss_fusion": False,  # the loss is ours: learner/logprobs.py
        "transformer_layer_spec": _layer_spec(),
        **({} if fused else {"attention_backend": _any_attention_backend()}),
    }


def _any_attention_backend() -> Any:
    """Gemma's provider asks for TransformerEngine's flash attention, which mcore sets up even for local layers."""
    from megatron.core.transformer.enums import AttnBackend

    return AttnBackend.auto


def _fp8_fields(config: Config, kind: PrecisionKind) -> dict[str, Any]:
    """FP8 products in the linear layers; weights, attention, embedding and output layer stay in bf16."""
    if kind.fp8 is None:
        return {"fp8": None}
    start, end = config.precision.num_layers_at_start_in_bf16, config.precision.num_layers_at_end_in_bf16
    fields = {
        "fp8": kind.fp8,
        "fp8_recipe": kind.fp8_recipe,
        "fp8_param": False,  # the rollout engine and the export read bf16 weights
        "first_last_layers_bf16": bool(start or end),
        "num_layers_at_start_in_bf16": start,
        "num_layers_at_end_in_bf16": end,
    }
    if kind.fp8_recipe == "delayed":
        fields |= {"fp8_amax_history_len": 1024, "fp8_amax_compute_algo": "max"}
    return fields


def _layer_spec() -> Any:
    if torch.cuda.is_available():
        return transformer_engine_layer_spec
    from nemo_aapo.mcore.cpu.layers import local_layer_spec

    return local_layer_spec


def transformer_engine_layer_spec(config: Any) -> Any:
    """TransformerEngine's layers for a provider's configuration; their attention takes shared prompts, too."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec

    layer = get_gpt_layer_with_transformer_engine_spec(
        num_experts=config.num_moe_experts, moe_grouped_gemm=config.moe_grouped_gemm, qk_layernorm=config.qk_layernorm
    )
    attention = layer.submodules.self_attention.submodules
    attention.core_attention = sharing(attention.core_attention)
    return layer


def fuse_weight_gradients(module: torch.nn.Module) -> int:
    """Let linear layers add weight gradients straight to the fp32 buffer, in the product's own epilogue.

    TransformerEngine's can; mcore's own can with ``cpu.patch_weight_gradients``.

    Returns:
        Number of layers that do.
    """
    flag = "fuse_wgrad_accumulation" if torch.cuda.is_available() else "gradient_accumulation_fusion"
    layers = [layer for layer in module.modules() if hasattr(layer, flag)]
    for layer in layers:
        setattr(layer, flag, True)
    return len(layers)
