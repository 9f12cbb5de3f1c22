"""Checks that the ranks can reach each other, by all-reduces as in training: NCCL on GPUs, gloo on CPUs."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING

from nemo_aapo.doctor.checks.versions import has_gpu
from nemo_aapo.doctor.finding import Context, Finding
from nemo_aapo.errors import first_line

if TYPE_CHECKING:
    from torch.distributed import Store

WAIT_S = 60.0
"""Deadline for the last rank to come, and for each collective."""
ELEMENTS = 2**24
"""Numbers of an all-reduce: 64 MiB of float32, the size of a gradient bucket."""
REPEATS = 3


def all_reduce(context: Context, wait_s: float = WAIT_S) -> Finding:
    """Sum numbers of all ranks, and compare with the expected sum."""
    name, place = "all_reduce", context.place
    if place.world_size == 1:
        return Finding(name, "ok", "one rank, nobody to reach: start it by torchrun or srun to try the network")
    try:
        store = _meet(context, wait_s)
    except RuntimeError as error:
        where = f"{os.environ['MASTER_ADDR']}:{context.port}"
        remedy = "a firewall between the machines, or rank 0 had given up: see its line"
        return Finding(name, "failure", f"rank 0 can't be reached at {where}: {first_line(error)}", remedy)
    if missing := _missing(store, place.world_size, wait_s):
        remedy = "see what those ranks wrote; the deadline of training is trainer.distributed_timeout_s"
        return Finding(name, "failure", f"rank {', '.join(missing)} did not come within {wait_s:g} s", remedy)
    devices = {"nccl": f"cuda:{place.local_rank}", "gloo": "cpu"} if has_gpu() else {"gloo": "cpu"}
    try:
        found = _reduce(store, context, devices, wait_s)
    except RuntimeError as error:
        remedy = "set NCCL_DEBUG=INFO (NCCL_SOCKET_IFNAME, NCCL_IB_HCA) or GLOO_SOCKET_IFNAME to the right interface"
        return Finding(name, "failure", f"{' or '.join(devices)}: {first_line(error)}", remedy)
    expected = float(sum(range(1, place.world_size + 1)))
    wrong = [
        f"{backend}: sums lie in {sums}, not at {expected:g}" for backend, sums, _ in found if set(sums) != {expected}
    ]
    if wrong:
        remedy = "this network or its driver gives wrong numbers: don't train on it"
        return Finding(name, "failure", "; ".join(wrong), remedy)
    sent = 4 * ELEMENTS * 2 * (place.world_size - 1) / place.world_size / 1e9  # GB that each rank of a ring sends
    speeds = [f"{backend} {1e3 * seconds:.0f} ms ({sent / seconds:.1f} GB/s a rank)" for backend, _, seconds in found]
    return Finding(name, "ok", f"the sums of {place.world_size} ranks are right; 64 MiB: {', '.join(speeds)}")


def _meet(context: Context, wait_s: float) -> Store:
    """A store for this check alone, on rank 0's machine, however the ranks were started."""
    from torch.distributed import TCPStore

    place = context.place
    store = TCPStore(
        os.environ["MASTER_ADDR"],
        context.port,
        is_master=place.rank == 0,
        timeout=timedelta(seconds=wait_s),
        wait_for_workers=False,
    )
    store.set(f"here/{place.rank}", place.host)
    return store


def _missing(store: Store, world_size: int, wait_s: float) -> list[str]:
    """The ranks that did not come, which the errors of gloo and NCCL don't name."""
    end = time.monotonic() + wait_s
    missing: list[str] = []
    for rank in range(world_size):
        try:
            store.wait([f"here/{rank}"], timedelta(seconds=max(0.01, end - time.monotonic())))
        except RuntimeError:
            missing.append(str(rank))
    return missing


def _reduce(
    store: Store, context: Context, devices: dict[str, str], wait_s: float
) -> list[tuple[str, tuple[float, float], float]]:
    """Backend, lowest and highest sum, seconds of the fastest repeat.

    Args:
        devices: backend -> device of its tensors. On GPUs training uses both: gloo carries Python objects.
    """
    import torch
    import torch.distributed as dist

    place = context.place
    if "nccl" in devices:
        torch.cuda.set_device(place.local_rank)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if "nccl" in devices else "gloo",
        store=store,
        rank=place.rank,
        world_size=place.world_size,
        timeout=timedelta(seconds=wait_s),
    )
    found = []
    for backend, device in devices.items():
        seconds: list[float] = []
        for _ in range(REPEATS):
            values = torch.full((ELEMENTS,), float(place.rank + 1), device=device)
            with _timed(seconds, on_gpu=backend == "nccl"):
                dist.all_reduce(values)
        found.append((backend, (float(values.min()), float(values.max())), min(seconds)))
    dist.barrier()  # rank 0 serves the store: it must not leave before the others are done
    return found


@contextmanager
def _timed(seconds: list[float], on_gpu: bool) -> Iterator[None]:
    import torch

    wait = torch.cuda.synchronize if on_gpu else lambda: None
    wait()
    start = time.perf_counter()
    yield
    wait()
    seconds.append(time.perf_counter() - start)
