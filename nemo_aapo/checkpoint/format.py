"""Megatron-core's checkpoint format ``torch_dist``, written and read so that ranks fail together and no code is run.

The files are those of ``megatron.core.dist_checkpointing``, which reads them too; the way there differs.

Writing: mcore forks a process for each file and waits for it without a deadline, and lets rank 0 fail alone (on
``common.pt``) while the others wait in a collective; its background mode forks too, which threads (gloo's, a server's)
do not survive, and does not copy what lies in the host's memory already. Here torch's distributed checkpoint writer
works in the rank's own process, in steps that each tell all ranks of a failure on one, on a snapshot that training can
leave behind.

Reading: a checkpoint may come from anywhere, and mcore's way unpickles two parts of it without limits: ``.metadata``,
and objects that were saved in shards. Here the first is read with a list of the classes it may name, and all else with
``weights_only=True``. Both small files are read by one rank for all.
"""

from __future__ import annotations

import copy
import io
import os
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.dict_utils import merge, nested_values
from megatron.core.dist_checkpointing.exchange_utils import determine_main_replica_uniform_distribution
from megatron.core.dist_checkpointing.mapping import ShardedStateDict, ShardedTensor, StateDict, apply_factory_merges
from megatron.core.dist_checkpointing.state_dict_utils import load_preprocess, save_preprocess
from megatron.core.dist_checkpointing.strategies import torch as mcore_torch
from megatron.core.dist_checkpointing.strategies.common import COMMON_STATE_FNAME
from megatron.core.dist_checkpointing.strategies.fully_parallel import (
    distribute_main_replicas_with_precomputed_distribution,
)
from megatron.core.dist_checkpointing.utils import extract_sharded_base, force_all_tensors_to_non_fp8
from torch.distributed.checkpoint import metadata as dcp_metadata
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import _StorageInfo

from nemo_aapo.errors import CheckpointError, first_line

METADATA_CLASSES = {
    (kind.__module__, kind.__name__): kind
    for kind in (
        dcp_metadata.Metadata,
        dcp_metadata.MetadataIndex,
        dcp_metadata.TensorStorageMetadata,
        dcp_metadata.BytesStorageMetadata,
        dcp_metadata.ChunkStorageMetadata,
        dcp_metadata.TensorProperties,
        dcp_metadata.StorageMeta,
        dcp_metadata._MEM_FORMAT_ENCODING,
        _StorageInfo,
        torch.Size,
        torch.serialization._get_layout,
    )
}
"""All that ``.metadata`` may name, besides torch's dtypes."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """This rank's shard of a state, ready to be written."""

    shards: dict[str, Any]
    """What this rank writes of each tensor and object, as torch's checkpoint planner takes them."""
    common: StateDict
    """What is the same on all ranks; rank 0 writes it."""


def snapshot(state: ShardedStateDict, replicas: dist.ProcessGroup, *, copied: bool) -> Snapshot:
    """Decide who writes what. Collective.

    Args:
        state: as ``MegatronPolicy.sharded_state_dict`` returns it.
        replicas: the ranks that hold the same shards (the data-parallel group); they divide the work of writing them.
        copied: copy this rank's shard to the host's memory, so that training may go on while it is written.
    """
    # torch's planner checks that the shards cover every tensor once, so mcore need not exchange them for that
    sharded, common = save_preprocess(state, validate_access_integrity=False)
    distribution = determine_main_replica_uniform_distribution(sharded, replicas)
    distribute_main_replicas_with_precomputed_distribution(sharded, replicas, distribution)
    by_key, _, _ = mcore_torch._replace_state_dict_keys_with_sharded_keys(sharded, keep_only_main_replica=True)
    if copied:
        for shard in (shard for shards in by_key.values() for shard in shards):
            shard.data = _copy(shard.data)
        common = _copy(common)
    return Snapshot(mcore_torch.mcore_to_pyt_state_dict(by_key), common)


