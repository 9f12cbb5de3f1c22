"""How much a model needs at least, from the headers of its files: no weight is read."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from nemo_aapo.config import Config, ModelShape, kind_of, with_machine_defaults
from nemo_aapo.doctor.versions import has_gpu
from nemo_aapo.policy.model_dir import weight_files

GRADIENT = 4
"""Bytes: gradients are summed in float32 whatever the precision."""


@dataclass(frozen=True, slots=True)
class Bytes:
    """Of one parameter."""

    weight: int
    optimizer: int
    """Adam's two moments in float32, and a float32 copy of a weight that is not."""


def bytes_per_parameter(config: Config) -> Bytes:
    """Args: config: its precision is decided. FP8 keeps its weights in bf16."""
    return Bytes(2, 12) if kind_of(config).bf16 else Bytes(4, 8)


def on_this_machine(config: Config) -> Config:
    """With what it leaves to the machine (``precision=auto``, nulls) decided."""
    return with_machine_defaults(config, on_gpu=has_gpu())


def tensor_shapes(directory: Path) -> dict[str, tuple[int, ...]]:
    """Name -> shape of all tensors of a model directory."""
    from safetensors import safe_open

    shapes: dict[str, tuple[int, ...]] = {}
    for name in weight_files(directory):
        with safe_open(directory / name, framework="numpy") as file:
            shapes |= {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118 (no mapping)
    return shapes


def count_parameters(directory: Path) -> int:
    """Of the whole model."""
    return sum(math.prod(shape) for shape in tensor_shapes(directory).values())


def rank_parameters(shapes: Mapping[str, tuple[int, ...]], shape: ModelShape, tensor: int, pipeline: int) -> int:
    """Parameters of the fullest rank, at least: matrices and biases are cut by the tensor-parallel size, norms are not.

    Args:
        shapes: as ``tensor_shapes`` returns them.
        tensor, pipeline: parallel sizes.
    """
    stages = [0.0] * pipeline
    layers_per_stage = shape.num_layers // pipeline
    for name, size in shapes.items():
        is_norm = len(size) == 1 and not name.endswith("bias")
        count = math.prod(size) / (1 if is_norm else tensor)
        if layer := re.search(r"\blayers\.(\d+)\.", name):
            stages[int(layer[1]) // layers_per_stage] += count
        elif "embed" in name:
            stages[0] += count
            if shape.tied_embeddings and pipeline > 1:
                stages[-1] += count  # the last stage has a copy for its logits
        else:
            stages[-1] += count
    return int(max(stages))


def training_bytes(config: Config, shape: ModelShape) -> tuple[int, int]:
    """(where the model computes, in the host's memory besides) of one rank, at least, without activations and caches.

    Weights, gradients and optimizer; the host holds the frozen reference's weights, what of the optimizer is offloaded,
    and a copy of weights and optimizer while a checkpoint is written in the background.

    Args:
        config: its precision is decided.
    """
    model, optim = config.model, config.model.optim
    tensor, pipeline = model.tensor_model_parallel_size, model.pipeline_model_parallel_size
    parameters = rank_parameters(tensor_shapes(Path(model.path)), shape, tensor, pipeline)
    size = bytes_per_parameter(config)
    ranks = config.trainer.num_nodes * config.trainer.devices
    parts = ranks // (tensor * pipeline) if optim.use_distributed_optimizer else 1
    state = parameters * size.optimizer / parts
    reference = size.weight if config.algorithm.reference is not None or config.algorithm.kl_coefficient else 0
    saved = parameters * size.weight + state if config.checkpoint.async_save else 0
    device = parameters * (size.weight + GRADIENT) + state * (1 - optim.cpu_offload_fraction)
    return int(device), int(parameters * reference + saved + state * optim.cpu_offload_fraction)


def readable(size: int) -> str:
    """Bytes in GiB, or in MiB where it is less."""
    return f"{size / 2**30:,.1f} GiB" if size >= 2**30 else f"{size / 2**20:,.1f} MiB"
