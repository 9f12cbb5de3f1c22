"""What mcore is told of a micro-batch that is one row: which tokens attend to which, and at which position each is."""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.packed_seq_params import PackedSeqParams

from nemo_aapo.distributed import parallel
from nemo_aapo.distributed.device import device
from nemo_aapo.mcore.attention.spans import RowAttention
from nemo_aapo.mcore.micro_batch import MicroBatch

QUERIES_AT_ONCE = 1024
"""Tokens of a run at most, where a rank has the keys of all: bounds the mask, and what is computed in vain of it."""


@dataclass(kw_only=True)
class PackedSequences(PackedSeqParams):
    """mcore's description of the row, and what mcore's lacks: prompts that sequences share.

    With such prompts the fields of ``PackedSeqParams`` describe one sequence, the row itself: that is what mcore's
    rotary embedding goes by. Attention goes by what is here.
    """

    bounds: torch.Tensor
    """``MicroBatch.cu_seqlens``"""
    row: RowAttention
    """``MicroBatch.row``"""
    expand: torch.Tensor | None
    """``MicroBatch.expand``"""
    contract: torch.Tensor | None
    """``MicroBatch.contract``"""
    parts: torch.Tensor | None = None
    """``MicroBatch.parts``. What the ranks' parts are gathered to is in this order."""
    rank: int = 0
    """Which of ``parts`` this rank has."""

    @property
    def _tokens(self) -> np.ndarray:
        """int64 [t'], where each token of the whole sequences is among those of the row (or of the gathered parts)."""
        tokens = np.arange(int(self.bounds[-1])) if self.expand is None else self.expand.numpy()
        return tokens if self.parts is None else np.argsort(self.parts.flatten().numpy())[tokens]

    @functools.cached_property
    def own_queries(self) -> OwnQueries:
        """What this rank's tokens attend to, for attention that has the keys and values of all ranks' parts.

        A token of a shared prompt attends in one of the sequences that share it, as ``contract`` says.
        """
        assert self.parts is not None
        bounds, own = self.bounds.numpy(), self.parts[self.rank].numpy()
        places = own if self.contract is None else self.contract.numpy()[own]
        order = np.argsort(places)
        places = places[order]
        sequences = np.searchsorted(bounds, places, side="right") - 1
        offsets = places - bounds[sequences]
        is_begin = (np.diff(places, prepend=-2) != 1) | (offsets == 0)
        runs = []
        for begin, end in itertools.pairwise([*np.flatnonzero(is_begin), len(places)]):
            for first in range(begin, end, QUERIES_AT_ONCE):
                last = min(first + QUERIES_AT_ONCE, end) - 1
                runs.append(Run(int(sequences[first]), int(offsets[first]), int(offsets[last]) + 1))
        seen = {run.sequence: run.stop for run in runs}  # the last run of a sequence sees most of it
        tokens = self._tokens
        keys = np.concatenate([tokens[bounds[i] : bounds[i] + stop] for i, stop in seen.items()])
        return OwnQueries(torch.from_numpy(order), runs, torch.from_numpy(keys), seen)


class Run(NamedTuple):
    """Neighbouring tokens of one whole sequence, ``start`` to ``stop``, each of which attends to all before it."""

    sequence: int
    start: int
    stop: int


class OwnQueries(NamedTuple):
    """The tokens of a rank's part, and what they see of the others'."""

    order: torch.Tensor
    """int64 [t / CP], its tokens in the order of the whole sequences, which is that of the runs."""
    runs: list[Run]
    keys: torch.Tensor
    """int64 [k], where the beginnings of the sequences are among the gathered parts, one after the other."""
    seen: dict[int, int]
    """How many tokens of a sequence these are, by its index."""


def packed_sequences(batch: MicroBatch) -> PackedSequences:
    """What attention is told of a micro-batch that is one row.

    Raises:
        ValueError: its sequences are padded rows.
    """
    bounds, row, longest = batch.cu_seqlens, batch.row, batch.longest
    if bounds is None or row is None:
        raise ValueError("a micro-batch of padded rows needs no description of its sequences")
    whole = bounds
    if _needs_positions(batch):
        bounds = bounds.new_tensor([0, batch.input_ids.shape[1]])
    return PackedSequences(
        qkv_format="thd",
        cu_seqlens_q=bounds,
        cu_seqlens_kv=bounds,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
        bounds=whole,
        row=row,
        expand=batch.expand,
        contract=batch.contract,
        parts=batch.parts,
        rank=0 if batch.parts is None else parallel.context_parallel_rank(),
    )


def _needs_positions(batch: MicroBatch) -> bool:
    """Whether the row's tokens stand elsewhere than mcore counts: from each sequence's start, one by one.

    A completion starts where its shared prompt ends. Of a row that is cut, mcore knows where TransformerEngine's part
    of it stands, and does it by kernels that a CPU has not.
    """
    return batch.expand is not None or (batch.parts is not None and device().type == "cpu")


@contextlib.contextmanager
def rotary_positions(module: GPTModel, batch: MicroBatch) -> Iterator[None]:
    """Inside, the rotary embedding has an angle for each token of a row that mcore can't count out by itself."""
    if not _needs_positions(batch):
        yield
        return

    def of_each_token(_module: torch.nn.Module, _arguments: Any, angles: torch.Tensor) -> torch.Tensor:
        return angles.index_select(-4, batch.position_ids[0])  # [s, 1, 1, d], or of several bases [n, s, 1, 1, d]

    hook = module.rotary_pos_emb.register_forward_hook(of_each_token)
    try:
        yield
    finally:
        hook.remove()