def _copy(data: Any) -> Any:
    """The same on the host, sharing no memory with it."""
    if isinstance(data, torch.Tensor):
        return data.detach().to("cpu", copy=True)
    return copy.deepcopy(data)


def write(content: Snapshot, directory: Path, group: dist.ProcessGroup | None = None) -> None:
    """Write a snapshot. Collective; ``directory`` exists and is empty. Files are not yet fsynced.

    Args:
        content: of this rank.
        directory: each rank writes one file there, rank 0 three more.
        group: all ranks, in a group that no other thread uses at the time; None: the default one.

    Raises:
        CheckpointError: on all ranks, if it failed on one.
    """
    planner = mcore_torch.MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False)
    writer = _Writer(directory, content.common)
    with _failures_of_ranks():
        dcp.save(content.shards, storage_writer=writer, planner=planner, process_group=group)


@dataclass(frozen=True, slots=True)
class Header:
    """What a checkpoint holds besides its shards."""

    metadata: dcp.Metadata
    """Which tensors there are, and where their shards lie (``.metadata``)."""
    common: StateDict
    """Optimizer groups, scheduler, counters (``common.pt``)."""


def read_header(directory: Path) -> Header:
    """Read the small files. Not collective: one rank reads, and hands the header to the others.

    Raises:
        CheckpointError: a pickle names something that may run code (nothing was run), or a file elsewhere.
    """
    with open(directory / ".metadata", "rb") as file:
        metadata = _MetadataUnpickler(file).load()
    for info in metadata.storage_data.values():
        if os.path.basename(info.relative_path) != info.relative_path:
            raise CheckpointError(f"{file.name} names a file outside of the checkpoint: {info.relative_path}")
    with open(directory / COMMON_STATE_FNAME, "rb") as file:
        return Header(metadata, _load_plain_data(file, file.name))


def weights(header: Header) -> dict[str, dcp_metadata.TensorStorageMetadata]:
    """The model's tensors by name, with shape and dtype."""
    return {name: entry for name, entry in _tensors(header) if not name.startswith("optimizer.")}


def optimizer_tensors(header: Header) -> dict[str, dcp_metadata.TensorStorageMetadata]:
    """The optimizer's tensors by name, with shape and dtype."""
    return {name: entry for name, entry in _tensors(header) if name.startswith("optimizer.")}


def _tensors(header: Header) -> Iterator[tuple[str, dcp_metadata.TensorStorageMetadata]]:
    for name, entry in header.metadata.state_dict_metadata.items():
        if isinstance(entry, dcp_metadata.TensorStorageMetadata):  # not the small objects
            yield name, entry


def read(state: ShardedStateDict, directory: Path, header: Header) -> StateDict:
    """Read a checkpoint into the layout of ``state``, whatever layout wrote it. Collective.

    Args:
        state: from ``MegatronPolicy.sharded_state_dict(is_loading=True)``; its tensors are overwritten.
        directory: of the checkpoint.
        header: what ``read_header`` returned for it; its ``common`` becomes the result.

    Returns:
        For ``MegatronPolicy.load_state_dict``.

    Raises:
        CheckpointError: on all ranks, if it failed on one; also for objects that may run code.
    """
    force_all_tensors_to_non_fp8(state)
    parts, own, factories = load_preprocess(state)
    loaded = merge(header.common, own)
    shards, _ = extract_sharded_base(parts)
    with _failures_of_ranks():
        merge(loaded, _read_shards(shards, directory, header.metadata))
    return apply_factory_merges(loaded, factories)


