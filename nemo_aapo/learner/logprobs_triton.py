"""The two passes over a tile of logits that ``logprobs`` makes on a GPU, as one kernel each.

In torch operations the softmax statistics of a tile take about ten passes over it and its gradient six, each through
the GPU's memory. Each kernel reads the tile once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

BLOCK = 2048
"""Columns that a program takes at a time."""


def add_statistics(logits: torch.Tensor, targets: torch.Tensor, first: int, statistics: torch.Tensor) -> None:
    """Merge the softmax statistics of one tile into those of the tiles before it.

    Args:
        logits: float32 [n, c], contiguous.
        targets: int64 [n], contiguous, counted from the shard's first row, as ``first`` is.
        first: the tile's first column.
        statistics: float32 [4, n], contiguous, updated in place; see ``logprobs._statistics``.
    """
    tokens, columns = logits.shape
    if tokens:
        _add_statistics[(tokens,)](logits, targets, first, statistics, columns, BLOCK=BLOCK, num_warps=8)


def grad_logits(
    logits: torch.Tensor,
    targets: torch.Tensor,
    first: int,
    logsumexp: torch.Tensor,
    grad: torch.Tensor,
    out: torch.Tensor,
) -> torch.Tensor:
    """d loss / d logits = grad * (1[column = target] - softmax), in the dtype in which it is multiplied.

    Args:
        logits, targets, first: as in ``add_statistics``.
        logsumexp: float32 [n], over the whole vocabulary.
        grad: float32 [n], d loss / d log-prob, contiguous.
        out: [n, c], any float dtype, contiguous; may be ``logits``.

    Returns:
        ``out``
    """
    tokens, columns = logits.shape
    if tokens:
        grid = (tokens, triton.cdiv(columns, BLOCK))
        _grad_logits[grid](logits, targets, first, logsumexp, grad, out, columns, BLOCK=BLOCK, num_warps=8)
    return out


@triton.jit
def _add_statistics(logits_ptr, targets_ptr, first, statistics_ptr, columns, BLOCK: tl.constexpr):
    """Program (row)."""
    row, rows = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    row_ptr = logits_ptr + row * columns
    maximum = tl.load(statistics_ptr + row)
    total = tl.load(statistics_ptr + rows + row)
    weighted = tl.load(statistics_ptr + 2 * rows + row)
    for start in range(0, columns, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < columns
        z = tl.load(row_ptr + column, mask=inside, other=float("-inf"))
        top = tl.max(z, 0)
        shifted = tl.where(inside, z - top, 0.0)
        exp = tl.where(inside, tl.exp(shifted), 0.0)
        larger = tl.maximum(maximum, top)
        shift, shift_new = maximum - larger, top - larger
        scale, scale_new = tl.exp(shift), tl.exp(shift_new)
        block = tl.sum(exp, 0)
        weighted = scale * (weighted + shift * total) + scale_new * (tl.sum(exp * shifted, 0) + shift_new * block)
        total = scale * total + scale_new * block
        maximum = larger
    tl.store(statistics_ptr + row, maximum)
    tl.store(statistics_ptr + rows + row, total)
    tl.store(statistics_ptr + 2 * rows + row, weighted)
    target = tl.load(targets_ptr + row) - first
    if (target >= 0) & (target < columns):
        tl.store(statistics_ptr + 3 * rows + row, tl.load(row_ptr + target))


@triton.jit
def _grad_logits(logits_ptr, targets_ptr, first, logsumexp_ptr, grad_ptr, out_ptr, columns, BLOCK: tl.constexpr):
    """Program (row, block of columns)."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < columns
    target = tl.load(targets_ptr + row) - first
    logsumexp, grad = tl.load(logsumexp_ptr + row), tl.load(grad_ptr + row)
    z = tl.load(logits_ptr + row * columns + column, mask=inside, other=0.0)
    value = grad * (tl.where(column == target, 1.0, 0.0) - tl.exp(z - logsumexp))
    tl.store(out_ptr + row * columns + column, value.to(out_ptr.dtype.element_ty), mask=inside)
