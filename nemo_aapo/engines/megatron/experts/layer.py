"""A feed-forward layer that is a choice of experts, as mcore's MoELayer computes it without dropping tokens.

Hidden states are whole on each tensor-parallel rank, so that experts spread over those ranks need no exchange beyond
the sum that a dense layer has: each rank runs its own experts on all rows. Ranks that hold the same experts share out
the rows. Experts that are spread over data-parallel ranks too see the rows of all of them: ``Lockstep``.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from nemo_aapo.distributed import parallel
from nemo_aapo.engines.megatron.experts.lockstep import Lockstep
from nemo_aapo.mcore.experts.weights import LocalExperts
from nemo_aapo.mcore.model import GPTModel


class Choice(NamedTuple):
    """The experts that tokens are sent to."""

    experts: Tensor
    """int64 [T, k], numbered over all ranks, the best first."""
    weights: Tensor
    """float32 [T, k]"""


class ExpertLayers:
    """The expert layers of one pipeline stage."""

    def __init__(self, model: GPTModel, lockstep: Lockstep | None) -> None:
        """
        Args:
            lockstep: the data-parallel ranks that the experts are spread over; None: they are on the tensor ranks.
        """
        self._per_token, self._pre_softmax = model.config.moe_router_topk, model.config.moe_router_pre_softmax
        self._lockstep, self._tensor = lockstep, parallel.groups().tensor
        self._rank = parallel.expert_parallel_rank()
        self._copies = 1 if lockstep else parallel.tensor_parallel_size() // parallel.expert_parallel_size()
        self._copy = parallel.tensor_parallel_rank() // parallel.expert_parallel_size()

    def choose(self, x: Tensor, router: Tensor) -> Choice:
        """The experts of x [T, h], scored in float32 as the learner's router does."""
        scores = F.linear(x.float(), router.float())
        if self._pre_softmax:
            weights, experts = scores.softmax(-1).topk(self._per_token, dim=-1)
        else:
            best, experts = scores.topk(self._per_token, dim=-1)
            weights = best.softmax(-1)
        return Choice(experts, weights)

    def apply(self, x: Tensor, choice: Choice, layer: LocalExperts, wanted_alone: bool = False) -> Tensor:
        """What the chosen experts make of x [T, h], weighted and summed [T, h]; of all ranks that hold some.

        Args:
            wanted_alone: x holds only the tokens whose logits are wanted (``Lockstep.begin_step``).
        """
        first = layer.count * self._rank
        if self._lockstep:
            everyone = self._lockstep.gathered(x, choice.experts, choice.weights, wanted_alone)
            out = _own_part(*everyone, layer, first)
            return self._lockstep.summed(out, wanted_alone)[: len(x)]
        experts = choice.experts
        if self._copies > 1:
            others = torch.arange(len(x), device=x.device) % self._copies != self._copy
            experts = experts.masked_fill(others[:, None], -1)
        out = _own_part(x, experts, choice.weights, layer, first)
        if parallel.tensor_parallel_size() > 1:
            dist.all_reduce(out, group=self._tensor)
        return out

    def lend(self, layer: LocalExperts, wanted_alone: bool) -> None:
        """This rank's part in ``apply`` when it has no token itself: its experts, for the others' tokens."""
        x = layer.router.new_empty(0, layer.router.shape[1])
        self.apply(x, self.choose(x, layer.router), layer, wanted_alone)


def _own_part(x: Tensor, experts: Tensor, weights: Tensor, layer: LocalExperts, first: int) -> Tensor:
    """The part of this rank's experts, which are ``first`` and those after it, in what x [T, h] becomes [T, h].

    Rows are sorted by expert, so that each expert's weight is read once. A token's parts are put back in the order of
    its choices before they are summed: the sum does not depend on what else is in the batch.

    Args:
        experts: int64 [T, k]; outside this rank's: no part. weights: float32 [T, k].
    """
    local = experts.flatten() - first
    local = local.masked_fill_((local < 0) | (local >= layer.count), layer.count)
    counts = torch.bincount(local, minlength=layer.count + 1)[: layer.count].tolist()
    rows = local.argsort(stable=True)[: sum(counts)]
    parts = x.new_zeros(experts.numel(), x.shape[1])
    if len(rows):
        units = swiglu(layer.gate_and_up(x[rows // experts.shape[1]], counts))
        units = units.mul(weights.flatten()[rows, None]).to(x.dtype)
        parts[rows] = layer.down(units, counts)
    return parts.view(*experts.shape, -1).sum(1)


def swiglu(gate_and_up: Tensor) -> Tensor:
    """[T, 2 f] -> silu(gate) * up [T, f]."""
    if gate_and_up.is_cuda:
        from nemo_aapo.engines.megatron.kernels import decode_triton  # triton comes with torch's CUDA builds only

        return decode_triton.swiglu(gate_and_up)
    gate, up = gate_and_up.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)
