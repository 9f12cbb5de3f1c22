"""Precisions as data, and what of a configuration depends on them. No torch: a login node can refuse what can't work.

The fields are megatron-core's (TransformerConfig); the alignment rules are those of TransformerEngine's FP8 products.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from nemo_aapo.config.schema import Config, Model
from nemo_aapo.errors import ConfigError


@dataclass(frozen=True, slots=True)
class PrecisionKind:
    """What a value of ``precision.name`` means."""

    bf16: bool
    """bfloat16 weights and activations with fp32 main weights in the optimizer; else fp32 throughout."""
    fp8: str | None = None
    """Format of the linear layers' products: ``e4m3``, or ``hybrid`` (gradients in e5m2)."""
    fp8_recipe: str | None = None
    """How scales are found: ``tensorwise`` (each tensor's present maximum), ``blockwise`` (128 x 128 weights, 1 x 128
    activations), ``delayed`` (maxima of past steps)."""
    token_multiple: int = 1
    """FP8 products want the number of tokens to be a multiple of this."""
    width_multiple: int = 1
    """... and every rank's weight dimensions of this."""
    min_capability: tuple[int, int] = (0, 0)
    """CUDA compute capability that has such kernels."""
    below_capability: tuple[int, int] | None = None
    """... and from which on it has them no longer: Blackwell's block formats are others, and not wired here."""
    min_cuda: tuple[int, int] = (0, 0)


PRECISIONS = {
    "fp32": PrecisionKind(bf16=False),
    "bf16": PrecisionKind(bf16=True, min_capability=(8, 0)),
    "fp8_tensorwise": PrecisionKind(True, "hybrid", "tensorwise", 16, 16, (8, 9), min_cuda=(12, 1)),
    # e4m3 for gradients as well: a block's own scale makes up for the range, and has the better precision
    "fp8_blockwise": PrecisionKind(True, "e4m3", "blockwise", 128, 128, (9, 0), (10, 0), (12, 9)),
    "fp8_delayed": PrecisionKind(True, "hybrid", "delayed", 16, 16, (8, 9), min_cuda=(12, 1)),
}


def kind_of(config: Config) -> PrecisionKind:
    """What a configuration's precision means, once it is decided (``with_machine_defaults``)."""
    return PRECISIONS[config.precision.name]


def with_machine_defaults(config: Config, *, on_gpu: bool) -> Config:
    """Settings that were left to the machine (``precision=auto``, nulls), decided; the rest as it was. Idempotent."""
    name = config.precision.name
    if name == "auto":
        name = "bf16" if on_gpu else "fp32"
    model, optim = config.model, config.model.optim
    if optim.use_distributed_optimizer is None:
        optim = dataclasses.replace(optim, use_distributed_optimizer=on_gpu)
    sharing = model.share_prompts
    if sharing is None:
        sharing = not on_gpu and model.sequence_packing is not False
    packing = model.sequence_packing
    if packing is None:
        packing = on_gpu or sharing or model.context_parallel_size > 1
    return dataclasses.replace(
        config,
        precision=dataclasses.replace(config.precision, name=name),
        model=dataclasses.replace(model, sequence_packing=packing, share_prompts=sharing, optim=optim),
    )


def pad_multiple(config: Config) -> int:
    """What the token count of a micro-batch is padded to: each sequence's, or with packing the whole pack's.

    Sequence parallelism cuts it over the tensor-parallel ranks, and each rank's part has to suit the FP8 kernels;
    context parallelism cuts each sequence into 2 CP chunks.
    """
    model = config.model
    multiple = PRECISIONS[config.precision.name].token_multiple if config.precision.name != "auto" else 1
    if model.sequence_parallel:
        multiple *= model.tensor_model_parallel_size
    if model.context_parallel_size > 1:
        multiple *= 2 * model.context_parallel_size
    return multiple


def check_precision(config: Config) -> None:
    """Refuse combinations that no machine can do.

    Raises:
        ConfigError: which settings, and what to change.
    """
    settings, kind = config.precision, PRECISIONS.get(config.precision.name)
    edges = {
        "precision.num_layers_at_start_in_bf16": settings.num_layers_at_start_in_bf16,
        "precision.num_layers_at_end_in_bf16": settings.num_layers_at_end_in_bf16,
    }
    for key, number in edges.items():
        if number and (kind is None or kind.fp8 is None):
            raise ConfigError(f"{key}={number} has no effect with precision={settings.name}: only FP8 has other layers")
        if number and kind is not None and kind.fp8_recipe == "delayed":
            raise ConfigError(
                f"{key}={number}: precision=fp8_delayed keeps its maxima over all layers and can't leave some out. "
                "Set it to 0, or use precision=fp8_tensorwise"
            )
    if config.model.share_prompts and config.model.sequence_packing is False:
        raise ConfigError(
            "model.share_prompts=true needs sequences in one row: set model.sequence_packing=true, or leave it at null"
        )


def check_widths(config: Config, widths: dict[str, int]) -> None:
    """Refuse FP8 for a model whose layers, as cut over the ranks, its kernels can't multiply.

    Args:
        widths: dimensions of one rank's linear layers, by what they are.

    Raises:
        ConfigError: the dimension, what it must be a multiple of, and what to change.
    """
    kind = PRECISIONS.get(config.precision.name)
    if kind is None:
        return
    for what, width in widths.items():
        if width % kind.width_multiple:
            finer = ", precision=fp8_tensorwise (multiples of 16)" if kind.fp8_recipe == "blockwise" else ""
            raise ConfigError(
                f"precision={config.precision.name} needs layers whose sizes on a rank are multiples of "
                f"{kind.width_multiple}, but the model's {what} is {width} at model.tensor_model_parallel_size="
                f"{config.model.tensor_model_parallel_size}: use a smaller one{finer} or precision=bf16"
            )


def check_optimizer(model: Model) -> None:
    """Refuse settings of the optimizer that do nothing, or nothing good, together.

    Raises:
        ConfigError: which, and what to change.
    """
    optim = model.optim
    if optim.use_distributed_optimizer is False:
        for key in ("overlap_param_gather", "cpu_offload_fraction"):
            if getattr(optim, key):
                raise ConfigError(
                    f"model.optim.{key}={getattr(optim, key)} needs model.optim.use_distributed_optimizer=true"
                )
    if optim.overlap_param_gather and not optim.overlap_grad_reduce:
        raise ConfigError(
            "model.optim.overlap_param_gather=true needs model.optim.overlap_grad_reduce=true (megatron-core's rule)"
        )
