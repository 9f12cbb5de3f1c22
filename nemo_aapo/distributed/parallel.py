"""Process groups, and the few collectives of Python objects that the loop needs, named by what they mean.

The model-parallel group (tensor x pipeline ranks) holds one copy of the model; its ranks do everything alike. The
data-parallel group joins the ranks that hold the same part of the model. Objects cross only between ranks of one job
(pickled by torch.distributed); weights never cross this way.
"""

from __future__ import annotations

import datetime
import os
import pickle
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from nemo_aapo.errors import RunError
from nemo_aapo.utils.libraries import import_megatron_core

import_megatron_core()
from megatron.core import parallel_state  # noqa: E402

from nemo_aapo.errors import LostRankError  # noqa: E402

T = TypeVar("T")


def initialize(
    *, tensor_model_parallel_size: int, pipeline_model_parallel_size: int, seed: int, timeout_s: float
) -> None:
    """Join the job's ranks (torchrun's environment; alone without it) and cut them into Megatron's groups.

    Args:
        seed: of mcore's RNG tracker; the loop itself draws nothing from global generators.
        timeout_s: a collective that waits longer raises.
    """
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    timeout = datetime.timedelta(seconds=timeout_s)
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"
        if "RANK" in os.environ:
            dist.init_process_group(backend, timeout=timeout)
        else:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=tensor_model_parallel_size,
        pipeline_model_parallel_size=pipeline_model_parallel_size,
        distributed_timeout_minutes=max(1, int(timeout_s / 60)),
    )
    model_parallel_cuda_manual_seed(seed, force_reset_rng=True)


def shutdown() -> None:
    """Leave all groups."""
    parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    """This rank within the job."""
    return dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", "0"))


def data_parallel_rank() -> int:
    """Which copy of the model this rank belongs to."""
    return parallel_state.get_data_parallel_rank()


def data_parallel_size() -> int:
    """Number of copies of the model."""
    return parallel_state.get_data_parallel_world_size()


def is_model_parallel_source() -> bool:
    """True on the one rank of each model-parallel group that talks to the world (rewards, files)."""
    group = parallel_state.get_model_parallel_group()
    return dist.get_rank(group) == 0


def broadcast_in_model_parallel(value: T) -> T:
    """The source rank's object, on all ranks of its model-parallel group."""
    group = parallel_state.get_model_parallel_group()
    if dist.get_world_size(group) == 1:
        return value
    box = [value if is_model_parallel_source() else None]
    dist.broadcast_object_list(box, src=dist.get_process_group_ranks(group)[0], group=group)
    return box[0]


def gather_in_model_parallel(value: T) -> list[T]:
    """Every rank's object of this model-parallel group, in rank order, on its source rank; empty on the others."""
    group = parallel_state.get_model_parallel_group()
    size = dist.get_world_size(group)
    if size == 1:
        return [value]
    gathered: list[Any] | None = [None] * size if is_model_parallel_source() else None
    dist.gather_object(value, gathered, dst=dist.get_process_group_ranks(group)[0], group=group)
    return gathered or []


def broadcast_from_last_stage(value: T) -> T:
    """The last pipeline stage's object, on all stages."""
    group = parallel_state.get_pipeline_model_parallel_group()
    if dist.get_world_size(group) == 1:
        return value
    box = [value if parallel_state.is_pipeline_last_stage() else None]
    dist.broadcast_object_list(box, src=parallel_state.get_pipeline_model_parallel_last_rank(), group=group)
    return box[0]


def broadcast_from_first_rank(value: T) -> T:
    """Rank 0's object, on all ranks of the job."""
    if dist.get_world_size() == 1:
        return value
    box = [value if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def on_first_rank(action: Callable[[], T]) -> T:
    """Rank 0 acts; all ranks get its result, or its error as ``agree`` raises it.

    For checkpoints, ``agreement.on_first_rank`` makes every error a ``CheckpointError``.
    """
    return broadcast_from_first_rank(agree(lambda: action() if rank() == 0 else None))


def gather_data_parallel(value: T) -> list[T]:
    """Every data-parallel rank's object, in rank order, on all of them. For small objects: numbers, not sequences."""
    group = parallel_state.get_data_parallel_group_gloo()
    size = dist.get_world_size(group)
    if size == 1:
        return [value]
    gathered: list[Any] = [None] * size
    dist.all_gather_object(gathered, value, group=group)
    return gathered


def exchange_data_parallel(outgoing: Sequence[list[T]]) -> list[T]:
    """Send ``outgoing[d]`` to data-parallel rank d; returns what came in, in the order of the senders.

    Point to point in effect: no rank ever holds more than what it sends and what it keeps.
    """
    group = parallel_state.get_data_parallel_group_gloo()
    size = dist.get_world_size(group)
    if size == 1:
        return list(outgoing[0])
    packed = [torch.frombuffer(bytearray(pickle.dumps(items)), dtype=torch.uint8) for items in outgoing]
    sizes_out = torch.tensor([len(part) for part in packed])
    sizes_in = torch.empty_like(sizes_out)
    dist.all_to_all_single(sizes_in, sizes_out, group=group)
    received = torch.empty(int(sizes_in.sum()), dtype=torch.uint8)
    dist.all_to_all_single(received, torch.cat(packed), sizes_in.tolist(), sizes_out.tolist(), group=group)
    items: list[T] = []
    for part in received.split(sizes_in.tolist()):
        items += pickle.loads(part.numpy().tobytes())
    return items


def agree(action: Callable[[], T]) -> T:
    """Run something on every rank; if it raises on one of them, raise on all of them instead of waiting for it.

    Raises:
        Whatever it raised here; on ranks where it went well, the first failing rank's message as the same class.
    """
    failure: BaseException | None = None
    result = None
    try:
        result = action()
    except Exception as error:
        failure = error
    if dist.get_world_size() > 1:
        found: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(found, None if failure is None else (type(failure), str(failure)))
        others = [entry for entry in found if entry is not None]
        if failure is None and others:
            kind, message = others[0]
            failure = kind(message) if issubclass(kind, ValueError | RunError) else RuntimeError(message)
    if failure is not None:
        raise failure
    return result


@contextmanager
def lost_ranks_reported(doing: Callable[[], str]) -> Iterator[None]:
    """Inside, a broken connection between ranks becomes an error that says so: gloo's and NCCL's name only sockets.

    Args:
        doing: what this rank is at, asked for once a connection broke.

    Raises:
        LostRankError: which of the others it was is not known here: what started the ranks sees it and says it.
    """
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and "gloo/transport" not in str(error):  # gloo's have no class
            raise
        reason = re.sub(r"^\[\S+\] ", "", str(error).splitlines()[0]).partition(". ")[0]  # without the place in gloo
        message = (
            f"rank {dist.get_rank()} of {dist.get_world_size()} ended at {doing()}: another rank is gone or did not "
            f"come within trainer.distributed_timeout_s. The rank that ended first says why ({reason})"
        )
        print(message, file=sys.stderr, flush=True)  # now: a launcher's SIGTERM may end this rank before its traceback
        raise LostRankError(message) from error


def any_rank(*flags: bool) -> list[bool]:
    """Each true on all ranks if it is true on one of them (a stop signal, a failed save)."""
    if dist.get_world_size() == 1:
        return list(flags)
    box = torch.tensor(flags, dtype=torch.uint8)
    dist.all_reduce(box, op=dist.ReduceOp.MAX)
    return [bool(flag) for flag in box]


def barrier() -> None:
    """Wait for all ranks."""
    if dist.get_world_size() > 1:
        dist.barrier()
