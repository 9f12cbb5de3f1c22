"""A number that says what weights a group of ranks holds, the same under every layout, without moving any.

Each element's bits are multiplied by an odd number that its place in the whole weight decides, and all products are
summed modulo 2**32; twice, with different numbers. Sums have no order: each rank adds up its own parts, and a part may
be cut anywhere. It finds what faults do, not what an attacker would.
"""

from __future__ import annotations

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


def digest(parts: Iterable[WeightPart]) -> str:
    """16 hexadecimal digits. Collective over all ranks of the job.

    Args:
        parts: of this rank; copies of what another rank counts are left out.
    """
    total = torch.zeros(SUMS, dtype=torch.int64)
    for part in parts:
        if part.counts:
            total += _sums_of(part).cpu()
    if dist.get_world_size() > 1:
        dist.all_reduce(total)
    return "".join(f"{int(number) % 2**32:08x}" for number in total)


def _sums_of(part: WeightPart) -> torch.Tensor:
    """The part's share of the digest: int64 [SUMS], to be taken modulo 2**32."""
    bits = part.tensor.view(BITS[part.tensor.element_size()])
    rows = bits.reshape(-1, bits.shape[-1])
    seed = int.from_bytes(hashlib.sha256(part.key.encode()).digest()[:7])
    axes = [_factors(seed + k, part.start[k], size, bits.device) for k, size in enumerate(bits.shape)]
    of_row = torch.ones(SUMS, 1, dtype=torch.int32, device=bits.device)
    for factors in axes[:-1]:
        of_row = (of_row[:, :, None] * factors[:, None]).reshape(SUMS, -1)
    step = max(1, CHUNK // rows.shape[1])
    total = torch.zeros(SUMS, dtype=torch.int64, device=bits.device)
    for begin in range(0, len(rows), step):
        chunk = rows[begin : begin + step].to(torch.int32)
        for k in range(SUMS):
            total[k] += (_times(chunk, axes[-1][k]) * of_row[k, begin : begin + step]).sum()
    return total


def _times(rows: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    """int32 [n, m] x [m] -> [n], modulo 2**32; torch has no such product on GPUs."""
    return (rows * factors).sum(1, dtype=torch.int32) if rows.is_cuda else rows @ factors


def _factors(seed: int, start: int, size: int, device: torch.device) -> torch.Tensor:
    """Odd numbers for each index of an axis from ``start`` on: int32 [SUMS, size]."""
    mixed = torch.arange(start, start + size, device=device) * _MIX[0] + seed
    for constant in _MIX[1:]:
        mixed = (mixed ^ (mixed >> 29)) * constant
    return torch.stack([mixed, mixed >> 32]).to(torch.int32) | 1
