"""Products with a weight as decoding needs them on a CPU: few rows, and a weight that no cache near the core holds.

A decoding step reads every weight of the model for some tens of rows. MKL is slow at that on ``[out, in]`` as the
learner keeps it: it reorders the weight in each product. Transposed, it needs no reordering, but its kernels then walk
down columns whose neighbours lie kilobytes apart, which costs what it saved wherever the weight comes from beyond the
core's own caches. ``arranged`` gives the transpose cut into panels of a few hundred columns, each in one piece: no
reordering, and reads that are nearly sequential (docs/performance.md has the measurements).

The other functions take a weight either way: ``[out, in]``, or as ``arranged`` gives it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

WIDEST_PANEL = 256
"""Columns. 128 are 10 % slower at 8 to 64 rows, and from 512 on the gain goes."""

WHOLE_ELEMENTS = 1 << 18
"""A weight of so many numbers (1 MiB) stays near the core while it is used, and needs no panels."""


@torch.no_grad()
def arranged(weight: Tensor) -> Tensor:
    """A copy of a weight [out, in] that products are fast with.

    Returns:
        Of a small one, and where only slivers would divide it, [out, in] with its columns in one piece; else panels
        [panels, in, width], ``panels * width == out``.
    """
    rows, columns = weight.shape
    widths = range(WIDEST_PANEL // 4, WIDEST_PANEL + 1, 16)
    width = max((width for width in widths if rows % width == 0), default=rows)
    if weight.numel() <= WHOLE_ELEMENTS or width == rows:
        return weight.t().contiguous().t()
    panels = weight.new_empty(rows // width, columns, width)
    for panel, part in zip(panels, weight.split(width), strict=True):
        panel.copy_(part.t())  # one by one: torch transposes matrices in blocks, and stacks of them by the element
    return panels


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [T, in] -> ``x weight^T + bias`` [T, out]."""
    if weight.dim() == 2:
        return F.linear(x, weight, bias)
    panels, _, width = weight.shape
    if bias is not None:
        return add_linear_(bias.repeat(len(x), 1), x, weight)
    out = x.new_empty(len(x), panels * width)
    torch.bmm(x.expand(panels, *x.shape), weight, out=_panelwise(out, panels))
    return out


def add_linear_(y: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """Add ``x weight^T`` to y [T, out] in place, x [T, in]."""
    if weight.dim() == 2:
        return y.addmm_(x, weight.t())
    _panelwise(y, len(weight)).baddbmm_(x.expand(len(weight), *x.shape), weight)
    return y


def _panelwise(y: Tensor, panels: int) -> Tensor:
    """A view [panels, T, width] of y [T, out]. torch multiplies into such views panel by panel, without a copy."""
    return y.view(len(y), panels, -1).transpose(0, 1)
