"""``rollout.refit=delta``: what a step changed in the weights, for servers that share only a file system.

A step at a small learning rate changes few of the bits of bf16 weights. A version is written as the exclusive or of its
bytes with those of the version before, tensor by tensor, compressed; every ``WHOLE_EVERY``-th one is written whole, as
``rollout.refit=files`` does.

    weights/v5-1a2b3c4d/
      bucket_00000.zst ...   compressed differences, several tensors each
      config.json            the base model's
      manifest.json          size and SHA-256 of these files; the version that it differs from; for each tensor the
                             SHA-256 of its whole bytes, and where its difference stands

A version is named by the checksums of its whole tensors, however it is written. So a server proves each tensor after
the exclusive or, and a difference that is taken twice, in another order or from another version can't go unnoticed.
All differences since the last whole version stay in the directory: a server that comes late takes them one after the
other. One that can't (a file is damaged) is answered by the same version whole.
"""

from __future__ import annotations

import contextlib
import hashlib
import shutil
import threading
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nemo_aapo.checkpoint.manifest import FileRecord
from nemo_aapo.engines.remote.weight_store import (
    BUCKET_BYTES,
    FOLDER,
    MANIFEST,
    WeightStore,
    digest_of_tensors,
    manifest_of,
    require_tensors,
    verified,
    write_new,
    write_whole,
)
from nemo_aapo.engines.weights import Weights, WeightsId
from nemo_aapo.errors import WeightsError
from nemo_aapo.models.reader import WeightFiles
from nemo_aapo.models.writer import write_shards
from nemo_aapo.utils.buckets import buckets
from nemo_aapo.utils.files import to_json, whole_directory
from nemo_aapo.utils.safetensors import INDEX, WEIGHTS

WHOLE_EVERY = 32
"""So many versions after a whole one, the next whole one comes: a server that comes late reads no more differences."""
LEVEL = 1
"""Of zstd: higher ones take many times as long and save a few percent."""


