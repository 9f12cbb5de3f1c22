"""Which rank sends what to which: a pure function of the parts that the ranks of both sides hold.

A part is a box: a weight's name, which is the same under every layout (``mcore/state.py``), its first index and its
shape along each axis. What a receiver needs of a sender is where two boxes meet. Megatron-core has a planner of its own
(``core.resharding``); it knows parts by the attributes that tensor-parallel modules put on their parameters, wants both
models in one job, and plans on one rank. Boxes are what checkpoints are resharded by, and both sides can plan alone.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from nemo_aapo.errors import WeightsError

PROTOCOL = 1
"""Number of the way in which parts are named, ordered and added up: a server of another one refuses."""


@dataclass(frozen=True)
class Rendezvous:
    """Where a server's ranks meet the trainer's, which send them the weights (``meeting.py``)."""

    address: str
    """``host:port`` of the trainer's store."""
    name: str
    """Of this meeting in the store; nobody without the token learns it."""
    senders: int
    """Ranks of the trainer."""
    receivers: int
    """Ranks of the server."""
    protocol: int = PROTOCOL
    """The sender's way to name, order and add up parts."""


@dataclass(frozen=True, slots=True)
class Box:
    """A part of a weight.

    Example: ``Box("decoder.layers.mlp.linear_fc2.weight", (3, 0, 512), (1, 896, 512), "bfloat16")`` stands for the
    second half of the columns in layer 3.
    """

    key: str
    start: tuple[int, ...]
    """Of each axis, the first index."""
    shape: tuple[int, ...]
    dtype: str

    @property
    def volume(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class Move:
    """What one rank of the trainer sends to one rank of a server."""

    sender: int
    receiver: int
    box: Box


def plan(senders: Sequence[Sequence[Box]], receivers: Sequence[Sequence[Box]], server: int = 0) -> list[Move]:
    """Fill every box of the receivers exactly once.

    Args:
        senders: the boxes of each rank of the trainer. Two are equal (data-parallel copies) or do not overlap.
        receivers: those of each rank of a server.
        server: number of the server: copies take turns, so that all ranks of the trainer send.

    Raises:
        WeightsError: the trainer holds no such weight, or not all of it: a model of another kind or precision.
    """
    holders: dict[str, dict[Box, list[int]]] = defaultdict(lambda: defaultdict(list))
    for rank, boxes in enumerate(senders):
        for box in boxes:
            holders[box.key][box].append(rank)
    moves = []
    for receiver, boxes in enumerate(receivers):
        for wanted in boxes:
            found = list(_sources(wanted, holders[wanted.key], server + receiver))
            if sum(box.volume for _, box in found) != wanted.volume:
                raise WeightsError(f"the trainer does not hold {wanted}: a model of another kind or precision")
            moves += [Move(sender, receiver, box) for sender, box in found]
    return sorted(moves, key=lambda move: (move.box.key, move.box.start, move.receiver))  # receivers go on together


def _sources(wanted: Box, holders: dict[Box, list[int]], turn: int) -> Iterator[tuple[int, Box]]:
    """Who sends which part of a box."""
    for box, ranks in holders.items():
        if box.dtype == wanted.dtype and (part := common(box, wanted)) is not None:
            yield ranks[turn % len(ranks)], part


def common(one: Box, other: Box) -> Box | None:
    """What two boxes of one weight have in common.

    >>> common(Box("w", (0,), (4,), "f"), Box("w", (3,), (4,), "f"))
    Box(key='w', start=(3,), shape=(1,), dtype='f')
    """
    start = tuple(map(max, one.start, other.start))
    ends = ((min(a + n, b + m)) for a, n, b, m in zip(one.start, one.shape, other.start, other.shape, strict=True))
    shape = tuple(end - begin for begin, end in zip(start, ends, strict=True))
    return Box(one.key, start, shape, one.dtype) if all(size > 0 for size in shape) else None


def within(inner: Box, outer: Box) -> tuple[slice, ...]:
    """Where a box lies in another one that holds all of it."""
    begins = [a - b for a, b in zip(inner.start, outer.start, strict=True)]
    return tuple(slice(begin, begin + size) for begin, size in zip(begins, inner.shape, strict=True))
