"""Where the ranks of the trainer and those of one server meet: a store, what each holds, and a process group of both.

Each server has a group of its own with the trainer's ranks. So one that dies breaks its own group alone: the others
have their weights, and it gets a new group once it is back. Gloo on CPUs, NCCL on GPUs.

    store, by trainer rank 0      senders/RANK             the boxes of a rank of the trainer
                                  MEETING/receivers/RANK   those of a rank of the server
                                  MEETING/failed           why the trainer does not come any more
"""

from __future__ import annotations

import contextlib
import json
import socket
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from nemo_aapo.engines.collective.plan import Box, Move, Rendezvous, common, plan, within
from nemo_aapo.errors import ServerError
from nemo_aapo.mcore.state import WeightPart

POLL_S = 0.01
"""Pause between two looks into the store."""
WINDOW_BYTES = 256 * 2**20
"""So much is under way at a time; parts with gaps are copied meanwhile."""
CONNECT_S = 30.0
"""Ranks that have all said that they are there are connected within this."""


@dataclass
class Meeting:
    """The trainer's ranks and those of one server, connected."""

    group: Any
    """A ``ProcessGroupGloo`` or ``ProcessGroupNCCL`` of its own: the trainer's ranks first."""
    moves: list[Move]
    """What all ranks send, in the order in which they do."""
    senders: int
    """Ranks of the trainer."""
    timeout_s: float
    """The longest that a move is waited for."""

    def exchange(
        self, rank: int, parts: Sequence[WeightPart], each: Callable[[WeightPart], None] = lambda part: None
    ) -> int:
        """This rank's part in all moves: what it sends is read from ``parts``, what it receives is written there.

        All ranks take the moves in one order, and wait for the oldest: nobody waits in a circle.

        Args:
            each: told of what each move has filled or read, while those after it are under way.

        Returns:
            Bytes that it sent or received.
        """
        under_way, waiting, total = deque[_Transfer](), 0, 0
        for tag, peer, part in self._own(rank, parts):
            under_way.append(_Transfer.begin(self.group, rank < self.senders, part, peer, tag))
            size = part.tensor.nbytes
            total, waiting = total + size, waiting + size
            while waiting > WINDOW_BYTES:
                waiting -= under_way[0].part.tensor.nbytes
                each(under_way.popleft().end(self.timeout_s))
        while under_way:
            each(under_way.popleft().end(self.timeout_s))
        return total

    def _own(self, rank: int, parts: Sequence[WeightPart]) -> Iterator[tuple[int, int, WeightPart]]:
        """Number, rank at the other end, and what is moved, of each move that a rank has a part in."""
        held: dict[str, list[tuple[Box, WeightPart]]] = defaultdict(list)
        for box, part in zip(boxes_of(parts), parts, strict=True):
            held[box.key].append((box, part))
        for tag, move in enumerate(self.moves):
            receiver = self.senders + move.receiver
            if rank in (move.sender, receiver):
                box, whole = next(item for item in held[move.box.key] if common(item[0], move.box) == move.box)
                moved = replace(whole, start=move.box.start, tensor=whole.tensor[within(move.box, box)])
                yield tag, receiver if rank == move.sender else move.sender, moved

    def close(self) -> None:
        """End the connections; what still waits on them fails."""
        with contextlib.suppress(RuntimeError):
            self.group.abort()


@dataclass
class _Transfer:
    """One move under way."""

    part: WeightPart
    """The model's own memory, perhaps with gaps."""
    whole: torch.Tensor
    """What is sent or received: the same, or a copy without gaps."""
    work: Any
    sends: bool

    @classmethod
    def begin(cls, group: Any, sends: bool, part: WeightPart, peer: int, tag: int) -> _Transfer:
        own = part.tensor
        whole = own.contiguous() if sends or own.is_contiguous() else torch.empty_like(own).contiguous()
        work = (group.send if sends else group.recv)([whole], peer, tag)
        return cls(part, whole, work, sends)

    def end(self, timeout_s: float) -> WeightPart:
        """Wait for it; what was moved."""
        if self.whole.is_cuda:  # NCCL's wait() returns at once, and its own deadline ends the process
            deadline = time.monotonic() + timeout_s
            while not self.work.is_completed():
                if time.monotonic() > deadline:
                    raise RuntimeError(f"nothing came for {timeout_s:g} s")
                time.sleep(POLL_S)
        self.work.wait()
        if not self.sends and self.whole is not self.part.tensor:
            self.part.tensor.copy_(self.whole)
        return self.part


