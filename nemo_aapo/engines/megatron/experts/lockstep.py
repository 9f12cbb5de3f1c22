"""Data-parallel ranks that decode step by step together, because each has experts that the others' tokens need.

Where a layer's experts are spread over more ranks than the tensor-parallel ones, an expert-parallel group holds several
copies of all else, each with sequences of its own. In each step they first tell one another how many tokens they bring,
then exchange rows in every layer:

    step        every rank: (tokens, tokens whose logits are wanted, whether it failed)
    each layer  every rank's rows with the experts chosen for them -> each rank runs its experts on all -> sum

A rank whose sequences have ended brings no tokens and goes on lending its experts until all have ended. One that failed
says so in place of its next step, and all end with its error. Choices are gathered and not recomputed: a product over
another batch may round to another choice.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor

from nemo_aapo.distributed import parallel
from nemo_aapo.distributed.agreement import first_error
from nemo_aapo.distributed.device import device
from nemo_aapo.mcore.model import GPTModel


def decodes_in_step(model: GPTModel) -> bool:
    """True if the model's experts are spread over more ranks than the tensor-parallel ones."""
    return bool(model.config.num_moe_experts) and parallel.expert_parallel_size() > parallel.tensor_parallel_size()


class Lockstep:
    """The ranks of this rank's expert-parallel group in one ``generate`` call, and their tokens in the present step."""

    def __init__(self) -> None:
        groups = parallel.groups()
        self._experts, self._stages = groups.expert, groups.pipeline
        self._tensor_ranks, self._tensor_rank = parallel.tensor_parallel_size(), parallel.tensor_parallel_rank()
        self._copies = parallel.expert_parallel_size() // self._tensor_ranks
        self._copy = parallel.expert_parallel_rank() // self._tensor_ranks
        self._most = (0, 0)  # tokens of the copy that has most, and tokens whose logits are wanted
        self._telling = True  # the others are waiting for this rank's next step, and not within one

    def begin_step(self, tokens: int, wanted: int) -> bool:
        """Tell the others what this rank brings to the step; False if nobody brings anything: all have ended.

        Args:
            tokens: how many tokens go through the layers.
            wanted: how many of them have logits: only those go through the last layer's experts.

        Raises:
            The error of the first rank that failed.
        """
        return self._exchange(tokens, wanted, None)

    def end_step(self) -> None:
        """The step's collectives are over: until the next step an error of this rank can be told."""
        self._telling = True

    @contextmanager
    def failing_together(self) -> Iterator[None]:
        """Inside, an error of this rank between two steps ends the others too, in their next step."""
        try:
            yield
        except Exception as error:
            if self._telling:
                self._exchange(0, 0, error)
            raise

    def _exchange(self, tokens: int, wanted: int, error: Exception | None) -> bool:
        """``begin_step``. Afterwards all stages know of a failure: only ranks of one stage share experts."""
        self._telling = False
        own = torch.tensor([[tokens, wanted, error is not None]], device=device())
        everyone = torch.empty(dist.get_world_size(self._experts), 3, dtype=own.dtype, device=own.device)
        dist.all_gather_into_tensor(everyone, own, group=self._experts)
        most = everyone.amax(0)
        if parallel.pipeline_parallel_size() > 1:
            dist.all_reduce(most, op=dist.ReduceOp.MAX, group=self._stages)
        tokens_at_most, wanted_at_most, failed = most.tolist()
        self._most = tokens_at_most, wanted_at_most
        if failed:
            error = first_error(first_error(error, self._experts), self._stages)
            assert error is not None, "a rank said that it failed, and not how"
            raise error
        return tokens_at_most > 0

    def gathered(
        self, x: Tensor, experts: Tensor, weights: Tensor, wanted_alone: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The rows of all copies of the model: hidden states, experts and weights, as ``ExpertLayers`` has its own.

        All copies' rows are padded to the same number; padding is sent to no expert. Tensor-parallel ranks have the
        same rows, and each sends its share of them.
        """
        share = self._share(wanted_alone)
        own = slice(self._tensor_rank * share, (self._tensor_rank + 1) * share)
        parts = x, experts.add(1).to(torch.int16), weights  # the bytes of padding, which are zero, name no expert
        packed = torch.cat([part[own].contiguous().view(torch.uint8) for part in parts], dim=1)
        sent = packed.new_zeros(share, packed.shape[1])
        sent[: len(packed)] = packed
        received = packed.new_empty(self._copies * self._tensor_ranks * share, packed.shape[1])
        dist.all_gather_into_tensor(received, sent, group=self._experts)
        widths = [part.shape[1] * part.element_size() for part in parts]
        hidden, chosen, weighted = (
            column.contiguous().view(part.dtype)
            for column, part in zip(received.split(widths, dim=1), parts, strict=True)
        )
        return hidden, chosen.long().sub(1), weighted

    def summed(self, out: Tensor, wanted_alone: bool) -> Tensor:
        """This copy's rows, with padding, of the sum over the group of what each rank's experts made of all rows."""
        dist.all_reduce(out, group=self._experts)
        rows = self._share(wanted_alone) * self._tensor_ranks
        return out[self._copy * rows : (self._copy + 1) * rows]

    def _share(self, wanted_alone: bool) -> int:
        """Rows that each rank sends."""
        return -(-self._most[wanted_alone] // self._tensor_ranks)
