"""Sizes of a model and its checkpoints, from the headers of its files: no weight is read."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from nemo_aapo.config import Config, kind_of, with_machine_defaults
from nemo_aapo.doctor.checks.versions import has_gpu
from nemo_aapo.utils.safetensors import tensor_headers


@dataclass(frozen=True, slots=True)
class Bytes:
    """Bytes of one parameter in a checkpoint."""

    weight: int
    optimizer: int
    """Adam's two moments in float32, and a float32 copy of a weight of another dtype."""


def bytes_per_parameter(config: Config) -> Bytes:
    """Bytes of a parameter; FP8 keeps its weights in bf16. Args: config: its precision is not ``auto``."""
    return Bytes(2, 12) if kind_of(config).bf16 else Bytes(4, 8)


def on_this_machine(config: Config) -> Config:
    """The configuration with values for what it leaves to the machine (``precision=auto``, nulls)."""
    return with_machine_defaults(config, on_gpu=has_gpu())


def tensor_shapes(directory: Path) -> dict[str, tuple[int, ...]]:
    """Name of a tensor -> its shape, for all tensors of a model directory."""
    return {name: header.shape for name, header in tensor_headers(directory).items()}


def count_parameters(directory: Path) -> int:
    """Number of parameters of the whole model."""
    return sum(math.prod(shape) for shape in tensor_shapes(directory).values())


def readable(size: float) -> str:
    """Bytes as text, in GiB, or in MiB if it is less than one."""
    return f"{size / 2**30:,.1f} GiB" if size >= 2**30 else f"{size / 2**20:,.1f} MiB"
