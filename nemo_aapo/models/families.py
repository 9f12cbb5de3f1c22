"""Which model families train and convert, and which are refused, with the reason. No torch.

Megatron-Bridge names more architectures (``python scripts/convert.py supported`` prints its list). Those of
``models/directory.py`` are converted both ways and compared with transformers by the tests.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nemo_aapo.config.sizes import undivided
from nemo_aapo.errors import ConfigError
from nemo_aapo.models.directory import (
    ARCHITECTURES,
    REFUSED,
    first_architecture,
    read_config_json,
    shape_of,
    twin_problem,
)


def require_convertible(path: Path) -> dict[str, Any]:
    """Refuse a model whose Megatron twin would not compute what transformers computes.

    Args:
        path: a directory with the model's ``config.json``.

    Returns:
        The content of ``config.json``.

    Raises:
        ConfigError: an architecture or a setting of it that is not supported, and why.
    """
    config = read_config_json(path)
    architecture = first_architecture(config)
    if architecture not in ARCHITECTURES:
        reason = REFUSED.get(architecture, "it is not among those that were tested here")
        raise ConfigError(
            f"{path}: architecture {architecture} is not converted: {reason}. {list_of(ARCHITECTURES)} are"
        )
    if problem := twin_problem(config):
        raise ConfigError(f"{path}: {problem}")
    return config


def require_layout(
    path: Path, tensor_parallel_size: int, pipeline_parallel_size: int, expert_parallel_size: int = 1
) -> None:
    """Refuse a model that is not converted, or whose shape the parallel sizes do not divide.

    Raises:
        ConfigError: as ``require_convertible``; or the message says what does not divide.
    """
    shape = shape_of(require_convertible(path))
    problem = undivided(shape, tensor_parallel_size, pipeline_parallel_size, expert_parallel_size)
    if problem is None and shape.vocab_size % tensor_parallel_size:
        problem = f"tensor_model_parallel_size={tensor_parallel_size} does not divide its {shape.vocab_size} token ids"
    if problem:
        raise ConfigError(f"{path}: {problem}")


def list_of(architectures: Sequence[str]) -> str:
    """The names joined for people: ``A, B and C``."""
    return ", ".join(architectures[:-1]) + " and " + architectures[-1]


def supported(known_to_bridge: Sequence[str]) -> str:
    """A table of all architectures that the Bridge knows.

    Args:
        known_to_bridge: ``mcore.bridge.loader.known_architectures()``.
    """
    lines = []
    for name in sorted({*known_to_bridge, *ARCHITECTURES}):
        if name in ARCHITECTURES:
            status = "trains and converts"
        elif name in REFUSED:
            status = f"refused: {REFUSED[name]}"
        else:
            status = "known to Megatron-Bridge, not tested here, refused"
        lines.append(f"{name:36} {status}")
    return "\n".join(lines)
