"""What one forward pass takes: the micro-batch as tensors."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True, eq=False)
class MicroBatch:
    """Sequences, and the n completion tokens of theirs that are scored or trained on.

    Either b rows, one for each sequence, padded on the right to s tokens; or one row (b = 1) of prefix groups end to
    end (mcore's ``thd``). The n tokens are flat, sequence by sequence.
    """

    input_ids: torch.Tensor
    """int64 [b, s]"""
    position_ids: torch.Tensor
    """int64 [b, s], counted from each sequence's start"""
    cu_seqlens: torch.Tensor | None
    """One row: int32, where each whole sequence starts among all of them, and their end. None: padded rows."""
    longest: int
    """Tokens of the longest sequence."""
    positions: torch.Tensor
    """int64 [n], where in the flattened hidden states [s * b, h] the prediction of each token stands."""
    targets: torch.Tensor
    """int64 [n], the tokens."""
    lengths: tuple[int, ...]
    """Completion tokens of each sequence; they sum to n."""
    advantages: torch.Tensor
    """float32 [n], A* of the token's completion."""
    weights: torch.Tensor
    """float32 [n], the token's share of the loss: 1 / (global denominator)."""
    rollout_logprobs: torch.Tensor
    """float32 [n], the engine's."""
    expand: torch.Tensor | None = None
    """int64 [cu_seqlens[-1]], where in the row each token of the whole sequences stands. None: no prompt is shared, the
    row is those sequences."""
    contract: torch.Tensor | None = None
    """int64 [s], a place in ``expand`` that holds each token of the row."""
    old_logprobs: torch.Tensor | None = None
    """float32 [n], the learner's before the first of several updates."""
    reference_logprobs: torch.Tensor | None = None
    """float32 [n], the frozen reference's (for the KL term)."""

    def replace(self, **changes) -> MicroBatch:
        """A copy with some fields set."""
        return dataclasses.replace(self, **changes)