class DeltaStore(WeightStore):
    """The trainer's side. It keeps the last version in host memory, which the next one is compared with."""

    def __init__(self, directory: Path, model_path: str, bucket_bytes: int = BUCKET_BYTES) -> None:
        """As ``WeightStore``."""
        super().__init__(directory, model_path, bucket_bytes)
        self._last: dict[str, torch.Tensor] = {}
        self._chain: list[Weights] = []  # from the last whole version to the newest one
        self._chains: dict[WeightsId, list[Weights]] = {}  # the same of older ones that may still be asked for
        self._lock = threading.Lock()

    def write(self, named_tensors: Iterable[tuple[str, torch.Tensor]], version: int) -> Weights:
        """Write what differs from the version before, or all of it.

        Raises:
            RunError: as ``WeightStore.write``; the next version is a whole one then.
        """
        with self._lock:
            if len(self._chain) > WHOLE_EVERY:
                self._chain = []
            try:
                weights = super().write(named_tensors, version)
            except BaseException:
                self._chain = []  # what is in memory is no version
                raise
            self._chain.append(weights)
            self._chains[weights.id] = list(self._chain)
            return weights

    def whole_of(self, weights: Weights) -> Weights | None:
        """The newest version in its whole form, written now if it was not; None for any other version.

        Raises:
            OSError: the disk is full.
        """
        with self._lock:
            if not self._chain or weights.id != self._chain[-1].id or weights.manifest is None:
                return None
            if len(self._chain) > 1:
                folder = self.root / f"{Path(weights.manifest).parent.name}-whole"
                with whole_directory(folder) as partial:
                    write_new(partial / MANIFEST, self._write_whole(iter(self._last.items()), partial, weights.id)[1])
                self._chain = [Weights(weights.id, f"{FOLDER}/{folder.name}/{MANIFEST}")]
            return self._chain[0]

    def prune(self, keep: Collection[Weights]) -> None:
        """As ``WeightStore.prune``; what these and the newest version are to be reached from stays, too."""
        with self._lock:
            self._chains = {weights.id: self._chains.get(weights.id, [weights]) for weights in keep}
            newest = self._chain if keep else []
        super().prune([*(link for chain in self._chains.values() for link in chain), *newest])

    def _write_files(
        self, tensors: Iterator[tuple[str, torch.Tensor]], folder: Path, version: int
    ) -> tuple[str, bytes]:
        if not self._chain:
            self._last = {}
            return self._write_whole(self._remembered(tensors), folder, WeightsId(version, ""))
        checksums: dict[str, str] = {}
        files: dict[str, FileRecord] = {}
        place: dict[str, list[str | int]] = {}
        packed = ((name, self._difference(name, tensor, checksums)) for name, tensor in tensors)
        for bucket in buckets(packed, lambda item: len(item[1]), self.bucket_bytes):
            file, start = f"bucket_{len(files):05d}.zst", 0
            for name, content in bucket:
                place[name] = [file, start, len(content)]
                start += len(content)
            files[file] = write_new(folder / file, b"".join(content for _, content in bucket))
        files["config.json"] = write_new(folder / "config.json", self.config.read_bytes())
        base = self._chain[-1]
        named = {"policy_version": base.id.policy_version, "digest": base.id.digest, "manifest": base.manifest}
        return digest_of_tensors(checksums), manifest_of(
            version, files, tensors=checksums, base=named, differences=place
        )

    def _write_whole(
        self, tensors: Iterator[tuple[str, torch.Tensor]], folder: Path, version: WeightsId
    ) -> tuple[str, bytes]:
        files = write_whole(tensors, folder, self.config, self.bucket_bytes)
        checksums = {name: _checksum(_bytes_of(tensor)) for name, tensor in self._last.items()}
        return digest_of_tensors(checksums), manifest_of(version.policy_version, files, tensors=checksums)

    def _remembered(self, tensors: Iterator[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in tensors:
            self._last[name] = tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
            yield name, self._last[name]

    def _difference(self, name: str, tensor: torch.Tensor, checksums: dict[str, str]) -> bytes:
        """What a tensor differs in from the one in memory, whose place it takes."""
        new, old = tensor.detach().cpu().clone(memory_format=torch.contiguous_format), self._last[name]
        self._last[name], checksums[name] = new, _checksum(_bytes_of(new))
        return pack(_bytes_of(new) ^ _bytes_of(old), new.element_size())


class VersionReader:
    """A server's side, however a version is written.

    Once differences come it keeps a whole copy of the version that it has, which the next one is taken with.
    """

    def __init__(self, directory: Path, copy: Path) -> None:
        """
        Args:
            directory: the servers' directory.
            copy: a directory on the server's own disk, for this server alone; what an earlier one left is removed.
        """
        self.directory, self.copy = directory, copy
        self._has: WeightsId | None = None  # what the copy is
        shutil.rmtree(copy, ignore_errors=True)

    @contextlib.contextmanager
    def whole(self, weights: Weights, tensors: Set[str]) -> Iterator[Path]:
        """The folder of a whole version, each tensor of which is as the trainer had it. Inside, it stays.

        Args:
            weights: ``manifest`` is not None.
            tensors: names that must be among them.

        Raises:
            WireError, WeightsError: as ``verified``; or it can't be reached from any version that is there.
        """
        with contextlib.ExitStack() as held:
            start, *links = self._links(weights, held)
            folder = start.folder
            if links:
                known, self._has = self._has, None  # until the copy is whole again
                try:
                    self._apply(folder, links)
                except WeightsError:
                    if known is None:
                        raise
                    held.close()
                    folder = held.enter_context(self.whole(weights, tensors))  # from the last whole version
                else:
                    folder, self._has = self.copy, weights.id
            require_tensors(folder, tensors)
            if start.checksums and not links:
                _check_tensors(WeightFiles(folder).items(), start.checksums, folder)
            yield folder

    def _links(self, weights: Weights, held: contextlib.ExitStack) -> list[_Link]:
        """From a version that is there whole (the copy, or one in the directory) to this one, all of them held."""
        links: list[_Link] = []
        while weights.id != self._has:
            folder, manifest = held.enter_context(verified(self.directory, weights))
            links.append(_Link(folder, manifest.get("tensors", {}), manifest.get("differences", {})))
            if (base := manifest.get("base")) is None:
                return links[::-1]
            weights = Weights(WeightsId(base["policy_version"], base["digest"]), base["manifest"])
        return [_Link(self.copy, {}, {}), *links[::-1]]

    def _apply(self, start: Path, links: Sequence[_Link]) -> None:
        """Make the copy the version of the last link."""
        source = WeightFiles(start)
        partial = self.copy.with_name(f".{self.copy.name}.next")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(mode=0o700, parents=True)
        changed = ((name, _changed(name, tensor, links)) for name, tensor in source.items())
        names = write_shards(changed, partial, BUCKET_BYTES)
        if missing := sorted(links[-1].checksums.keys() - names):
            raise WeightsError(f"{start}: {len(missing)} tensors are missing, {missing[0]} first")
        if not (partial / INDEX).exists():
            (partial / INDEX).write_text(to_json({"weight_map": dict.fromkeys(sorted(names), WEIGHTS)}))
        shutil.copyfile(links[-1].folder / "config.json", partial / "config.json")
        shutil.rmtree(self.copy, ignore_errors=True)
        partial.rename(self.copy)


@dataclass(frozen=True)
class _Link:
    """A version on the way from what a server has to what it is to have."""

    folder: Path
    checksums: Mapping[str, str]
    """Of its whole tensors."""
    differences: Mapping[str, Any]
    """Name -> file, first byte and number of bytes; empty for a whole version."""

    def difference(self, name: str, element_size: int, size: int) -> np.ndarray:
        """What a tensor differs in from the version before: uint8 [size]."""
        file, start, count = self.differences[name]
        with (self.folder / file).open("rb") as opened:
            opened.seek(start)
            return unpack(opened.read(count), element_size, size)


def _changed(name: str, tensor: torch.Tensor, links: Sequence[_Link]) -> torch.Tensor:
    """A tensor after all differences; what comes out is what the trainer had."""
    content = _bytes_of(tensor)  # the reader's own memory: it may be changed
    try:
        for link in links:
            content ^= link.difference(name, tensor.element_size(), len(content))
    except (KeyError, ValueError, OSError) as error:
        raise WeightsError(f"{link.folder}: no difference of {name} for this tensor ({error})") from None
    _check_tensors([(name, tensor)], links[-1].checksums, links[-1].folder)
    return tensor


def _check_tensors(tensors: Iterable[tuple[str, torch.Tensor]], checksums: Mapping[str, str], folder: Path) -> None:
    for name, tensor in tensors:
        if _checksum(_bytes_of(tensor)) != checksums.get(name):
            raise WeightsError(f"{folder}: {name} is not what the trainer had; taken with another version's bytes?")


def pack(changed: np.ndarray, element_size: int) -> bytes:
    """Bytes that are mostly zero, compressed: uint8 [n * element_size].

    Bytes of the same rank of their numbers stand together, as the high ones hardly ever differ.
    """
    planes = np.ascontiguousarray(changed.reshape(-1, element_size).T)
    return _codec().compress(planes, asbytes=True)


def unpack(content: bytes, element_size: int, size: int) -> np.ndarray:
    """The reverse of ``pack``: uint8 [size].

    Raises:
        ValueError, OSError: the content is of another size, or none of zstd's.
    """
    if not size:
        return np.zeros(0, np.uint8)
    planes = np.frombuffer(_codec().decompress(content, decompressed_size=size, asbytes=True), np.uint8)
    return np.ascontiguousarray(planes.reshape(element_size, -1).T).reshape(-1)


def _codec() -> Any:
    import pyarrow

    return pyarrow.Codec("zstd", compression_level=LEVEL)


def _bytes_of(tensor: torch.Tensor) -> np.ndarray:
    """A contiguous CPU tensor's memory: uint8 [bytes]."""
    return tensor.reshape(-1).view(torch.uint8).numpy() if tensor.numel() else np.zeros(0, np.uint8)


def _checksum(content: np.ndarray) -> str:
    return hashlib.sha256(content.data).hexdigest()
