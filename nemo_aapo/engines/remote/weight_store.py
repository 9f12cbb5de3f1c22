"""Refit through a directory that trainer and servers share: whole versions of the weights, or none.

    weights/v5-1a2b3c4d/
      bucket_00000.safetensors ...      a bounded number of bytes each
      model.safetensors.index.json      which tensor is in which bucket
      config.json                       the base model's: the whole is a Hugging Face directory
      manifest.json                     size and SHA-256 of each of these

A version is written beside its place and renamed when it is on the disk. Its id holds the digest of its manifest, so
that what a server has checked is what the trainer wrote.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import re
import shutil
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Mapping, Set
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from nemo_aapo.checkpoint.manifest import FileRecord, problem_with
from nemo_aapo.engines.weights import Weights, WeightsId
from nemo_aapo.errors import RunError, WeightsError, WireError
from nemo_aapo.models.directory import read_config_json
from nemo_aapo.utils.buckets import tensor_buckets
from nemo_aapo.utils.files import begin_directory, commit_directory, free_space, partial_of, to_json
from nemo_aapo.utils.safetensors import INDEX

FOLDER = "weights"
MANIFEST = "manifest.json"
NOT_COMPUTED = {"_name_or_path", "dtype", "torch_dtype", "transformers_version", "use_cache"} | {
    f"{token}_token_id" for token in ("bos", "eos", "pad")
}
"""Settings of a ``config.json`` on which no log-prob depends, or which the server has by other ways."""
SHOWN = 4
BUCKET_BYTES = 512 * 2**20
"""Bytes of weights that trainer and server hold in memory at a time, unless one tensor alone is larger."""


class WeightStore:
    """The trainer's side: writes versions and removes them."""

    def __init__(self, directory: Path, model_path: str, bucket_bytes: int = BUCKET_BYTES) -> None:
        """Touch no file.

        Args:
            directory: the servers' directory.
            model_path: the base model's directory, for its ``config.json``.
            bucket_bytes: the size of a weight file, unless one tensor alone is larger.
        """
        self.root = directory / FOLDER
        self.config = Path(model_path) / "config.json"
        self.bucket_bytes = bucket_bytes
        self.written_bytes = 0
        """Size of the last version in the directory."""

    def write(self, named_tensors: Iterable[tuple[str, torch.Tensor]], version: int) -> Weights:
        """Write one version; it is there whole or not at all.

        ``named_tensors`` is read to its end even after an error, as other ranks take part in making the tensors.

        Raises:
            RunError: the disk is full, or another error of the file system. Older versions are as they were.
        """
        tensors, partial = iter(named_tensors), partial_of(self.root / f"v{version}")
        try:
            begin_directory(self.root / f"v{version}", mode=0o700)
            digest, manifest = self._write_files(tensors, partial, version)
            write_new(partial / MANIFEST, manifest)
            name = f"v{version}-{digest[:8]}"
            commit_directory(partial, self.root / name)  # perhaps in the place of an earlier start's
            self.written_bytes = sum(file.stat().st_size for file in (self.root / name).iterdir())
        except OSError as error:
            deque(tensors, maxlen=0)
            shutil.rmtree(partial, ignore_errors=True)
            raise RunError(
                f"{partial}: policy version {version} can't be written for the rollout servers ({error}). "
                f"{free_space(self.root)}. Older versions are as they were; rollout.remote.directory names the place"
            ) from error
        return Weights(WeightsId(version, digest), f"{FOLDER}/{name}/{MANIFEST}")

    def whole_of(self, weights: Weights) -> Weights | None:
        """A version in another form, for a server that can't use this one; None: there is none."""
        return None

    def _write_files(
        self, tensors: Iterator[tuple[str, torch.Tensor]], folder: Path, version: int
    ) -> tuple[str, bytes]:
        """Write all files but the manifest; the version's digest, and the manifest's content."""
        files = write_whole(tensors, folder, self.config, self.bucket_bytes)
        manifest = manifest_of(version, files)
        return hashlib.sha256(manifest).hexdigest(), manifest

    def prune(self, keep: Collection[Weights]) -> None:
        """Remove all versions but these, and but those that a server is reading; earlier starts' are removed too."""
        kept = {Path(weights.manifest).parent.name for weights in keep if weights.manifest is not None}
        for folder in [*self.root.glob("v*"), *self.root.glob(".v*")]:
            if folder.name not in kept and not _is_read(folder):
                shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def verified(directory: Path, weights: Weights) -> Iterator[tuple[Path, dict[str, Any]]]:
    """The server's side: a version's folder, each byte of which is as the trainer wrote it, and its manifest.

    Inside, the trainer does not remove it.

    Args:
        directory: the servers' directory.
        weights: ``manifest`` is not None.

    Raises:
        WireError: a path that leads out of the directory.
        WeightsError: a file is missing, was cut off or changed; the message names it.
    """
    path = weights.manifest or ""
    if not re.fullmatch(rf"{FOLDER}/v-?\d+-[0-9a-f]{{8}}(-whole)?/{re.escape(MANIFEST)}", path):
        raise WireError(f"manifest={path[:200]!r}: {FOLDER}/vVERSION-DIGEST/{MANIFEST} is needed")
    manifest = (directory / path).resolve()
    if not manifest.is_relative_to(directory.resolve()):
        raise WireError(f"manifest={path!r}: leads out of the servers' directory")
    try:
        file = manifest.open("rb")
    except OSError as error:
        raise WeightsError(f"{error.filename}: {error.strerror}") from None
    with file:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(file, fcntl.LOCK_SH)
        yield manifest.parent, _checked(manifest, file.read(), weights)


