"""Collectives as spans, whoever calls them by whatever name: all of them go through the methods of a process group.

A call that returns at once is followed by a wait, which is a span of its own: on gloo most of the time is there. NCCL's
collectives run on the GPU, and what is seen is how long the host took to launch them.
"""

from __future__ import annotations

import functools
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from nemo_aapo.distributed import parallel
from nemo_aapo.trace import spans

METHODS = {
    "allreduce": "all_reduce",
    "allreduce_coalesced": "all_reduce",
    "allgather": "all_gather",
    "_allgather_base": "all_gather",
    "all_gather_single": "all_gather",
    "all_gather_single_coalesced": "all_gather",
    "allgather_coalesced": "all_gather",
    "allgather_into_tensor_coalesced": "all_gather",
    "reduce_scatter": "reduce_scatter",
    "_reduce_scatter_base": "reduce_scatter",
    "reduce_scatter_single": "reduce_scatter",
    "reduce_scatter_single_coalesced": "reduce_scatter",
    "reduce_scatter_tensor_coalesced": "reduce_scatter",
    "all_to_all_single": "all_to_all",
    "alltoall": "all_to_all",
    "alltoall_base": "all_to_all",
    "broadcast": "broadcast",
    "reduce": "reduce",
    "gather": "gather",
    "scatter": "scatter",
    "send": "send",
    "recv": "recv",
    "recv_anysource": "recv",
    "barrier": "barrier",
}
"""Methods of ``ProcessGroup``, of which a release of torch has some, and the names that people know."""


@contextmanager
def recorded() -> Iterator[None]:
    """Inside, collectives of this process and the waits for them are spans."""
    names: weakref.WeakKeyDictionary[Any, str] = weakref.WeakKeyDictionary()
    # as the classes hold them: what getattr gives of a method in C++ would not be bound once it is set again
    there = vars(dist.ProcessGroup)
    originals: list[tuple[type, str, Any]] = [
        (dist.ProcessGroup, method, there[method]) for method in METHODS if method in there
    ]
    originals.append((dist.Work, "wait", vars(dist.Work)["wait"]))
    for owner, method, _ in originals:
        name, call = METHODS.get(method), getattr(owner, method)
        setattr(owner, method, _waiting(call, names) if name is None else _called(call, name, names))
    try:
        yield
    finally:
        for owner, method, original in originals:
            setattr(owner, method, original)


def _called(original: Callable[..., Any], name: str, names: Any) -> Callable[..., Any]:
    @functools.wraps(original)
    def call(group: dist.ProcessGroup, *args: Any, **options: Any) -> Any:
        start = time.perf_counter_ns()
        work = original(group, *args, **options)
        if spans.recorder is not None:
            facts = {"group": _name_of(group), "ranks": group.size(), "bytes": _bytes_of(args[:1])}
            spans.recorder.add(name, start, time.perf_counter_ns(), "collective", facts=facts)
            if work is not None:
                names[work] = name
        return work

    return call


def _waiting(original: Callable[..., Any], names: Any) -> Callable[..., Any]:
    @functools.wraps(original)
    def wait(work: dist.Work, *args: Any, **options: Any) -> Any:
        start = time.perf_counter_ns()
        done = original(work, *args, **options)
        if spans.recorder is not None:
            spans.recorder.add(f"wait for {names.get(work, 'work')}", start, time.perf_counter_ns(), "wait")
        return done

    return wait


def _name_of(group: dist.ProcessGroup) -> str:
    """``tensor``, ``pipeline``, ... of the groups that this rank belongs to; empty for one that Megatron made besides.

    Several of them may be the same ranks; each is an object of its own.
    """
    own = parallel.groups()
    names = ("tensor", "pipeline", "data", "model", "context", "expert")
    return next((name for name in names if getattr(own, name) is group), "")


def _bytes_of(value: object) -> int:
    """Of the tensors that a method is given first: those that are written, or those that are sent."""
    if isinstance(value, torch.Tensor):
        return value.numel() * value.element_size()
    return sum(map(_bytes_of, value)) if isinstance(value, list | tuple) else 0
