"""The experts of a layer as a forward pass without gradients reads them, whichever of mcore's modules holds them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.transformer.moe.experts import SequentialMLP
from torch import Tensor

GroupedLinear = Callable[[Tensor, Sequence[int]], Tensor]
"""``product(x, counts)`` -> [T, out]: x [T, in] lies sorted by expert, ``counts`` [experts] rows of each one."""

LINEAR = ("linear_fc1", "linear_fc2")
"""mcore's names of an expert's products: gate and up, down."""


@dataclass(frozen=True, slots=True)
class LocalExperts:
    """One layer's router, and those of its experts that this rank holds: h hidden, f units of an expert."""

    router: Tensor
    """[all experts, h]"""
    count: int
    """How many experts this rank holds."""
    gate_and_up: GroupedLinear
    """h -> 2 f"""
    down: GroupedLinear
    """f -> h"""


def local_experts(mlp: torch.nn.Module) -> LocalExperts:
    """References to the weights of an mcore MoELayer.

    Raises:
        TypeError: experts of a module that nothing here reads.
    """
    experts: Any = mlp.get_submodule("experts")
    kind = type(experts).__name__
    if isinstance(experts, SequentialMLP):
        first, second = (
            _one_by_one([getattr(expert, name).weight for expert in experts.local_experts]) for name in LINEAR
        )
    elif kind == "TEGroupedMLP":
        first, second = (_of_transformer_engine(getattr(experts, name)) for name in LINEAR)
    else:
        raise TypeError(f"decoding reads the experts of mcore's SequentialMLP and TEGroupedMLP, and this is a {kind}")
    return LocalExperts(mlp.get_parameter("router.weight"), experts.num_local_experts, first, second)


def _one_by_one(weights: Sequence[Tensor]) -> GroupedLinear:
    """The products of weights [out, in], one for each expert that has rows: a decoding step has few."""

    def product(x: Tensor, counts: Sequence[int]) -> Tensor:
        out, start = x.new_empty(len(x), weights[0].shape[0]), 0
        for weight, count in zip(weights, counts, strict=True):
            if count:
                rows = slice(start, start + count)
                torch.mm(x[rows], weight.t(), out=out[rows])
                start += count
        return out

    return product


def _of_transformer_engine(linear: torch.nn.Module) -> GroupedLinear:
    """TransformerEngine's grouped product, through mcore's module around it."""

    def product(x: Tensor, counts: Sequence[int]) -> Tensor:
        return linear(x, list(counts))[0]  # and a bias, which there is none of

    return product
