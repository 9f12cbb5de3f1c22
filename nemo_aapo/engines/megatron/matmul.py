"""Matrix products with a weight as decoding on a CPU needs them: few rows, and weights that no core's cache holds.

MKL is slow at such products with ``[out, in]`` as the learner keeps it: it reorders the weight each time. Transposed it
needs no reordering, but then walks down columns whose neighbours lie kilobytes apart, which costs what it saved unless
the weight is in the core's caches already. ``pack_weight`` cuts the transpose into blocks of at most 256 columns, each
contiguous: no reordering, and reads that are nearly sequential. That is for Intel's processors. On AMD's it brings
nothing, but oneDNN with a weight in its own layout is far faster there than MKL: up to the speed of large products.
docs/results/notebook.md has the measurements.

``linear`` and ``add_linear_`` take a weight either way: ``[out, in]``, or packed; or with a LoRA adapter beside it
(``Adapted``).
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from nemo_aapo.utils.machine import processor_maker

MAX_BLOCK_COLUMNS = 256
"""Columns of a packed weight's block. With 128, products of 8 to 64 rows take 3 to 16 % longer; from 512 on most of the
gain is gone."""

SMALL_WEIGHT = 1 << 17
"""Weights with fewer numbers (512 KiB of float32) stay in the core's caches: packing those of a 0.3M model gained
nothing. A call of oneDNN costs 12 microseconds, which it wins back at this size."""

USUAL_ROWS = 32
"""Rows that oneDNN chooses its layout for. Products of 1 to 1,024 rows are fast with it."""


def packing_pays(weight: Tensor, rows: int, new_tokens: int) -> bool:
    """Whether a rollout of so many rows and new tokens is worth packed copies of a model's large weights.

    Packing takes about as long as two decoding steps of 32 rows, and each step then gains a tenth or more. A rollout
    that might have been long but stops at its first tokens loses those two steps.

    Args:
        weight: one of them, whose device and dtype all have.
    """
    return not weight.is_cuda and weight.dtype == torch.float32 and rows >= 4 and new_tokens >= 32


def pack_weight(weight: Tensor) -> Tensor:
    """The layout that products are fast with: a large weight [out, in] is copied into it, a small one stays.

    Returns:
        [out, in] in oneDNN's layout, or blocks [blocks, in, width], ``blocks * width == out``; ``weight`` itself, if it
        is small or if only blocks narrower than a quarter of ``MAX_BLOCK_COLUMNS`` would divide it.
    """
    if weight.numel() < SMALL_WEIGHT:
        return weight
    return for_onednn(weight) if packs_by_onednn() else in_blocks(weight)


@functools.cache
def packs_by_onednn() -> bool:
    """Whether weights are packed for oneDNN. The processor decides: a choice by timing would change bits by chance."""
    return processor_maker() == "AuthenticAMD" and torch.backends.mkldnn.is_available()


@torch.no_grad()
def for_onednn(weight: Tensor) -> Tensor:
    """A copy in oneDNN's layout, by the operators that torch's own compiler has for frozen weights."""
    return torch.ops.mkldnn._reorder_linear_weight(weight, USUAL_ROWS)


@torch.no_grad()
def in_blocks(weight: Tensor) -> Tensor:
    """[out, in] -> [blocks, in, width]; the weight itself if only narrow blocks would divide it."""
    rows, columns = weight.shape
    widths = [width for width in range(MAX_BLOCK_COLUMNS // 4, MAX_BLOCK_COLUMNS + 1, 16) if rows % width == 0]
    if not widths:
        return weight
    packed = weight.new_empty(rows // widths[-1], columns, widths[-1])
    for block, part in zip(packed, weight.split(widths[-1]), strict=True):
        block.copy_(part.t())  # one by one: torch transposes a matrix in tiles, but a stack of them number by number
    return packed


class Adapted(NamedTuple):
    """A weight and its LoRA adapter, applied apart in the learner's order: ``x W^T + scale * (x A^T) B^T``."""

    weight: Tensor
    """[out, in]"""
    a: Tensor
    """[rank, in]"""
    b: Tensor
    """[out, rank]"""
    scale: float


Weight = Tensor | Adapted


def linear(x: Tensor, weight: Weight, bias: Tensor | None = None) -> Tensor:
    """x [T, in] -> ``x weight^T + bias`` [T, out]."""
    if isinstance(weight, Adapted):
        return F.linear(x, weight.weight, bias).add_(F.linear(F.linear(x, weight.a), weight.b).mul_(weight.scale))
    if weight.is_mkldnn:
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    if weight.dim() == 2:
        return F.linear(x, weight, bias)
    blocks, _, width = weight.shape
    if bias is not None:
        return add_linear_(bias.repeat(len(x), 1), x, weight)
    out = x.new_empty(len(x), blocks * width)
    torch.bmm(x.expand(blocks, *x.shape), weight, out=_by_block(out, blocks))
    return out


def add_linear_(y: Tensor, x: Tensor, weight: Weight) -> Tensor:
    """Add ``x weight^T`` to y [T, out] in place, x [T, in]."""
    if isinstance(weight, Adapted) or weight.is_mkldnn:
        return y.add_(linear(x, weight))
    if weight.dim() == 2:
        return y.addmm_(x, weight.t())
    _by_block(y, len(weight)).baddbmm_(x.expand(len(weight), *x.shape), weight)
    return y


def _by_block(y: Tensor, blocks: int) -> Tensor:
    """A view [blocks, T, width] of y [T, out]. torch multiplies into such views block by block, without a copy."""
    return y.view(len(y), blocks, -1).transpose(0, 1)
