"""Ranks, their groups, and the few collectives of Python objects that the loop needs, named by what they mean.

The model-parallel group (tensor x pipeline ranks) holds one copy of the model; its ranks do everything alike. The
data-parallel group joins the ranks that hold the same part of the model: each copy generates completions of its own.
In training, neighbours in it may cut every sequence among them (context parallelism): together they take one share of
the optimizer batch. Objects cross only between ranks of one job (pickled by torch.distributed); weights never cross
this way.

Megatron cuts the ranks into groups (``mcore/groups.py``); this module only keeps them, so that what talks to other
ranks needs torch and no Megatron.
"""

from __future__ import annotations

import datetime
import os
import pickle
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist

from nemo_aapo.utils.job import check_rendezvous, rank_of_job

T = TypeVar("T")
BEAT_S = 2.0
"""A rank at work that others wait for tells them so this often."""


@dataclass(frozen=True, slots=True)
class Groups:
    """The groups that this rank belongs to. Within each, ranks are in the order of the job."""

    data: dist.ProcessGroup
    """The ranks that hold the same part of the model, over gloo: objects cross it without a GPU. Those of one
    ``context`` group lie next to one another."""
    model: dist.ProcessGroup
    """The ranks that hold one copy of the model together, tensor ranks next to one another."""
    tensor: dist.ProcessGroup
    """The ranks that hold one pipeline stage together."""
    pipeline: dist.ProcessGroup
    """The ranks that hold the same tensor slice of all stages, first stage first."""
    context: dist.ProcessGroup
    """Those of ``data`` that cut every sequence of a training pass among them."""
    expert: dist.ProcessGroup
    """The ranks that hold all experts of a stage together: tensor ranks first, then context, then data ranks."""


_groups: Groups | None = None


def join(timeout_s: float) -> None:
    """Join the job's ranks, as torchrun's environment describes them; without it, be the only one.

    Args:
        timeout_s: a collective that waits longer raises.
    """
    # Before CUDA starts: without it mcore's tensor-parallel layers don't overlap communication with products on GPUs up
    # to Hopper (tensor_parallel/layers.py warns). The processes of other engines on the GPUs don't inherit it.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    if dist.is_initialized():
        return
    check_rendezvous()
    backend, timeout = "cpu:gloo,cuda:nccl" if on_gpu else "gloo", datetime.timedelta(seconds=timeout_s)
    if "RANK" in os.environ:
        dist.init_process_group(backend, timeout=timeout)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)


def leave() -> None:
    """Leave the job's ranks and all groups."""
    use(None)
    if dist.is_initialized():
        dist.destroy_process_group()


def use(groups: Groups | None) -> None:
    """Keep these groups for the functions below; None: there are none any more."""
    global _groups
    _groups = groups


def groups() -> Groups:
    """The groups that this rank belongs to.

    Raises:
        RuntimeError: nobody has made them yet.
    """
    if _groups is None:
        raise RuntimeError("this process has no groups of ranks: call mcore.groups.initialize_model_parallel() first")
    return _groups


def rank() -> int:
    """This rank within the job."""
    return dist.get_rank() if dist.is_initialized() else rank_of_job()


def data_parallel_rank() -> int:
    """Which copy of the model this rank belongs to. Each rank of a context-parallel group has a copy of its own."""
    return dist.get_rank(groups().data)


def data_parallel_size() -> int:
    """Number of copies of the model."""
    return dist.get_world_size(groups().data)


def batch_parallel_rank() -> int:
    """Which share of an optimizer batch this rank trains on; the ranks of a context-parallel group have the same."""
    return data_parallel_rank() // context_parallel_size()


def batch_parallel_size() -> int:
    """Number of shares that an optimizer batch is distributed over."""
    return data_parallel_size() // context_parallel_size()


def tensor_parallel_rank() -> int:
    """Which slice of its pipeline stage this rank holds."""
    return dist.get_rank(groups().tensor)


def tensor_parallel_size() -> int:
    """Number of slices that each pipeline stage is cut into."""
    return dist.get_world_size(groups().tensor)


def pipeline_parallel_size() -> int:
    """Number of pipeline stages."""
    return dist.get_world_size(groups().pipeline)


def context_parallel_rank() -> int:
    """Which part of each sequence this rank takes in a training pass."""
    return dist.get_rank(groups().context)


def context_parallel_size() -> int:
    """Number of parts that each sequence is cut into in a training pass."""
    return dist.get_world_size(groups().context)


def expert_parallel_rank() -> int:
    """Which share of each layer's experts this rank holds."""
    return dist.get_rank(groups().expert)


def expert_parallel_size() -> int:
    """Number of ranks that the experts of a layer are distributed over."""
    return dist.get_world_size(groups().expert)


def is_first_stage() -> bool:
    """True on the ranks that hold the embedding."""
    return dist.get_rank(groups().pipeline) == 0


