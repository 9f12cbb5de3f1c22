"""A number that says what weights a group of ranks holds, the same under every layout, without moving any.

Each element's bits are multiplied by an odd number that its place in the whole weight decides, and all products are
summed modulo 2**32; twice, with different numbers. Sums have no order: each rank adds up its own parts, and a part may
be cut anywhere. It finds what faults do, not what an attacker would.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterable

import torch
import torch.distributed as dist

from nemo_aapo.mcore.state import WeightPart

SUMS = 2
"""Of 32 bits each."""
CHUNK = 1 << 18
"""Elements that are worked on at a time: they stay in a CPU's cache for the second sum."""
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
"""Integers by their bytes, which the bits of numbers are read as."""
_MIX = (-7046029254386353131, -4417276706812531889, -8663945395140668459)
"""Odd 64-bit constants that spread the bits of an index."""


class Digest:
    """The sums of a rank's parts, added up one by one: each as soon as it is there."""

    def __init__(self) -> None:
        self._total = torch.zeros(SUMS, dtype=torch.int64)

    def add(self, part: WeightPart) -> None:
        """Count a part, unless it is a copy of what another rank counts."""
        if part.counts:
            self._total += _sums_of(part).cpu()

    def of_all_ranks(self) -> str:
        """16 hexadecimal digits. Collective over all ranks of the job."""
        total = self._total.clone()
        if dist.get_world_size() > 1:
            dist.all_reduce(total)
        return _as_text(total)

    def of_this_rank(self) -> str:
        """The same of its own parts alone. Not collective."""
        return _as_text(self._total)


def _as_text(total: torch.Tensor) -> str:
    return "".join(f"{int(number) % 2**32:08x}" for number in total)


def digest(parts: Iterable[WeightPart]) -> str:
    """The ``Digest`` of all parts of this rank and of the others. Collective over all ranks of the job."""
    sums = Digest()
    for part in parts:
        sums.add(part)
    return sums.of_all_ranks()


def _sums_of(part: WeightPart) -> torch.Tensor:
    """The part's share of the digest: int64 [SUMS], to be taken modulo 2**32."""
    bits = part.tensor.view(BITS[part.tensor.element_size()])
    rows = bits.reshape(-1, bits.shape[-1])
    of_row, of_column = _factors(part.key, tuple(part.start), tuple(bits.shape), bits.device)
    step = max(1, CHUNK // rows.shape[1])
    products = torch.empty_like(of_row)
    for begin in range(0, len(rows), step):
        chunk = rows[begin : begin + step].to(torch.int32)
        for k in range(SUMS):
            products[k, begin : begin + step] = _times(chunk, of_column[k])
    return (products * of_row).sum(1)  # int32 x int32 wraps, as it may


def _times(rows: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    """int32 [n, m] x [m] -> [n], modulo 2**32; torch has no such product on GPUs."""
    return (rows * factors).sum(1, dtype=torch.int32) if rows.is_cuda else rows @ factors


@functools.cache
def _factors(
    key: str, start: tuple[int, ...], shape: tuple[int, ...], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """What the rows of a part are multiplied by, and its columns: int32 [SUMS, rows] and [SUMS, columns].

    Kept, as a process has the same parts at each refit, and a part has many more elements than rows and columns.
    """
    seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:7])
    axes = [_odd_numbers(seed + k, start[k], size, device) for k, size in enumerate(shape)]
    of_row = torch.ones(SUMS, 1, dtype=torch.int32, device=device)
    for factors in axes[:-1]:
        of_row = (of_row[:, :, None] * factors[:, None]).reshape(SUMS, -1)
    return of_row, axes[-1]


def _odd_numbers(seed: int, start: int, size: int, device: torch.device) -> torch.Tensor:
    """Of each index of an axis from ``start`` on: int32 [SUMS, size]."""
    mixed = torch.arange(start, start + size, device=device) * _MIX[0] + seed
    for constant in _MIX[1:]:
        mixed = (mixed ^ (mixed >> 29)) * constant
    return torch.stack([mixed, mixed >> 32]).to(torch.int32) | 1
