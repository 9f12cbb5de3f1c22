"""What mcore takes from CUDA kernels, on a CPU: a layer's pointwise parts, forward and backward, and a norm.

A CPU spends on each torch operation the time to read and write its tensors, so what counts is how many there are.
Autograd's own chains for these three take 1.2 to 3.4 times as long (docs/results/notebook.md has the figures), and save
more tensors than they need.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

_ROW = 1024
"""Entries whose squares are added up in float32."""


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x / rms(x) * weight over the last dimension, as ``torch.nn.functional.rms_norm``.

    Args:
        x: [..., h], float32 or float64.
        weight: [h].
        eps: added to the mean square.
    """
    return _RMSNorm.apply(x, weight, eps)


class _RMSNorm(torch.autograd.Function):
    """Saves the input and 1/rms."""

    @staticmethod
    def forward(ctx, x, weight, eps):
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        inverse = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, inverse)
        return (x * inverse).mul_(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        """With r = 1/rms: dx = r g w - x r^3 mean(g w x), and dw is the sum of r g x over the rows."""
        x, weight, inverse = ctx.saved_tensors
        product = grad * x
        rows = product.reshape(-1, x.shape[-1])
        grad_weight = rows.t() @ inverse.view(-1)
        along_x = (rows @ weight).view(inverse.shape) * inverse.pow(3).div_(-x.shape[-1])
        return torch.mul(grad, weight, out=product).mul_(inverse).addcmul_(x, along_x), grad_weight, None


def swiglu(x: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up of x = [gate, up]: [..., 2 f] -> [..., f]."""
    return _SwiGLU.apply(x)


class _SwiGLU(torch.autograd.Function):
    """Saves the input; silu(gate) is computed again, as in TransformerEngine's and mcore's fused kernels."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        gate, up = x.chunk(2, -1)
        return F.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        gate, up = x.chunk(2, -1)
        grad_x = torch.empty_like(x)
        grad_gate, grad_up = grad_x.chunk(2, -1)
        scratch = F.silu(gate)
        torch.mul(grad, scratch, out=grad_up)
        torch.mul(grad, up, out=scratch)
        torch.ops.aten.silu_backward.grad_input(scratch, gate, grad_input=grad_gate)
        return grad_x


def rotary(x: torch.Tensor, frequencies: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
    """Rotary embedding, halves turned against one another: x cos + rotate_half(x) sin, times scale.

    Args:
        x: [s, ..., d].
        frequencies: angles [s, ..., d], broadcast over x; the second half repeats the first.
        scale: of cosine and sine (YaRN's concentration).
    """
    return _Rotary.apply(x, frequencies, scale)


class _Rotary(torch.autograd.Function):
    """Saves cosine and sine; the gradient is turned back."""

    @staticmethod
    def forward(ctx, x, frequencies, scale):
        cos, sin = _cos_sin(frequencies, scale)
        ctx.save_for_backward(cos, sin)
        return _turned(x, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        cos, sin = ctx.saved_tensors
        return _turned(grad, cos, -sin), None, None


def _cos_sin(frequencies: torch.Tensor, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine and sine as ``_turned`` takes them, kept with the frequencies, which mcore hands to all layers."""
    kept = vars(frequencies).get("_aapo_cos_sin")
    if kept is None or kept[0] != scale:
        cos, sin = frequencies.cos().mul_(scale), frequencies.sin().mul_(scale)
        sin[..., : sin.shape[-1] // 2].neg_()
        vars(frequencies)["_aapo_cos_sin"] = kept = (scale, cos, sin)
    return kept[1], kept[2]


def _turned(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """x cos + swap(x) sin, where swap exchanges the halves; sin is negative in the first half."""
    first, second = x.chunk(2, -1)
    return torch.cat((second, first), -1).mul_(sin).addcmul_(x, cos)


def l2_norm(tensors: Iterable[torch.Tensor]) -> torch.Tensor:
    """The norm of all entries together as a float64 scalar, right to 1e-7 whatever the size.

    torch adds the squares of a float32 tensor one after the other in float32: its norm is off by 1.6e-3 at 28 million
    entries and by 1.5e-2 at 135 million, and differs where a tensor is cut over ranks. Here short rows are added up
    so, and their norms in float64, which takes no more time.

    Args:
        tensors: float32, of any shapes.
    """
    rows, rests = [], [torch.zeros(1)]
    for tensor in tensors:
        flat = tensor.reshape(-1)
        short = flat.numel() % _ROW
        if short < flat.numel():
            rows.append(flat[: flat.numel() - short].view(-1, _ROW))
        if short:
            rests.append(flat[-short:])
    norms = [torch.linalg.vector_norm(row, dim=1) for row in rows] + [torch.stack(torch._foreach_norm(rests))]
    return torch.linalg.vector_norm(torch.cat(norms), dtype=torch.float64)
