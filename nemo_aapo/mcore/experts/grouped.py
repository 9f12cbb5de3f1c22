"""The products of a layer's experts on a CPU: one autograd function for all of them.

Modules called one after the other spend much of the time between products, and make for every expert its own tensors
to join, to split, and to hold weight gradients. Here tokens lie sorted by expert, each expert multiplies its rows in
place, what is pointwise happens once for all rows, and weight gradients are added to the buffer within the product.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.moe.experts import SequentialMLP
from torch.autograd.function import once_differentiable


class GroupedExperts(SequentialMLP):
    """mcore's experts, which are modules of their own for whoever reads, saves or exports them, computed together."""

    def forward(
        self, permuted_local_hidden_states: torch.Tensor, tokens_per_expert: torch.Tensor, permuted_probs: torch.Tensor
    ) -> tuple[torch.Tensor, None]:
        """As mcore's: rows sorted by expert [T, h], and the weight of each one [T] -> [T, h]."""
        linears: list[Any] = [getattr(e, name) for name in ("linear_fc1", "linear_fc2") for e in self.local_experts]
        for linear in linears:
            for hook in linear._forward_pre_hooks.values():  # overlap_param_gather waits there for the weight
                hook(linear, ())
        weights, fused = [linear.weight for linear in linears], linears[0].gradient_accumulation_fusion
        counts = tokens_per_expert.tolist()
        return _Experts.apply(permuted_local_hidden_states, permuted_probs, counts, fused, *weights), None


class _Experts(torch.autograd.Function):
    """down(silu(gate) * up * probability) of each row by its expert; saves the rows, gate and up."""

    @staticmethod
    def forward(ctx, x, probs, counts, fused, *weights):
        first, second = _halves(weights)
        gate_and_up = _product(x, counts, [w.t() for w in first])
        ctx.save_for_backward(x, probs, gate_and_up)
        ctx.weights = weights  # themselves: what hooks of saved tensors give back has no main_grad
        ctx.counts, ctx.fused = counts, fused
        gate, up = gate_and_up.chunk(2, -1)
        units = F.silu(gate).mul_(up).mul_(probs[:, None])
        return _product(units, counts, [w.t() for w in second])

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, probs, gate_and_up = ctx.saved_tensors
        first, second = _halves(ctx.weights)
        gate, up = gate_and_up.chunk(2, -1)
        grad_units = _product(grad, ctx.counts, second)
        silu = F.silu(gate)
        units = silu * up
        grad_probs = torch.linalg.vecdot(grad_units, units)
        of_second = _weight_gradients(grad, units.mul_(probs[:, None]), ctx.counts, second, ctx.fused)
        grad_units.mul_(probs[:, None])
        grad_gate_and_up = torch.empty_like(gate_and_up)
        grad_gate, grad_up = grad_gate_and_up.chunk(2, -1)
        torch.mul(grad_units, silu, out=grad_up)
        torch.mul(grad_units, up, out=silu)
        torch.ops.aten.silu_backward.grad_input(silu, gate, grad_input=grad_gate)
        of_first = _weight_gradients(grad_gate_and_up, x, ctx.counts, first, ctx.fused)
        grad_x = _product(grad_gate_and_up, ctx.counts, first)
        return grad_x, grad_probs, None, None, *of_first, *of_second


def _halves(weights: Sequence[torch.Tensor]) -> tuple[Sequence[torch.Tensor], Sequence[torch.Tensor]]:
    return weights[: len(weights) // 2], weights[len(weights) // 2 :]


def _product(x: torch.Tensor, counts: list[int], matrices: Sequence[torch.Tensor]) -> torch.Tensor:
    """x [T, in] by each expert's matrix [in, out] -> [T, out]."""
    out = x.new_empty(len(x), matrices[0].shape[1])
    for rows, matrix, place in zip(x.split(counts), matrices, out.split(counts), strict=True):
        if len(rows):
            torch.mm(rows, matrix, out=place)
    return out


def _weight_gradients(
    grad: torch.Tensor, x: torch.Tensor, counts: list[int], weights: Sequence[Any], fused: bool
) -> list[torch.Tensor | None]:
    """grad^T x of each expert's rows, [out, in].

    Args:
        fused: add them to ``main_grad``, mcore's gradient buffer, whose hooks want some tensor all the same.
    """
    gradients: list[torch.Tensor | None] = []
    for left, right, weight in zip(grad.split(counts), x.split(counts), weights, strict=True):
        if not weight.requires_grad:
            gradients.append(None)
        elif fused:
            if len(left):
                weight.main_grad.addmm_(left.t(), right)
            weight.grad_added_to_main_grad = True
            gradients.append(torch.empty_like(weight))
        else:
            gradients.append(left.t() @ right)
    return gradients