def boxes_of(parts: Sequence[WeightPart]) -> list[Box]:
    """What the other side is told of a rank's parts."""
    return [Box(p.key, tuple(p.start), tuple(p.tensor.shape), str(p.tensor.dtype).rpartition(".")[2]) for p in parts]


def meet(
    store: dist.Store,
    meeting: Rendezvous,
    *,
    rank: int,
    boxes: Sequence[Box],
    device: torch.device,
    server: int,
    timeout_s: float,
) -> Meeting:
    """Wait for all ranks of both sides, and connect to them.

    Args:
        rank: this one's; those of the server follow the trainer's.
        boxes: what it holds; a rank of the trainer has told the others already.
        device: where its weights are.
        server: number of the server.

    Raises:
        ServerError: not all came in time, or the other side said why it does not come.
        WeightsError: the two sides' models do not fit.
    """
    first, size = meeting.senders, meeting.senders + meeting.receivers
    if rank >= first:
        store.set(f"{meeting.name}/receivers/{rank - first}", packed(boxes))
    deadline = time.monotonic() + timeout_s
    names = [f"senders/{r}" for r in range(first)] + [f"{meeting.name}/receivers/{r}" for r in range(size - first)]
    held = [_unpacked(_awaited(store, meeting.name, name, deadline)) for name in names]
    moves = plan(held[:first], held[first:], server)
    group = new_group(dist.PrefixStore(f"{meeting.name}/group", store), rank, size, device, timeout_s)
    return Meeting(group, moves, first, timeout_s)


def new_group(store: dist.Store, rank: int, size: int, device: torch.device, timeout_s: float) -> Any:
    """A process group beside that of the job, whose operations end within ``timeout_s``.

    Raises:
        ServerError: the others can't be reached.
    """
    store.set_timeout(timedelta(seconds=min(CONNECT_S, timeout_s)))
    try:
        if device.type == "cuda":
            options = dist.ProcessGroupNCCL.Options()
            options._timeout = timedelta(seconds=2 * timeout_s)  # ``_Transfer.end`` gives up before, and nothing dies
            return dist.ProcessGroupNCCL(store, rank, size, options)
        return dist.ProcessGroupGloo(store, rank, size, timedelta(seconds=timeout_s))
    except RuntimeError as error:
        raise ServerError(f"the ranks could not be connected ({_first(error)})") from None


@contextlib.contextmanager
def failures_named(doing: str) -> Iterator[None]:
    """Inside, a broken connection or a timeout of a process group is a ``ServerError``."""
    try:
        yield
    except RuntimeError as error:
        raise ServerError(f"{doing} failed ({_first(error)})") from None


def new_store(host: str, timeout_s: float) -> tuple[dist.Store, str]:
    """A store that others can join, and its address; it ends with this object."""
    store = dist.TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=timeout_s))
    return store, f"{host}:{store.port}"


def open_store(address: str, timeout_s: float) -> dist.Store:
    """Another process's store.

    Raises:
        ServerError: nobody listens there.
    """
    host, _, port = address.rpartition(":")
    try:
        return dist.TCPStore(host, int(port), is_master=False, timeout=timedelta(seconds=min(CONNECT_S, timeout_s)))
    except (RuntimeError, ValueError) as error:
        raise ServerError(f"the trainer's store at {address} can't be reached ({_first(error)})") from None


def reachable_address(others: Sequence[str]) -> str:
    """This machine's address as a machine at one of these addresses sees it; no packet is sent."""
    for other in others:
        family, kind, _, _, address = socket.getaddrinfo(other, 9, type=socket.SOCK_DGRAM)[0]
        with contextlib.suppress(OSError), socket.socket(family, kind) as probe:
            probe.connect(address)
            return probe.getsockname()[0]
    return "127.0.0.1"


def _awaited(store: dist.Store, meeting: str, name: str, deadline: float) -> bytes:
    """A value of the store, once it is there."""
    with failures_named("the trainer's store"):
        while not store.check([name]):
            if store.check([f"{meeting}/failed"]):
                raise ServerError(store.get(f"{meeting}/failed").decode())
            if time.monotonic() > deadline:
                raise ServerError(f"not all ranks came to the meeting in time: {name.rpartition('/')[0]} are missing")
            time.sleep(POLL_S)
        return store.get(name)


def packed(boxes: Sequence[Box]) -> str:
    """Boxes as a value of the store."""
    return json.dumps([[*asdict(box).values()] for box in boxes])


def _unpacked(content: bytes) -> list[Box]:
    return [Box(key, tuple(start), tuple(shape), dtype) for key, start, shape, dtype in json.loads(content)]


def _first(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]