def is_last_stage() -> bool:
    """True on the ranks that hold the output layer."""
    return dist.get_rank(groups().pipeline) == pipeline_parallel_size() - 1


def rank_of_neighbour_stage(offset: int) -> int:
    """Rank within the job of the stage so many places behind this one (-1: the one before it), around the ring."""
    ranks = dist.get_process_group_ranks(groups().pipeline)
    return ranks[(dist.get_rank(groups().pipeline) + offset) % len(ranks)]


def is_model_parallel_source() -> bool:
    """True on the one rank of each model-parallel group that talks to the world (rewards, files)."""
    return dist.get_rank(groups().model) == 0


def broadcast_in_model_parallel(value: T) -> T:
    """The source rank's object, on all ranks of its model-parallel group."""
    group = groups().model
    if dist.get_world_size(group) == 1:
        return value
    box: list[Any] = [value if is_model_parallel_source() else None]
    dist.broadcast_object_list(box, src=dist.get_process_group_ranks(group)[0], group=group)
    return box[0]


def broadcast_when_done(action: Callable[[], T]) -> T:
    """What ``action`` returns on the source rank, on all ranks of its model-parallel group, however long it takes.

    A single broadcast would end with the group's timeout. So the source says now and then that it is at work; where it
    has others, ``action`` runs in a thread of its own.
    """
    if dist.get_world_size(groups().model) == 1:
        return action()
    with ThreadPoolExecutor(1) as thread:
        running = thread.submit(action) if is_model_parallel_source() else None
        while not broadcast_in_model_parallel(running is not None and bool(wait([running], BEAT_S).done)):
            pass
        return broadcast_in_model_parallel(cast(T, running.result() if running is not None else None))


def gather_in_model_parallel(value: T) -> list[T]:
    """Every rank's object of this model-parallel group, in rank order, on its source rank; empty on the others."""
    group = groups().model
    size = dist.get_world_size(group)
    if size == 1:
        return [value]
    gathered: list[Any] | None = [None] * size if is_model_parallel_source() else None
    dist.gather_object(value, gathered, dst=dist.get_process_group_ranks(group)[0], group=group)
    return gathered or []


def broadcast_from_last_stage(value: T) -> T:
    """The last pipeline stage's object, on all stages."""
    group = groups().pipeline
    if dist.get_world_size(group) == 1:
        return value
    box: list[Any] = [value if is_last_stage() else None]
    dist.broadcast_object_list(box, src=dist.get_process_group_ranks(group)[-1], group=group)
    return box[0]


def broadcast_from_first_rank(value: T) -> T:
    """Rank 0's object, on all ranks of the job."""
    if dist.get_world_size() == 1:
        return value
    box: list[Any] = [value if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def gather_on_first_rank(value: T) -> list[T]:
    """Every rank's object, in rank order, on rank 0; empty on the others."""
    size = dist.get_world_size()
    if size == 1:
        return [value]
    gathered: list[Any] | None = [None] * size if dist.get_rank() == 0 else None
    dist.gather_object(value, gathered, dst=0)
    return gathered or []


def gather_data_parallel(value: T) -> list[T]:
    """Every data-parallel rank's object, in rank order, on all of them. For small objects: numbers, not sequences."""
    return _all_gather(value, groups().data)


def gather_context_parallel(value: T) -> list[T]:
    """Every context-parallel rank's object, in rank order, on all of them."""
    return _all_gather(value, groups().context)


def add_over_context(values: torch.Tensor) -> torch.Tensor:
    """The sum over the context-parallel ranks, with its gradient: each rank's result counts in the loss of its own."""
    return _AddOverContext.apply(values)  # type: ignore[no-untyped-call]


class _AddOverContext(torch.autograd.Function):
    """An all-reduce forward and backward: what a rank adds changes the loss of every rank."""

    @staticmethod
    def forward(ctx: Any, values: torch.Tensor) -> torch.Tensor:
        total = values.clone()
        dist.all_reduce(total, group=groups().context)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        total = gradient.clone()
        dist.all_reduce(total, group=groups().context)
        return total


def _all_gather(value: T, group: dist.ProcessGroup) -> list[T]:
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
    group = groups().data
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


def any_rank(*flags: bool) -> list[bool]:
    """Each true on all ranks if it is true on one of them (a stop signal, a failed save)."""
    if dist.get_world_size() == 1:
        return list(flags)
    box = torch.tensor(flags, dtype=torch.uint8)
    dist.all_reduce(box, op=dist.ReduceOp.MAX)
    return [bool(flag) for flag in box]


def sum_over_ranks(*numbers: float) -> list[float]:
    """The sum of each over all ranks, on all of them."""
    box = torch.tensor(numbers, dtype=torch.float64)
    if dist.get_world_size() > 1:
        dist.all_reduce(box)
    return box.tolist()


def barrier() -> None:
    """Wait for all ranks."""
    if dist.get_world_size() > 1:
        dist.barrier()
