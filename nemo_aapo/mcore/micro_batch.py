"""What one forward pass takes: the micro-batch as tensors."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from nemo_aapo.mcore.attention.spans import RowAttention

_PER_TOKEN = (
    "targets",
    "advantages",
    "weights",
    "rollout_logprobs",
    "versions",
    "old_logprobs",
    "reference_logprobs",
)
"""Fields of a ``MicroBatch`` that have an entry for each of its n tokens."""


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
    """int32 [sequences + 1], where each whole sequence of the one row starts among all of them, and where the last one
    ends. None: there are padded rows."""
    longest: int
    """Tokens that the longest sequence has."""
    positions: torch.Tensor
    """int64 [n], where in the flattened hidden states [s * b, h] the prediction of each token stands."""
    targets: torch.Tensor
    """int64 [n], the tokens themselves."""
    lengths: tuple[int, ...]
    """Completion tokens of each sequence; they sum to n."""
    advantages: torch.Tensor
    """float32 [n], A* of the token's completion."""
    weights: torch.Tensor
    """float32 [n], the token's share of the loss: 1 / (global denominator)."""
    rollout_logprobs: torch.Tensor
    """float32 [n], the rollout engine's log-probs of the tokens."""
    versions: torch.Tensor | None = None
    """int64 [n], optimizer steps that the policy had taken which sampled the tokens."""
    row: RowAttention | None = None
    """What the tokens of the one row attend to. None: there are padded rows."""
    expand: torch.Tensor | None = None
    """int64 [cu_seqlens[-1]], where in the row each token of the whole sequences stands. None: no prompt is shared, the
    row is those sequences."""
    contract: torch.Tensor | None = None
    """int64 [s], a place in ``expand`` that holds each token of the row."""
    parts: torch.Tensor | None = None
    """int64 [ranks, s / ranks], the tokens of the one row that each context-parallel rank takes. None: it is not cut.
    A rank's ``part`` keeps it, as it keeps ``cu_seqlens``, ``row``, ``expand`` and ``contract``: attention sees the
    whole."""
    old_logprobs: torch.Tensor | None = None
    """float32 [n], the learner's log-probs of the tokens before the first of several updates."""
    reference_logprobs: torch.Tensor | None = None
    """float32 [n], the frozen reference model's log-probs of the tokens, for the KL term."""
    routes: torch.Tensor | None = None
    """uint8 [s * b, layers, k], the experts that a mixture of experts is to send each token of the flattened hidden
    states to (``NO_ROUTE``: its own choice). None: its own choice everywhere."""

    @classmethod
    def of_one_sequence(cls, ids: torch.Tensor) -> MicroBatch:
        """The sequence int64 [s] as one row, none of whose tokens are scored: for its hidden states alone."""
        no_tokens, nothing = ids.new_empty(0), torch.empty(0, device=ids.device)
        positions = torch.arange(len(ids), device=ids.device)[None]
        return cls(ids[None], positions, None, len(ids), no_tokens, no_tokens, (0,), nothing, nothing, nothing)

    def part(self, rank: int) -> MicroBatch:
        """What a context-parallel rank computes: its tokens of the row, and those of the n that they predict."""
        own, taken = self._part(rank), self._taken(rank)
        place = torch.empty_like(self.input_ids[0]).index_copy_(0, own, torch.arange(len(own), device=own.device))
        sequence = np.repeat(np.arange(len(self.lengths)), self.lengths)[taken.cpu().numpy()]
        per_token = {name: None if (x := getattr(self, name)) is None else x[taken] for name in _PER_TOKEN}
        return self.replace(
            input_ids=self.input_ids[:, own],
            position_ids=self.position_ids[:, own],
            positions=place[self.positions[taken]],
            lengths=tuple(np.bincount(sequence, minlength=len(self.lengths)).tolist()),
            routes=None if self.routes is None else self.routes[own],
            **per_token,
        )

    def whole(self, parts: Sequence[np.ndarray]) -> np.ndarray:
        """One array [n] from those of all context-parallel ranks, each in the order of its part's targets."""
        joined = np.empty(len(self.targets), parts[0].dtype)
        for rank, part in enumerate(parts):
            joined[self._taken(rank).cpu().numpy()] = part
        return joined

    def _part(self, rank: int) -> torch.Tensor:
        if self.parts is None:
            raise ValueError("this micro-batch is not cut for context parallelism: collate(context_parallel_size=...)")
        return self.parts[rank]

    def _taken(self, rank: int) -> torch.Tensor:
        """int64, which of the n tokens a rank's part predicts."""
        is_own = torch.zeros_like(self.input_ids[0], dtype=torch.bool).index_fill_(0, self._part(rank), True)
        return is_own[self.positions].nonzero()[:, 0]

    def replace(self, **changes: Any) -> MicroBatch:
        """A copy with some fields set."""
        return dataclasses.replace(self, **changes)
