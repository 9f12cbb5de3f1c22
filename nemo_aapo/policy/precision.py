"""Numbers and kernels: what a precision means for Megatron's configuration. The only place that knows them.

On CPU the layers are mcore's local ones in fp32; on GPU TransformerEngine's.
"""

from __future__ import annotations

from typing import Any

import torch

from nemo_aapo.config import ConfigError


def check(name: str) -> None:
    """Refuse a precision that this machine can't do.

    Raises:
        ConfigError: bf16 without a GPU or without TransformerEngine.
    """
    if name == "bf16":
        if not torch.cuda.is_available():
            raise ConfigError("precision=bf16 needs a GPU with TransformerEngine; on CPU use precision=fp32")
        _require_transformer_engine()


def _require_transformer_engine() -> None:
    try:
        import transformer_engine  # noqa: F401
    except ImportError as error:
        raise ConfigError(f"precision=bf16 needs TransformerEngine ({error}); see the Dockerfile") from error


def dtype(name: str) -> torch.dtype:
    """The dtype of weights and activations."""
    return torch.bfloat16 if name == "bf16" else torch.float32


def model_fields(name: str) -> dict[str, Any]:
    """Fields of mcore's TransformerConfig that the precision decides."""
    fused = torch.cuda.is_available()
    return {
        "params_dtype": dtype(name),
        "pipeline_dtype": dtype(name),
        "autocast_dtype": dtype(name),
        "bf16": name == "bf16",
        "fp16": False,
        "use_cpu_initialization": not fused,
        "gradient_accumulation_fusion": False,
        "bias_activation_fusion": fused,
        "bias_dropout_fusion": fused,
        "masked_softmax_fusion": fused,
        "persist_layer_norm": fused,
        "apply_rope_fusion": fused,
        "cross_entropy_loss_fusion": False,  # the loss is ours: policy/logprob.py
        "transformer_layer_spec": transformer_engine_layer_spec if fused else local_layer_spec,
    }


def transformer_engine_layer_spec(config: Any) -> Any:
    """TransformerEngine's layers for a provider's configuration."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec

    return get_gpt_layer_with_transformer_engine_spec(qk_layernorm=config.qk_layernorm)


def local_layer_spec(config: Any) -> Any:
    """mcore's local layers for a provider's configuration, with norms that know sequence parallelism."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer.identity_op import IdentityOp
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build

    layer = get_gpt_layer_local_spec(qk_layernorm=config.qk_layernorm, normalization=config.normalization)
    layer.submodules.input_layernorm = TorchNorm
    layer.submodules.pre_mlp_layernorm = TorchNorm
    attention = layer.submodules.self_attention.submodules
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
        norm_class = {"RMSNorm": torch.nn.RMSNorm, "LayerNorm": torch.nn.LayerNorm}[config.normalization]
        norm = norm_class(hidden_size, eps=eps)
        for parameter in norm.parameters():
            parameter.sequence_parallel = config.sequence_parallel
        return norm