def _read_shards(shards: ShardedStateDict, directory: Path, metadata: dcp.Metadata) -> StateDict:
    """What lies in the ranks' files, in the form of ``shards``. Collective."""
    tensors = [leaf for leaf in nested_values(shards) if isinstance(leaf, ShardedTensor)]
    planner = _Planner(
        flatten_state_dict=False,  # it is flat
        flatten_sharded_tensors=False,
        shapes_validation_sharded_tensors=[leaf for leaf in tensors if not leaf.allow_shape_mismatch],
        allow_shape_mismatch_sharded_tensors={leaf.key: leaf for leaf in tensors if leaf.allow_shape_mismatch},
    )
    by_key, paths, names = mcore_torch._replace_state_dict_keys_with_sharded_keys(shards)
    flat = mcore_torch.mcore_to_pyt_state_dict(by_key, is_loading=True)
    dcp.load(flat, storage_reader=_Reader(str(directory), metadata), planner=planner)
    read = {key: mcore_torch._unwrap_pyt_sharded_tensor(value) for key, value in flat.items()}
    nested = mcore_torch._replace_sharded_keys_with_state_dict_keys(read, paths, names)
    mcore_torch._restore_dict_types(nested, shards)
    return nested


class _Writer(dcp.FileSystemWriter):
    """One file per rank, and rank 0's small files in the last step, which torch guards for all ranks."""

    def __init__(self, directory: Path, common: StateDict) -> None:
        super().__init__(directory, sync_files=False)
        self._common = common

    def write_data(self, plan: dcp.SavePlan, planner: dcp.SavePlanner) -> torch.futures.Future:
        with _disk_errors():
            return super().write_data(plan, planner)

    def finish(self, metadata: dcp.Metadata, results: list[list[Any]]) -> None:
        with _disk_errors():
            super().finish(metadata, results)
            with open(self.path / COMMON_STATE_FNAME, "wb") as file:
                torch.save(self._common, file)
            save_config(CheckpointingConfig("torch_dist", 1), str(self.path))

    def storage_meta(self) -> None:
        """Nothing: it would record the temporary directory and a random number."""


class _Reader(dcp.FileSystemReader):
    """Reads shards by metadata that was read already."""

    def __init__(self, directory: str, metadata: dcp.Metadata) -> None:
        super().__init__(directory)
        self._metadata = metadata

    def read_metadata(self) -> dcp.Metadata:
        return self._metadata


class _Planner(mcore_torch.MCoreLoadPlanner):
    """Reads the objects that were saved in shards as plain data."""

    def load_bytes(self, read_item: dcp.planner.ReadItem, value: io.BytesIO) -> None:
        name = read_item.dest_index.fqn
        self.state_dict[name] = _load_plain_data(value, name)


class _MetadataUnpickler(pickle.Unpickler):
    """Admits ``METADATA_CLASSES`` and torch's dtypes."""

    def __init__(self, file: BinaryIO) -> None:
        super().__init__(file)
        self._path = file.name

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in METADATA_CLASSES:
            return METADATA_CLASSES[module, name]
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        raise CheckpointError(f"{self._path} holds {module}.{name}, which may run code, and was not loaded")


def _load_plain_data(file: BinaryIO, name: str) -> Any:
    """Tensors, numbers, strings and their containers; nothing else is loaded."""
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        file.seek(0)
        found = ", ".join(torch.serialization.get_unsafe_globals_in_checkpoint(file)) or "no readable data"
        raise CheckpointError(f"{name} holds {found}, which may run code, and was not loaded") from error


@contextmanager
def _failures_of_ranks() -> Iterator[None]:
    """torch raises the same ``CheckpointException`` on all ranks: say in one line a rank what went wrong."""
    try:
        yield
    except CheckpointException as error:
        failures = sorted(error.failures.items())
        said = (f"rank {rank}: {type(cause).__name__}: {first_line(cause)}" for rank, (cause, _) in failures)
        raise CheckpointError("; ".join(said)) from error


@contextmanager
def _disk_errors() -> Iterator[None]:
    """``torch.save`` hides a full disk behind an error about its zip file: bring the first one back."""
    try:
        yield
    except RuntimeError as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, OSError):
            cause = cause.__context__
        raise cause or error from None