def _checked(path: Path, content: bytes, weights: Weights) -> dict[str, Any]:
    """A manifest, after it and all files that it lists were found to be what was announced."""
    try:
        manifest = json.loads(content)
        tensors = manifest.get("tensors")
        named = hashlib.sha256(content).hexdigest() if tensors is None else digest_of_tensors(tensors)
    except (ValueError, AttributeError):
        named = ""
    if named != weights.id.digest:
        raise WeightsError(f"{path}: is not the manifest that was announced. Half written?")
    if manifest["policy_version"] != weights.id.policy_version:
        raise WeightsError(f"{path}: is of policy version {manifest['policy_version']}")
    for name, entry in manifest["files"].items():
        if problem := problem_with(path.parent, name, FileRecord(**entry)):
            raise WeightsError(problem)
    return manifest


def require_tensors(folder: Path, tensors: Set[str]) -> None:
    """Refuse a whole version whose index lacks one of these names.

    Megatron-Bridge would leave a weight as it was where the file has none.

    Raises:
        WeightsError: names the first one.
    """
    index = json.loads((folder / INDEX).read_bytes())
    if missing := sorted(tensors - index["weight_map"].keys()):
        raise WeightsError(f"{folder}: {len(missing)} tensors of the model are missing, {missing[0]} first")


def digest_of_tensors(checksums: Mapping[str, str]) -> str:
    """A version's name by the checksums of its tensors, where it may be written in more than one way."""
    return hashlib.sha256(to_json(dict(sorted(checksums.items()))).encode()).hexdigest()


def _is_read(folder: Path) -> bool:
    """Whether a server is reading a version."""
    try:
        with (folder / MANIFEST).open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # half written, or a file system without locks
        return False
    return False


def require_architecture(theirs: Mapping[str, Any], model: str) -> None:
    """Refuse weights of another architecture than the one that a server has built: some would load all the same.

    Args:
        theirs: the ``config.json`` that came with them.
        model: the server's own model directory.

    Raises:
        WeightsError: the settings of their ``config.json`` that differ.
    """
    ours = read_config_json(Path(model))
    names = sorted({*theirs, *ours} - NOT_COMPUTED)
    if different := [name for name in names if theirs.get(name) != ours.get(name)]:
        values = ", ".join(f"{name}={theirs.get(name)!r} (here {ours.get(name)!r})" for name in different[:SHOWN])
        raise WeightsError(
            f"they are of another architecture than this server's model {model}: {values}. Start servers whose "
            "model.path is of that kind"
        )


def write_whole(
    tensors: Iterator[tuple[str, torch.Tensor]], folder: Path, config: Path, bucket_bytes: int
) -> dict[str, FileRecord]:
    """Write tensors in buckets with their index, and the model's ``config.json``; the records of these files."""
    files: dict[str, FileRecord] = {}
    place: dict[str, str] = {}
    # Copies of their own: tied weights and views share memory, which the format has no place for.
    copies = ((name, tensor.detach().cpu().clone(memory_format=torch.contiguous_format)) for name, tensor in tensors)
    for bucket in tensor_buckets(copies, bucket_bytes):
        name = f"bucket_{len(files):05d}.safetensors"
        files[name] = write_new(folder / name, safetensors.torch.save(dict(bucket)))
        place |= dict.fromkeys((tensor for tensor, _ in bucket), name)
        del bucket  # before the next one is filled
    files[INDEX] = write_new(folder / INDEX, to_json({"metadata": {}, "weight_map": place}).encode())
    files["config.json"] = write_new(folder / "config.json", config.read_bytes())
    return files


def manifest_of(version: int, files: Mapping[str, FileRecord], **more: Any) -> bytes:
    """The content of a manifest."""
    records = {name: dataclasses.asdict(record) for name, record in files.items()}
    return to_json({"policy_version": version, "files": records, **more}).encode()


def write_new(path: Path, content: bytes) -> FileRecord:
    """Write a new file; its record in the manifest."""
    with path.open("xb") as file:
        file.write(content)
    return FileRecord(len(content), hashlib.sha256(content).hexdigest())
