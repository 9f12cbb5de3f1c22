"""Products with a weight as decoding on a CPU needs them: few rows, and weights from beyond the core's own caches.

MKL is slow at such products with ``[out, in]`` as the learner keeps it: it reorders the weight each time. Transposed it
needs no reordering, but then walks down columns whose neighbours lie kilobytes apart, which costs what it saved unless
the weight is in the core's caches already. ``arranged`` cuts the transpose into panels of at most 256 columns, each in
one piece: no reordering, and reads that are nearly sequential (docs/performance.md has the measurements).

``linear`` and ``add_linear_`` take a weight either way: ``[out, in]``, or ``[panels, in, width]``.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

WIDEST_PANEL = 256
"""Columns. With 128 products of 8 to 64 rows take 3 to 16 % longer; from 512 on most of the gain is gone."""

SMALL_WEIGHT = 1 << 17
"""Numbers. Smaller weights (512 KiB) stay in the core's caches; with copies of them a 0.3M model was not faster."""


@torch.no_grad()
def arranged(weight: Tensor) -> Tensor:
    """What products are fast with: of a large weight [out, in] a copy in panels, a small one as it is.

    Returns:
        [panels, in, width], ``panels * width == out``; or ``weight`` itself, also where only slivers would divide it.
    """
    rows, columns = weight.shape
    widths = [width for width in range(WIDEST_PANEL // 4, WIDEST_PANEL + 1, 16) if rows % width == 0]
    if weight.numel() < SMALL_WEIGHT or not widths:
        return weight
    panels = weight.new_empty(rows // widths[-1], columns, widths[-1])
    for panel, part in zip(panels, weight.split(widths[-1]), strict=True):
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
