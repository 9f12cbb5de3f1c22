"""Where an engine of TensorRT-LLM runs: its GPUs, the ranks that share them, the environment of its processes.

A colocated engine takes the GPUs of one model-parallel group of the learner (its tensor x pipeline ranks, all on one
node). The group's source rank owns it; the others take part in refits with the weights on their GPU, and receive the
completions. In a rollout server one process has the engine, and all its GPUs, for itself.
"""

from __future__ import annotations

import os
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from nemo_aapo.engines.base import OnFinish
from nemo_aapo.engines.elsewhere import Finished
from nemo_aapo.engines.trtllm.contract import ENVIRONMENT
from nemo_aapo.errors import RunError
from nemo_aapo.types import Completion

T = TypeVar("T")

BEAT_S = 2.0
"""The owner of an engine, at work, tells the other ranks so this often."""

FOREIGN_PREFIXES = ("SLURM_", "PMI", "OMPI", "TORCHELASTIC_", "TRTLLM_RAY_")  # PMI is PMIX too
FOREIGN_NAMES = (
    "RANK",
    "LOCAL_RANK",
    "GROUP_RANK",
    "ROLE_RANK",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "GROUP_WORLD_SIZE",
    "ROLE_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
    "CUDA_DEVICE_MAX_CONNECTIONS",
)
"""Environment variables of the learner's job: by which Slurm, MPI and torchrun tell its ranks where they stand, and the
one queue of launches that the learner's tensor parallelism wants."""


class Ranks(Protocol):
    """The ranks that one engine serves; all methods are collective over them."""

    owner: bool
    """True on the one rank that talks to the engine."""

    def broadcast(self, value: T) -> T:
        """The owner's object, on all ranks."""
        ...

    def gather(self, value: T) -> list[T]:
        """Every rank's object, in rank order, on the owner, which waits for all; an empty list elsewhere."""
        ...


class Alone:
    """One process that has the engine for itself."""

    owner = True

    def broadcast(self, value: T) -> T:
        return value

    def gather(self, value: T) -> list[T]:
        return [value]


class ModelParallelRanks:
    """The ranks of this model-parallel group of the learner."""

    def __init__(self) -> None:
        from nemo_aapo.distributed import parallel  # torch.distributed: the engine's own processes do without

        self._parallel = parallel
        self.owner = parallel.is_model_parallel_source()

    def broadcast(self, value: T) -> T:
        return self._parallel.broadcast_in_model_parallel(value)

    def gather(self, value: T) -> list[T]:
        return self._parallel.gather_in_model_parallel(value)


@dataclass(frozen=True)
class Beat:
    """What the owner tells the other ranks while they wait for it."""

    news: Finished
    """Completions that have ended since the last beat."""
    over: bool = False
    """True: the owner is done."""
    result: Any = None
    failure: str = ""
    """What went wrong on the owner; empty: nothing."""


class OwnerFailed(Exception):
    """An action of the owner failed, as its message says; on the owner itself its ``__cause__`` is the error."""


class OwnerActions:
    """Actions of the owner that the other ranks wait for, however long they take.

    A single broadcast of the result would end with the group's timeout, however well all goes: a share of long
    completions, or an engine's start, takes longer than any one answer may. So the owner says now and then that it is
    at work, and what has ended meanwhile.
    """

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self._news: Finished | None = None
        self._last_beat = 0.0

    def run(self, action: Callable[[], T], hear: OnFinish | None = None) -> T:
        """What ``action`` returned on the owner, on every rank. Collective.

        Args:
            hear: told on the other ranks of each completion soon after the owner's ``tell``.

        Raises:
            OwnerFailed: on every rank.
        """
        return self._lead(action) if self._ranks.owner else self._follow(hear)

    def tell(self, ended: tuple[int, int, Completion]) -> None:
        """Within ``action``: have the others hear of it with the next beat."""
        assert self._news is not None, "nobody listens"
        self._news.append(ended)

    def beat(self) -> None:
        """Say that the owner is at work, if it is and it is time to. Called often while it waits."""
        if self._news is not None and time.monotonic() - self._last_beat >= BEAT_S:
            news, self._news, self._last_beat = self._news, [], time.monotonic()
            self._ranks.broadcast(Beat(news))

    def _lead(self, action: Callable[[], T]) -> T:
        self._news, self._last_beat = [], time.monotonic()
        try:
            result = action()
        except Exception as error:
            self._end(failure=str(error) or repr(error))
            raise OwnerFailed(str(error) or repr(error)) from error
        self._end(result)
        return result

    def _end(self, result: object = None, failure: str = "") -> None:
        news, self._news = self._news or [], None
        self._ranks.broadcast(Beat(news, True, result, failure))

    def _follow(self, hear: OnFinish | None) -> Any:
        raised: Exception | None = None
        while True:
            beat: Beat = self._ranks.broadcast(NOTHING)
            if hear is not None and raised is None:
                try:
                    for ended in beat.news:
                        hear(*ended)
                except Exception as error:  # the owner goes on, and is heard to its end
                    raised = error
            if beat.over and raised is not None:
                raise raised
            if beat.failure:
                raise OwnerFailed(beat.failure)
            if beat.over:
                return beat.result


