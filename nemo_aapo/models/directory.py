"""A Hugging Face model directory, checked before anything expensive is done with it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_aapo.config import Config, ModelShape, Sizes, derive
from nemo_aapo.errors import ConfigError
from nemo_aapo.utils.safetensors import read_header

ARCHITECTURES = ("Qwen2ForCausalLM", "Qwen3ForCausalLM", "LlamaForCausalLM")
"""Architectures that can be trained; ``models/families.py`` has those that are only converted."""
WEIGHTS = "model.safetensors"
"""The file of all weights, where one is enough."""
INDEX = "model.safetensors.index.json"
"""Says which of several files holds which tensor."""

LLAMA3_ROPE = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
"""The values of ``rope_scaling`` that mcore's rotary embedding takes for granted; Llama 3.1, 3.2 and 3.3 have them."""


def read_model_dir(path: str, architectures: Sequence[str] = ARCHITECTURES) -> ModelShape:
    """Check that the directory holds a whole model of a known architecture, and read its shape.

    Only headers are read: a 70B model takes milliseconds.

    Raises:
        ConfigError: missing directory or file, half-written weights, unknown architecture, or a setting of the model
            that megatron-core computes otherwise; what to do about it.
    """
    directory = Path(path)
    if not directory.is_dir():
        raise ConfigError(
            f"model.path={path}: no such directory. It must be a local Hugging Face model directory "
            "(config.json, *.safetensors, tokenizer files); `huggingface-cli download NAME --local-dir DIR` makes one"
        )
    config = read_config_json(directory)
    architecture = first_architecture(config)
    if architecture not in architectures:
        raise ConfigError(f"model.path={path}: architecture {architecture}; supported are {', '.join(architectures)}")
    if problem := twin_problem(config):
        raise ConfigError(f"model.path={path}: {problem}")
    tensor_headers(directory)
    return shape_of(config)


def twin_problem(config: dict[str, Any]) -> str | None:
    """What of a ``config.json`` makes the Megatron model compute something else than transformers does; None: nothing.

    Args:
        config: of an architecture that the Bridge has a map for.
    """
    return _rope_problem(config) or _window_problem(config)


def _rope_problem(config: dict[str, Any]) -> str | None:
    if "rope_parameters" in config:
        return (
            "config.json has rope_parameters, which transformers 5 writes and 4.57, used here, ignores: put what they "
            "say into rope_theta and rope_scaling"
        )
    scaling = config.get("rope_scaling")
    if not scaling:
        return None
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind == "default":
        return None
    if kind != "llama3" or "LlamaForCausalLM" not in config["architectures"]:
        return f"rope_scaling of type {kind} gets lost in Megatron-Bridge 0.3.1: the Megatron model would differ"
    other = {key: scaling.get(key) for key, value in LLAMA3_ROPE.items() if scaling.get(key) != value}
    if other:
        return f"rope_scaling has {other}, but megatron-core computes with {LLAMA3_ROPE} whatever a model says"
    return None


def _window_problem(config: dict[str, Any]) -> str | None:
    if config.get("use_sliding_window") and "MistralForCausalLM" not in config["architectures"]:
        return "use_sliding_window=true gets lost in Megatron-Bridge 0.3.1: the Megatron model would differ"
    return None


def shape_of(config: dict[str, Any]) -> ModelShape:
    """The shape of the model that a ``config.json`` describes."""
    heads = config["num_attention_heads"]
    return ModelShape(
        architecture=config["architectures"][0],
        num_layers=config["num_hidden_layers"],
        hidden_size=config["hidden_size"],
        ffn_hidden_size=config["intermediate_size"],
        num_attention_heads=heads,
        num_query_groups=config.get("num_key_value_heads") or heads,
        head_size=config.get("head_dim") or config["hidden_size"] // heads,
        vocab_size=config["vocab_size"],
        tied_embeddings=bool(config.get("tie_word_embeddings", False)),
        max_position_embeddings=config.get("max_position_embeddings", 2**31),
    )


def architecture_of(path: str) -> str:
    """The first of the architectures that ``config.json`` names.

    Raises:
        ConfigError: no such file, or not JSON.
    """
    return first_architecture(read_config_json(Path(path)))


def first_architecture(config: dict[str, Any]) -> str:
    """The first architecture of a ``config.json``, or ``none named``."""
    return (config.get("architectures") or ["none named"])[0]


def read_config_json(directory: Path) -> dict[str, Any]:
    """A model directory's ``config.json``.

    Raises:
        ConfigError: missing or damaged.
    """
    return _read_json(directory / "config.json", "is this a Hugging Face model directory?")


def check_model(config: Config, world_size: int) -> tuple[ModelShape, Sizes]:
    """Check the model directory against the configuration and the number of ranks, in milliseconds and without torch.

    Raises:
        ConfigError: as ``read_model_dir`` and ``config.derive``.
    """
    shape = read_model_dir(config.model.path)
    return shape, derive(config, shape, world_size)


def weight_files(directory: Path) -> list[str]:
    """Names of the safetensors files that make up the model.

    Raises:
        ConfigError: none there, or a file that the index names is missing.
    """
    index = directory / INDEX
    if index.exists():
        names = sorted(set(_read_json(index, "the index of the weights").get("weight_map", {}).values()))
        missing = [name for name in names if not (directory / name).exists()]
        if missing or not names:
            raise ConfigError(
                f"{index}: names files that are not there: {', '.join(missing) or 'none at all'}. Half downloaded?"
            )
        return names
    if (directory / WEIGHTS).exists():
        return [WEIGHTS]
    raise ConfigError(
        f"model.path={directory}: no {WEIGHTS} and no index of several. Pickled weights (*.bin) are not read: "
        "convert them with transformers' save_pretrained(safe_serialization=True)"
    )


@dataclass(frozen=True, slots=True)
class TensorHeader:
    """One tensor as a weight file announces it.

    Example: ``TensorHeader("model-00001-of-00002.safetensors", (151936, 896), "BF16")``
    """

    file: str
    """Name of the file that holds the tensor."""
    shape: tuple[int, ...]
    """The whole tensor's shape."""
    dtype: str
    """The dtype as safetensors spells it: ``F32``, ``BF16``, ``F16``."""


def tensor_headers(directory: Path) -> dict[str, TensorHeader]:
    """All tensors of a model directory by name. Only headers are read: a 70B model takes milliseconds.

    Raises:
        ConfigError: as ``weight_files``; or a file is cut off or damaged.
    """
    return {
        name: TensorHeader(file, tuple(entry["shape"]), entry["dtype"])
        for file in weight_files(directory)
        for name, entry in read_header(directory / file)[0].items()
    }


def digest(path: str) -> str:
    """A digest of the model's weights and configuration, 16 hex digits, which reference rewards are stored under."""
    directory, total = Path(path), hashlib.sha256()
    for name in ["config.json", *weight_files(directory)]:
        with (directory / name).open("rb") as file:
            total.update(hashlib.file_digest(file, "sha256").digest())
    return total.hexdigest()[:16]


def _read_json(path: Path, hint: str) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: missing ({hint})") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not JSON ({error}). Half-written?") from None
