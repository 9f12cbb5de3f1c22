"""What model and data of a run are, whatever their directories and files are called: digests of what they hold.

A digest is found in milliseconds, on every rank and on a login node, without torch. Of large files only a part counts:
a piece of every tensor of a model, and evenly spaced pieces of data. Training changes tensors throughout, so another
fine-tune of a model is found. What this could miss, single values of a large file, is found where it would matter: a
run whose reference is the base model keeps a digest of all weights, and checkpoints keep one of all training prompts.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any, BinaryIO

from nemo_aapo.config import END_TOKENS, Config, Identity
from nemo_aapo.text.end_tokens import what_ends
from nemo_aapo.utils.safetensors import has_weights, model_digest, read_header, weight_files

PIECE = 64 * 1024
"""Bytes that count of each tensor, from its middle, and at each place of a data file."""
PLACES = 1024
"""Places of a data file that count; up to 64 MiB that is all of it."""


def identity_of(config: Config) -> Identity:
    """What ``model.path``, ``data.train`` and ``data.validation`` hold, in the form of these settings, and what ends
    the model's completions by the files beside its weights.

    What is no file or directory here (a data set of the hub, a task, what is handed over as objects) keeps its name.

    Raises:
        ConfigError: a file of weights is not whole.
    """
    return {
        "model.path": model_identity(config.model.path),
        "data.train": _data(config.data.train),
        "data.validation": _data(config.data.validation),
        END_TOKENS: what_ends(Path(config.model.path)),
    }


def reference_of(config: Config) -> str | None:
    """The digest of all weights of the model at ``model.path``, where the run compares with it; None elsewhere.

    Every start loads the reference from there anew: with another model in its place the run would go on in silence.
    Reads every byte of the weights.

    Raises:
        ConfigError: weights that are not there, or not whole.
    """
    compares = config.algorithm.compares_with_reference
    return model_digest(config.model.path) if compares and has_weights(Path(config.model.path)) else None


def code_of_algorithm(custom: str | None) -> str | None:
    """16 hex digits of the file that holds an algorithm of the user's own; None without one, or without a file.

    Args:
        custom: ``algorithm.custom``, whose module has been imported if it is none of a file.
    """
    if custom is None:
        return None
    module = custom.rpartition(":")[0]
    file = module if module.endswith(".py") else getattr(sys.modules.get(module), "__file__", None)
    return hashlib.sha256(Path(file).read_bytes()).hexdigest()[:16] if file and Path(file).is_file() else None


def model_identity(path: str) -> str:
    """16 hex digits of ``config.json`` and weights; the path where there are none."""
    directory = Path(path)
    if not has_weights(directory):
        return path
    weights = [directory / name for name in weight_files(directory)]
    total = hashlib.sha256()
    for file in (directory / "config.json", *weights):
        if file.exists():
            total.update(_weights(file) if file in weights else file.read_bytes())
    return total.hexdigest()[:16]


def _weights(path: Path) -> bytes:
    header, begin = read_header(path)
    total = hashlib.sha256(json.dumps([path.name, header], sort_keys=True).encode())
    with path.open("rb") as file:
        for name in sorted(header):
            start, stop = header[name]["data_offsets"]
            middle = max(start, (start + stop - PIECE) // 2)
            total.update(_piece(file, begin + middle, min(PIECE, stop - start)))
    return total.digest()


def _data(value: str | tuple[dict[str, Any], ...]) -> Any:
    if isinstance(value, str):
        return _content(value)
    return [{**source, "path": _content(str(source.get("path")))} for source in value]


def _content(path: str) -> str:
    """16 hex digits of a file, or of all files of a directory with their names there."""
    root = Path(path)
    if root.is_file():
        return _file(root)[:16]
    if not root.is_dir():
        return path
    files = sorted(file for file in root.rglob("*") if file.is_file())
    listed = [(str(file.relative_to(root)), _file(file)) for file in files]
    return hashlib.sha256(json.dumps(listed).encode()).hexdigest()[:16]


def _file(path: Path) -> str:
    size = path.stat().st_size
    total = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        for start in range(0, size, max(PIECE, size // PLACES)):
            total.update(_piece(file, start, PIECE))
    return total.hexdigest()


def _piece(file: BinaryIO, start: int, size: int) -> bytes:
    file.seek(start)
    return file.read(size)