NOTHING = Beat([])
"""What a rank gives to a broadcast that it only hears."""


@dataclass(frozen=True)
class Gpu:
    """One GPU under the names that several processes know it by.

    Example: ``Gpu("node7", 3, "GPU-5e4a...", 0)``
    """

    host: str
    """Name of the node."""
    number: int
    """Its number on the node, as ``CUDA_VISIBLE_DEVICES`` counts."""
    uuid: str
    """``GPU-…``, as TensorRT-LLM names it in a refit."""
    device: int
    """Its number in the process that reports it: ``cuda:<device>``."""
    free_bytes: int = 0
    """Its memory that nobody had taken when it was looked at."""


def visible_gpu(device: int | None = None) -> Gpu:
    """The GPU that this process knows as ``cuda:<device>``; None: the one that it computes on.

    Raises:
        RunError: ``CUDA_VISIBLE_DEVICES`` doesn't count.
    """
    import torch

    device = torch.cuda.current_device() if device is None else device
    number, visible = device, os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible:
        entry = visible.split(",")[device].strip()
        if not entry.isdigit():
            raise RunError(f"CUDA_VISIBLE_DEVICES={visible}: TensorRT-LLM's Ray workers need numbers, not UUIDs")
        number = int(entry)
    uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
    return Gpu(socket.gethostname(), number, uuid, device, torch.cuda.mem_get_info(device)[0])


def check_gpus(gpus: Sequence[Gpu], tensor_parallel_size: int) -> None:
    """Refuse a set of GPUs that one engine can't run on.

    Raises:
        RunError: too many or too few, on several nodes, or one counted twice.
    """
    hosts = sorted({gpu.host for gpu in gpus})
    numbers = [gpu.number for gpu in gpus]
    if len(hosts) > 1:
        raise RunError(
            f"a model-parallel group spans the nodes {', '.join(hosts)}, but a TensorRT-LLM engine in the learner's "
            "GPUs needs them on one: lower the model's parallel sizes, or use rollout servers"
        )
    if len(set(numbers)) != len(numbers) or len({gpu.uuid for gpu in gpus}) != len(gpus):
        raise RunError(
            f"the ranks of a model-parallel group name their GPUs {numbers}: each rank must see all GPUs of its node "
            "under one numbering (start tasks without binding GPUs to them)"
        )
    if len(gpus) != tensor_parallel_size:
        raise RunError(f"an engine with tensor_parallel_size={tensor_parallel_size} was given {len(gpus)} GPUs")


@contextmanager
def engine_environment(gpus: Sequence[Gpu]) -> Iterator[None]:
    """Inside, ``os.environ`` is what the engine's processes must inherit; afterwards it is the learner's again.

    The variables of the contract stay: the library reads them for as long as it lives.

    Trap: Ray's workers, and MPI if the library starts it, take Slurm's, PMI's, PMIx's and Open MPI's variables for
    their own job. torchrun's would give all workers one rank.

    Trap: the library compiles kernels with headers that it finds by the command ``pip show tensorrt_llm`` (its
    compiler.cuh: getJitIncludeDirs), which must be the ``pip`` of this interpreter (NeMo-RL's TensorRT-LLM worker puts
    its folder first, too).
    """
    # No MPI; a Ray cluster of the engine's own, which knows its GPUs only, so that engines on one node don't meet;
    # and no parallel loading, which is made for whole checkpoints, while a refit loads parts (trap).
    os.environ.update(ENVIRONMENT)
    folders = [os.path.dirname(sys.executable), *os.environ.get("PATH", os.defpath).split(os.pathsep)]
    own = {
        "CUDA_VISIBLE_DEVICES": ",".join(str(gpu.number) for gpu in gpus),
        "PATH": os.pathsep.join(folders),
    }
    names = {*FOREIGN_NAMES, *own}
    before = {name: value for name, value in os.environ.items() if name.startswith(FOREIGN_PREFIXES) or name in names}
    for name in before:
        del os.environ[name]
    os.environ.update(own)
    try:
        yield
    finally:
        for name in own:
            del os.environ[name]
        os.environ.update(before)
