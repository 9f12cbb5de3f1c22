"""A Hugging Face model directory as files: weights in shards with an index, and what comes from the base model."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch

INDEX = "model.safetensors.index.json"
MAX_SHARD_BYTES = 5_000_000_000
"""A file of weights grows no larger than this, unless one tensor alone does; what transformers writes by default."""

COMPANION_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "spiece.model",
    "chat_template*",
    "LICENSE*",
)
"""What an exported model takes over from its base model."""


@contextlib.contextmanager
def appearing(target: Path) -> Iterator[Path]:
    """A new directory to write in, which takes the place of ``target`` at the end; an error leaves ``target`` alone.

    One process, not collective.
    """
    partial = target.with_name(target.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    yield partial
    shutil.rmtree(target, ignore_errors=True)
    os.replace(partial, target)


def write_texts(texts: Mapping[str, str], directory: Path) -> None:
    """Files by name."""
    for name, text in texts.items():
        (directory / name).write_text(text, encoding="utf-8")


def companions(directory: Path) -> list[Path]:
    """Configuration, tokenizer, chat template and licence of a model directory."""
    found = {file for pattern in COMPANION_FILES for file in directory.glob(pattern) if file.is_file()}
    return sorted(found)


def copy_companions(source: Path, target: Path, dtype: torch.dtype | None = None) -> None:
    """Copy them byte for byte; with ``dtype``, ``config.json`` names that one as the weights'."""
    for file in companions(source):
        shutil.copyfile(file, target / file.name)
    if dtype is not None:
        path = target / "config.json"
        config = json.loads(path.read_text(encoding="utf-8"))
        key = "torch_dtype" if "torch_dtype" in config else "dtype"
        path.write_text(json.dumps({**config, key: dtype_name(dtype)}, indent=2) + "\n", encoding="utf-8")


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
    shards: list[dict[str, torch.Tensor]] = [{}]
    names: list[list[str]] = []
    size = total = 0

    def flush() -> None:
        shard = shards.pop()
        names.append(list(shard))
        _save(shard, directory / _partial_name(len(names)))
        shards.append({})

    for name, tensor in tensors:
        if shards[-1] and size + tensor.nbytes > max_shard_bytes:
            flush()
            size = 0
        shards[-1][name] = tensor.cpu().contiguous()
        size, total = size + tensor.nbytes, total + tensor.nbytes
    flush()
    _name_shards(directory, names, total)
    return {name for shard in names for name in shard}


def _save(shard: dict[str, torch.Tensor], path: Path) -> None:
    from safetensors.torch import save_file

    save_file(shard, path, metadata={"format": "pt"})


def _partial_name(number: int) -> str:
    return f".model-{number:05d}"


def _name_shards(directory: Path, names: list[list[str]], total_bytes: int) -> None:
    """Give the files their names, which say how many there are."""
    if len(names) == 1:
        os.replace(directory / _partial_name(1), directory / "model.safetensors")
        return
    weight_map = {}
    for number, shard in enumerate(names, start=1):
        file = f"model-{number:05d}-of-{len(names):05d}.safetensors"
        os.replace(directory / _partial_name(number), directory / file)
        weight_map.update(dict.fromkeys(shard, file))
    index = {"metadata": {"total_size": total_bytes}, "weight_map": dict(sorted(weight_map.items()))}
    (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
