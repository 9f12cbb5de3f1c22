"""A Hugging Face model directory as files: weights in shards with an index, and what comes from the base model."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

import torch

from nemo_aapo.models import reader
from nemo_aapo.models.directory import read_config_json, shape_of
from nemo_aapo.models.weights import FLOATS, own_tensors
from nemo_aapo.utils.buckets import tensor_buckets
from nemo_aapo.utils.safetensors import INDEX, WEIGHTS, has_weights, tensor_headers

MAX_SHARD_BYTES = 5_000_000_000
"""A file of weights grows no larger than this, unless one tensor alone does; what transformers writes by default."""

COMPANION_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges*",
    "*.model",
    "*.tiktoken",
    "chat_template*",
    "additional_chat_templates/*",
    "*.py",
    "LICENSE*",
    "NOTICE*",
)
"""Files that an exported model takes over from its base model, as patterns; code may be its tokenizer's."""
OF_QUANTIZED_WEIGHTS = ("quantization_config", "compression_config")
"""Keys of ``config.json`` that are not true of weights that are written here."""
DTYPES = {name: reader.DTYPES[name] for name in FLOATS}
"""The dtypes that weights may have, by the names of safetensors."""


def write_texts(texts: Mapping[str, str], directory: Path) -> None:
    """Write texts as files of these names."""
    for name, text in texts.items():
        (directory / name).write_text(text, encoding="utf-8")


def companions(directory: Path) -> list[Path]:
    """The files of configuration, tokenizer with its code, chat templates and licence in a model directory."""
    found = {file for pattern in COMPANION_FILES for file in directory.glob(pattern) if file.is_file()}
    return sorted(found)


def copy_companions(source: Path, target: Path, leave_out: Collection[str] = ()) -> None:
    """Copy the ``companions`` byte for byte, but for those of these names."""
    for file in companions(source):
        if file.name not in leave_out:
            copy = target / file.relative_to(source)
            copy.parent.mkdir(exist_ok=True)
            shutil.copyfile(file, copy)


def state_dtype(directory: Path, dtype: torch.dtype) -> None:
    """Make ``config.json`` true of weights in this dtype; one that is true stays as it is, byte for byte."""
    path = directory / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    true = {key: value for key, value in config.items() if key not in OF_QUANTIZED_WEIGHTS}
    true |= {key: dtype_name(dtype) for key in ("dtype", "torch_dtype") if key in config}
    if true != config:
        path.write_text(json.dumps(true, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def weights_dtype(directory: Path) -> torch.dtype | None:
    """The dtype that a model directory's weights are stored in: the widest, if they differ.

    Where there are no weights the one that ``config.json`` names, if it does.

    Raises:
        ConfigError: a file is damaged.
    """
    config = read_config_json(directory)
    if has_weights(directory):
        headers = own_tensors(tensor_headers(directory), shape_of(config))
        stored = {DTYPES[header.dtype] for header in headers.values()}
        return stored.pop() if len(stored) == 1 else torch.float32
    named = config.get("dtype", config.get("torch_dtype"))
    return next((dtype for dtype in DTYPES.values() if dtype_name(dtype) == named), None)


def dtype_name(dtype: torch.dtype) -> str:
    """``torch.bfloat16`` -> ``bfloat16``, as ``config.json`` has it."""
    return str(dtype).removeprefix("torch.")


def write_shards(
    tensors: Iterable[tuple[str, torch.Tensor]], directory: Path, max_shard_bytes: int = MAX_SHARD_BYTES
) -> set[str]:
    """Write ``model.safetensors``, or several files and their index where one would grow too large.

    Args:
        tensors: by name, on any device; one shard of them is held in memory at a time.
        directory: there already.

    Returns:
        The names written.
    """
    from safetensors.torch import save_file

    on_host = ((name, tensor.cpu().contiguous()) for name, tensor in tensors)
    place: dict[str, int] = {}
    total = number = 0
    for bucket in tensor_buckets(on_host, max_shard_bytes):
        number += 1
        place |= dict.fromkeys((name for name, _ in bucket), number)
        total += sum(tensor.nbytes for _, tensor in bucket)
        save_file(dict(bucket), directory / _partial_name(number), metadata={"format": "pt"})
        del bucket  # before the next one is filled
    _name_shards(directory, place, number, total)
    return set(place)


def _partial_name(number: int) -> str:
    return f".model-{number:05d}"


def _name_shards(directory: Path, place: Mapping[str, int], count: int, total_bytes: int) -> None:
    """Give the files their names, which say how many there are, and write the index of several."""
    if count == 1:
        os.replace(directory / _partial_name(1), directory / WEIGHTS)
        return
    files = {number: f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)}
    for number, file in files.items():
        os.replace(directory / _partial_name(number), directory / file)
    write_index({name: files[number] for name, number in sorted(place.items())}, directory, total_bytes)


def write_index(weight_map: Mapping[str, str], directory: Path, total_bytes: int) -> None:
    """Write the index of several weight files.

    Args:
        weight_map: tensor name -> name of its file.
        total_bytes: size of all tensors.
    """
    index = {"metadata": {"total_size": total_bytes}, "weight_map": dict(weight_map)}
    (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
