"""Numbers and kernels: what a precision means for Megatron on this machine. The only place for TransformerEngine.

On CPU the layers are mcore's local ones in fp32; on GPU TransformerEngine's. ``config/precision.py`` has the precisions
as data, and what can be refused without looking at the machine.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import Any

import torch

from nemo_aapo.config import PRECISIONS, Config, PrecisionKind, kind_of, with_machine_defaults
from nemo_aapo.config.precision import check_optimizer
from nemo_aapo.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Machine:
    """What a precision depends on."""

    gpu: str | None
    """Name of the GPU; None: there is none."""
    capability: tuple[int, int] = (0, 0)
    """CUDA compute capability."""
    cuda: tuple[int, int] = (0, 0)
    """Version of CUDA that torch was built for."""
    transformer_engine: bool = False
    """Whether the package is there."""

    @classmethod
    def present(cls) -> Machine:
        """The machine that this process runs on; its first GPU stands for all."""
        found = importlib.util.find_spec("transformer_engine") is not None
        if not torch.cuda.is_available():
            return cls(None, transformer_engine=found)
        major, minor = (torch.version.cuda or "0.0").split(".")[:2]
        return cls(torch.cuda.get_device_name(), torch.cuda.get_device_capability(), (int(major), int(minor)), found)


def decide(config: Config) -> Config:
    """The configuration with what it leaves to the machine decided (``precision=auto``, nulls).

    Raises:
        ConfigError: this machine can't do what is asked for; says why, and what it can do.
    """
    machine = Machine.present()
    config = with_machine_defaults(config, on_gpu=machine.gpu is not None)
    check_optimizer(config.model)  # again, with the optimizer that was left to the machine
    if problem := refusal(config, machine):
        raise ConfigError(problem)
    return config


def refusal(config: Config, machine: Machine) -> str | None:
    """Why a machine can't run a configuration whose precision is decided; None if it can."""
    name, kind = config.precision.name, kind_of(config)
    if machine.gpu is None:
        if kind.bf16:
            return f"precision={name} needs a GPU with TransformerEngine; on CPU use precision=fp32"
        if config.model.optim.cpu_offload_fraction or config.rollout.offload_learner:
            return (
                "model.optim.cpu_offload_fraction and rollout.offload_learner move what lies in GPU memory, and there "
                "is no GPU: set them to 0 and false"
            )
        return None
    if config.model.share_prompts:
        return (
            "model.share_prompts=true: attention over prompts that sequences share is not wired to TransformerEngine "
            "yet; leave it at null"
        )
    if not machine.transformer_engine:
        return f"precision={name} on a GPU needs TransformerEngine, which is not installed; see the Dockerfile"
    if machine.capability < kind.min_capability:
        return (
            f"precision={name} needs a GPU of compute capability {_dotted(kind.min_capability)}, and {machine.gpu} has "
            f"{_dotted(machine.capability)}: use {_best(machine)}"
        )
    if machine.cuda < kind.min_cuda:
        return (
            f"precision={name} needs CUDA {_dotted(kind.min_cuda)}, and torch was built for {_dotted(machine.cuda)}: "
            f"use {_best(machine)}"
        )
    if kind.below_capability and machine.capability >= kind.below_capability:
        return (
            f"precision={name} is for Hopper; TransformerEngine has other block formats on {machine.gpu}, which are "
            f"not wired here: use {_best(machine)}"
        )
    if config.rollout.offload_learner and not kind.bf16:
        return (
            f"rollout.offload_learner=true with precision={name}: fp32 weights are their own optimizer copy and can't "
            "leave the GPU while an engine draws from them. Use precision=bf16"
        )
    return None


def _best(machine: Machine) -> str:
    """The precisions that the machine can compute with, as words of a command."""
    usable = [
        name
        for name in ("fp8_tensorwise", "bf16", "fp32")
        if machine.capability >= PRECISIONS[name].min_capability and machine.cuda >= PRECISIONS[name].min_cuda
    ]
    return " or ".join(f"precision={name}" for name in usable)


def _dotted(version: tuple[int, int]) -> str:
    return f"{version[0]}.{version[1]}"


def dtype(config: Config) -> torch.dtype:
    """The dtype of weights and activations."""
    return torch.bfloat16 if kind_of(config).bf16 else torch.float32


def model_fields(config: Config) -> dict[str, Any]:
    """Fields of mcore's TransformerConfig that the precision and the machine decide."""
    return {**machine_fields(dtype(config)), **_fp8_fields(config, kind_of(config))}


def machine_fields(dtype: torch.dtype) -> dict[str, Any]:
    """Fields of mcore's TransformerConfig that the machine and the dtype of the weights decide."""
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
    """TransformerEngine's layers for a provider's configuration."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec

    return get_gpt_layer_with_transformer_engine_spec(qk_layernorm=config.qk_layernorm)


def fuse_weight_gradients(module: torch.nn.Module) -> int:
    """Let linear layers add weight gradients straight to the fp32 buffer, in the product's own epilogue.

    TransformerEngine's can; mcore's own can with ``cpu.patch_weight_gradients``.

    Returns:
        Number of layers that do so.
    """
    flag = "fuse_wgrad_accumulation" if torch.cuda.is_available() else "gradient_accumulation_fusion"
    layers = [layer for layer in module.modules() if hasattr(layer, flag)]
    for layer in layers:
        setattr(layer, flag, True)
    return len(layers)
