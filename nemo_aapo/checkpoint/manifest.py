"""The manifest of a checkpoint: whose it is, what it holds, and size and SHA-256 of every file.

``manifest.json`` is written last, beside the files it lists, and holds a checksum of itself. It protects against what
disks, copies and interrupted writes do, not against an attacker, who would write a fitting manifest: what may be read
from an untrusted checkpoint is ``format.py``'s business. No torch here: tools may read a manifest cheaply.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_aapo.errors import CheckpointError, DamagedCheckpointError

FILE_NAME = "manifest.json"
FORMAT = 1
"""Number of the manifest's layout: a reader refuses another one."""


@dataclass(frozen=True, slots=True)
class FileRecord:
    """What a file was when it was written.

    Example: ``FileRecord(bytes=1048, sha256="9f86d081884c7d65...")``
    """

    bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Manifest:
    """All that a checkpoint knows of itself.

    Example::

        Manifest(
            step=50,
            config_digest="1f0c...",
            trainer_state={"step": 50, "sampler": {...}, "metrics": {...}},
            layout={"world_size": 4, "tensor_model_parallel_size": 2, ...},
            versions={"megatron_core": "0.16.1", ...},
            files={"__0_0.distcp": FileRecord(...), "common.pt": FileRecord(...)},
        )
    """

    step: int
    """Number of training steps done."""
    config_digest: str
    """Digest of the settings that decide the run's result (``config.digest``)."""
    trainer_state: dict[str, Any]
    """What the trainer needs to go on; it comes back equal to what was handed in."""
    layout: dict[str, int]
    """Ranks and parallel sizes it was saved under; for people, since it loads under any."""
    versions: dict[str, str]
    """Versions of the libraries that wrote it; for people."""
    files: dict[str, FileRecord]
    """Every file of the checkpoint but the manifest, by its path from there."""


def write(manifest: Manifest, directory: Path) -> None:
    """Write ``manifest.json`` and bring it to the disk.

    Raises:
        CheckpointError: the trainer state would not come back from JSON as it is (tuples, keys that are not strings,
            NaN, objects), so that a resumed run would not be the same run.
    """
    tree = {"format": FORMAT, **dataclasses.asdict(manifest)}
    try:
        unchanged = json.loads(json.dumps(tree, allow_nan=False)) == tree
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"the trainer state can't be kept as JSON: {error}") from error
    if not unchanged:
        raise CheckpointError("the trainer state would change in JSON: use lists and string keys only")
    with open(directory / FILE_NAME, "w", encoding="utf-8") as file:
        json.dump({**tree, "sha256": _tree_digest(tree)}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())


def read(directory: Path) -> Manifest:
    """Read ``manifest.json`` and check it against its own checksum.

    Raises:
        DamagedCheckpointError: it is missing or altered.
        CheckpointError: it has another format.
    """
    path = directory / FILE_NAME
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise DamagedCheckpointError(f"{path} is missing") from error
    except (OSError, ValueError, RecursionError) as error:
        raise DamagedCheckpointError(f"{path} can't be read: {error}") from error
    if not isinstance(tree, dict) or tree.pop("sha256", None) != _tree_digest(tree):
        raise DamagedCheckpointError(f"{path} was altered: it does not fit its own checksum")
    if tree.pop("format", None) != FORMAT:
        raise CheckpointError(f"{path} has another format than {FORMAT}, which this version reads")
    try:
        files = {name: FileRecord(**record) for name, record in tree.pop("files").items()}
        return Manifest(**tree, files=files)
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} lacks a field or has one too many: {error}") from error


def seal(path: Path) -> FileRecord:
    """Bring a file to the disk, and return its record."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        return FileRecord(os.fstat(file.fileno()).st_size, hashlib.file_digest(file, "sha256").hexdigest())


def problem_with(directory: Path, name: str, record: FileRecord) -> str | None:
    """What is wrong with a file of a checkpoint; None if it is as it was written."""
    path = directory / name
    if Path(name).is_absolute() or ".." in Path(name).parts:
        return f"{name!r} is not a file name"
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size != record.bytes:
                return f"{path} has {size} bytes instead of {record.bytes}"
            if hashlib.file_digest(file, "sha256").hexdigest() != record.sha256:
                return f"{path} was altered: its SHA-256 is not the manifest's"
    except FileNotFoundError:
        return f"{path} is missing"
    except OSError as error:
        return f"{path} can't be read: {error}"
    return None


def shard_of(names: Iterable[str], rank: int, world_size: int) -> list[str]:
    """The files that one of ``world_size`` ranks checks: those it wrote itself, if as many ranks wrote them.

    ``format.py`` calls rank r's files ``__r_*.distcp``; all others are rank 0's.
    """

    def writer(name: str) -> int:
        match = re.match(r"__(\d+)_", name)
        return int(match.group(1)) if match else 0

    return sorted(name for name in names if writer(name) % world_size == rank)


def _tree_digest(tree: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()
