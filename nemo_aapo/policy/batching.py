"""From samples to micro-batches under one token budget, balanced over the data-parallel ranks.

``max_tokens_per_microbatch`` alone decides. The plan is a pure function of the samples' lengths, so that every rank
works out the same one; only then do sequences move to the rank that trains on them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from nemo_aapo.types import Sample


@dataclass(frozen=True, slots=True, eq=False)
class MicroBatch:
    """Sequences, and the n completion tokens of theirs that are scored or trained on.

    Either b rows, one for each sequence, padded on the right to s tokens; or packed: one row (b = 1) of sequences end
    to end (mcore's ``thd``). The n tokens are flat, sequence by sequence.
    """

    input_ids: torch.Tensor
    """int64 [b, s]"""
    position_ids: torch.Tensor
    """int64 [b, s], counted from each sequence's start"""
    cu_seqlens: torch.Tensor | None
    """Packed: int32, where each sequence starts in the row, and the row's end. None: padded rows."""
    longest: int
    """Tokens of the longest sequence."""
    positions: torch.Tensor
    """int64 [n], where in the flattened hidden states [s * b, h] the prediction of each token stands."""
    targets: torch.Tensor
    """int64 [n], the tokens."""
    lengths: tuple[int, ...]
    """Completion tokens of each row; they sum to n."""
    advantages: torch.Tensor
    """float32 [n], A* of the token's completion."""
    weights: torch.Tensor
    """float32 [n], the token's share of the loss: 1 / (global denominator)."""
    rollout_logprobs: torch.Tensor
    """float32 [n], the engine's."""
    old_logprobs: torch.Tensor | None = None
    """float32 [n], the learner's before the first of several updates."""
    reference_logprobs: torch.Tensor | None = None
    """float32 [n], the frozen reference's (for the KL term)."""

    def replace(self, **changes) -> MicroBatch:
        """A copy with some fields set."""
        return dataclasses.replace(self, **changes)


def plan(
    lengths: Sequence[int], *, budget: int, data_parallel_size: int, multiple: int = 1, packed: bool = False
) -> list[list[list[int]]]:
    """Deal sequences into micro-batches of at most ``budget`` tokens, padding included; as many on every rank.

    Longest first. Padded rows: the sorted sequences are cut into micro-batches, so that neighbours pad each other
    little. Packed: each sequence goes to the first micro-batch that has room for it. These go to the rank with the
    least work so far, where work counts tokens and, for attention, squared lengths. Dealing sequences first and cutting
    on each rank balances better on paper, but pads more: the busiest rank then has 6 to 25 % more padded tokens
    (measured on log-normal lengths).

    Args:
        lengths: prompt + completion tokens of each sequence of the whole optimizer batch.
        budget: a micro-batch's tokens (``tokens_of``) stay within it.
        data_parallel_size: number of ranks to deal to.
        multiple: what token counts are padded to: each sequence's or, packed, the micro-batch's.
        packed: sequences stand end to end in one row.

    Returns:
        ``plan[rank][micro-batch]``: indices into ``lengths``. A micro-batch is empty where there are fewer sequences
        than ranks.

    Raises:
        ValueError: one sequence alone exceeds the budget.
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    if order and pad_to(lengths[order[0]], multiple) > budget:
        raise ValueError(f"a sequence of {lengths[order[0]]} tokens exceeds max_tokens_per_microbatch={budget}")
    batches: list[list[int]] = []
    sums: list[int] = []
    for i in order:
        # of padded rows only the newest can have room: the ones before it were left for want of it
        for k in range(0 if packed else max(len(batches) - 1, 0), len(batches)):
            rows = (len(batches[k]) + 1) * pad_to(lengths[batches[k][0]], multiple)
            if (pad_to(sums[k] + lengths[i], multiple) if packed else rows) <= budget:
                batches[k].append(i)
                sums[k] += lengths[i]
                break
        else:
            batches.append([i])
            sums.append(lengths[i])
    _split_until_divisible(batches, data_parallel_size)
    return _deal(batches, lengths, data_parallel_size)


def tokens_of(lengths: Sequence[int], multiple: int, packed: bool) -> int:
    """Tokens that the forward pass of a micro-batch of these sequences sees, padding included."""
    if packed:
        return pad_to(sum(lengths), multiple)
    return len(lengths) * pad_to(max(lengths, default=0), multiple)


def _split_until_divisible(batches: list[list[int]], ranks: int) -> None:
    """Halve the fullest micro-batches (or add empty ones) until each rank gets the same number, at least one."""
    while not batches or len(batches) % ranks:
        fullest = max(range(len(batches)), key=lambda k: len(batches[k]), default=None)
        if fullest is None or len(batches[fullest]) < 2:
            batches.append([])
            continue
        whole = batches[fullest]
        batches[fullest : fullest + 1] = [whole[: len(whole) // 2], whole[len(whole) // 2 :]]


def _deal(batches: list[list[int]], lengths: Sequence[int], ranks: int) -> list[list[list[int]]]:
    """Heaviest first, each to the rank with the least work that has room left."""
    mean = max(1.0, float(np.mean(lengths)) if len(lengths) else 1.0)

    def work(batch: list[int]) -> float:
        return sum(lengths[i] * (1.0 + lengths[i] / mean) for i in batch)

    dealt: list[list[list[int]]] = [[] for _ in range(ranks)]
    load = [0.0] * ranks
    share = len(batches) // ranks
    for batch in sorted(batches, key=lambda batch: (-work(batch), batch)):
        target = min((r for r in range(ranks) if len(dealt[r]) < share), key=lambda r: (load[r], r))
        dealt[target].append(batch)
        load[target] += work(batch)
    return dealt


def pad_to(length: int, multiple: int) -> int:
    """The next multiple of ``multiple`` at or above ``length``."""
    return -(-length // multiple) * multiple


def collate(
    samples: Sequence[Sample],
    token_weights: Sequence[float],
    *,
    multiple: int,
    device: torch.device,
    packed: bool = False,
) -> MicroBatch:
    """One micro-batch of these samples; ``token_weights[k]`` is the weight of each completion token of sample k.

    Without samples it is one dummy sequence without a token to train on, so that all ranks run the same schedule.
    """
    sequences = [np.concatenate([sample.prompt_ids, sample.completion_ids]) for sample in samples]
    rows = (_pack if packed else _pad)(sequences or [np.zeros(1)], multiple)
    lengths = [len(sample.completion_ids) for sample in samples]
    # the state at one token predicts the next
    positions = [
        start + (len(sample.prompt_ids) - 1 + np.arange(length)) * rows.stride
        for start, sample, length in zip(rows.starts, samples, lengths, strict=False)
    ]

    def flat(parts: Sequence[np.ndarray], dtype: torch.dtype) -> torch.Tensor:
        joined = np.concatenate(parts) if parts else np.zeros(0)
        return torch.as_tensor(joined, dtype=dtype).to(device)

    return MicroBatch(
        input_ids=torch.from_numpy(rows.ids).to(device),
        position_ids=torch.from_numpy(rows.position_ids).to(device),
        cu_seqlens=None if rows.bounds is None else torch.tensor(rows.bounds, dtype=torch.int32).to(device),
        longest=int(rows.position_ids.max()) + 1,
        positions=flat(positions, torch.int64),
        targets=flat([sample.completion_ids for sample in samples], torch.int64),
        lengths=tuple(lengths),
        advantages=flat([np.full(n, s.advantage) for n, s in zip(lengths, samples, strict=True)], torch.float32),
        weights=flat([np.full(n, w) for n, w in zip(lengths, token_weights, strict=True)], torch.float32),
        rollout_logprobs=flat([sample.rollout_logprobs for sample in samples], torch.float32),
    )


@dataclass(frozen=True, slots=True)
class _Rows:
    """Sequences laid out as the model takes them."""

    ids: np.ndarray
    """int64 [b, s]"""
    position_ids: np.ndarray
    """int64 [b, s]"""
    starts: Sequence[int]
    """Where each sequence begins in the flattened hidden states [s * b, h]."""
    stride: int
    """How far apart its tokens are there."""
    bounds: tuple[int, ...] | None = None
    """``MicroBatch.cu_seqlens``"""


def _pad(sequences: Sequence[np.ndarray], multiple: int) -> _Rows:
    """A row for each sequence, padded on the right; hidden states are flattened as [s, b]."""
    longest, rows = pad_to(max(map(len, sequences)), multiple), len(sequences)
    ids = np.zeros((rows, longest), dtype=np.int64)
    for row, sequence in zip(ids, sequences, strict=True):
        row[: len(sequence)] = sequence
    return _Rows(ids, np.tile(np.arange(longest), (rows, 1)), starts=range(rows), stride=rows)


def _pack(sequences: Sequence[np.ndarray], multiple: int) -> _Rows:
    """One row of all sequences, end to end. What pads it at the end is a sequence of its own: none attends to it."""
    bounds = [0, *np.cumsum([len(sequence) for sequence in sequences]).tolist()]
    starts = bounds[:-1]
    if padding := pad_to(bounds[-1], multiple) - bounds[-1]:
        sequences = [*sequences, np.zeros(padding)]
        bounds.append(bounds[-1] + padding)
    ids = np.concatenate(sequences).astype(np.int64)
    position_ids = np.concatenate([np.arange(len(sequence)) for sequence in sequences])
    return _Rows(ids[None], position_ids[None], starts, stride=1, bounds=tuple(bounds))


def padding_fraction(
    batches: Sequence[Sequence[int]], lengths: Sequence[int], multiple: int = 1, packed: bool = False
) -> float:
    """Share of the forward pass's tokens that is padding."""
    padded = sum(tokens_of([lengths[i] for i in b], multiple, packed) for b in batches if b)
    return 1.0 - sum(lengths[i] for b in batches for i in b) / padded if padded else 0.0
