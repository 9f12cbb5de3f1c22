"""What mcore is told of a micro-batch that is one row: which tokens attend to which, and at which position each is."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.packed_seq_params import PackedSeqParams

from nemo_aapo.mcore.micro_batch import MicroBatch

SHORTEST_OF_BATCH = 0.7
"""Sequences attend in one batch if each has at least this share of the longest one's length.

A lower share computes more padding, a higher one makes more batches; both cost time."""


@dataclass(kw_only=True)
class PackedSequences(PackedSeqParams):
    """mcore's description of the row, and what mcore's lacks: prompts that sequences share.

    With such prompts the fields of ``PackedSeqParams`` describe one sequence, the row itself: that is what mcore's
    rotary embedding goes by. Attention goes by what is here.
    """

    bounds: torch.Tensor
    """``MicroBatch.cu_seqlens``"""
    expand: torch.Tensor | None
    """``MicroBatch.expand``"""
    contract: torch.Tensor | None
    """``MicroBatch.contract``"""

    @functools.cached_property
    def attention_batches(self) -> tuple[list[torch.Tensor], torch.Tensor]:
        """Batches of sequences of like lengths, for attention that takes padded rows.

        Returns:
            For each batch int64 [b, s]: which token of the row stands there; a sequence's last one stands in for its
            padding. And int64 [t]: where the token's result is among those of all batches, flattened.
        """
        bounds = self.bounds.numpy()
        tokens = np.arange(bounds[-1]) if self.expand is None else self.expand.numpy()
        batches, place, done = [], np.empty(len(tokens), np.int64), 0
        for sequences in like_lengths(np.diff(bounds)):
            starts, last = bounds[sequences], bounds[sequences + 1] - 1
            width = int((last - starts).max()) + 1
            batches.append(torch.from_numpy(tokens[np.minimum(starts[:, None] + np.arange(width), last[:, None])]))
            for row, (start, end) in enumerate(zip(starts, last + 1, strict=True)):
                place[start:end] = done + row * width + np.arange(end - start)
            done += len(sequences) * width
        return batches, torch.from_numpy(place if self.contract is None else place[self.contract.numpy()])


def like_lengths(lengths: np.ndarray) -> list[np.ndarray]:
    """Indices of sequences, longest first, cut where one is shorter than ``SHORTEST_OF_BATCH`` of its batch's first."""
    order = np.argsort(-lengths, kind="stable")
    batches, start = [], 0
    while start < len(order):
        fits = lengths[order] >= SHORTEST_OF_BATCH * lengths[order[start]]
        stop = int(np.count_nonzero(fits))
        batches.append(order[start:stop])
        start = stop
    return batches


def packed_sequences(batch: MicroBatch) -> PackedSequences:
    """What attention is told of a micro-batch that is one row.

    Raises:
        ValueError: its sequences are padded rows.
    """
    bounds, longest = batch.cu_seqlens, batch.longest
    if bounds is None:
        raise ValueError("a micro-batch of padded rows needs no description of its sequences")
    whole = bounds
    if batch.expand is not None:
        bounds = bounds.new_tensor([0, batch.input_ids.shape[1]])
    return PackedSequences(
        qkv_format="thd",
        cu_seqlens_q=bounds,
        cu_seqlens_kv=bounds,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
        bounds=whole,
        expand=batch.expand,
        contract=batch.contract,
    )


@contextlib.contextmanager
def rotary_positions(module: GPTModel, batch: MicroBatch) -> Iterator[None]:
    """Inside, the rotary embedding has an angle for each token of a row with shared prompts.

    mcore counts positions from each sequence's start by itself, but a completion starts where its prompt ends.
    """
    if batch.expand is None:
        yield
        return

    def of_each_token(_module: torch.nn.Module, _arguments: Any, angles: torch.Tensor) -> torch.Tensor:
        return angles.index_select(0, batch.position_ids[0])

    hook = module.rotary_pos_emb.register_forward_hook(of_each_token)
    try:
        yield
    finally:
        hook.remove()
