"""A micro-batch's tensors: sequences as padded rows, end to end in one row, or with prompts that they share.

The completions of a group have their prompt in common, and what a transformer computes of a token depends on the tokens
before it alone. So the prompt need not be computed once for each of them: a prefix group is completions behind one copy
of their prompt. In attention a completion's tokens see their own completion and that copy (``mcore/attention``). Loss
and gradients are the same (up to rounding): each completion's gradient flows into the one copy. The idea is that of
Prefix Grouper (arXiv 2506.05433).

Context parallelism cuts the row: each prefix group into twice as many chunks as there are ranks, of which a rank takes
one from the front and its mirror image from the back. A token attends to those before it, so that is equal work. Of
groups of one sequence it is TransformerEngine's cut (``thd_get_partitioned_indices``).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from nemo_aapo.mcore.attention.spans import RowAttention
from nemo_aapo.mcore.micro_batch import MicroBatch
from nemo_aapo.types import NO_ROUTE, Sample


@dataclass(frozen=True, slots=True, eq=False)
class PrefixGroup:
    """Completions of one prompt that lie in a row behind one copy of it; with one completion, an ordinary sequence.

    Example:
        A prompt of 10 tokens with completions of 4 and 3 tokens has ``sequence_tokens`` 14 + 13 = 27 and
        ``row_tokens`` 10 + 4 + 3 = 17.
    """

    samples: tuple[Sample, ...]
    """One or more, all of them with the same prompt."""

    @classmethod
    def separate(cls, samples: Sequence[Sample]) -> list[PrefixGroup]:
        """Each sample as a group of its own, so that no prompt is shared."""
        return [cls((sample,)) for sample in samples]

    @classmethod
    def split(cls, samples: Sequence[Sample], budget: int) -> list[PrefixGroup]:
        """Split the samples of one prompt into groups within a budget, longest first, as few as that order allows.

        Args:
            samples: one that exceeds the budget becomes a group of its own.
            budget: upper bound of each group's ``sequence_tokens``.
        """
        groups: list[list[Sample]] = []
        left = 0
        for sample in sorted(samples, key=lambda sample: -sample.length):
            if sample.length > left:
                groups.append([])
                left = budget
            groups[-1].append(sample)
            left -= sample.length
        return [cls(tuple(group)) for group in groups]

    @property
    def prompt_ids(self) -> np.ndarray:
        """int32 [P]"""
        return self.samples[0].prompt_ids

    @property
    def sequence_tokens(self) -> int:
        """Tokens of the whole sequences, the prompt counted with each: what attention sees."""
        return sum(sample.length for sample in self.samples)

    @property
    def row_tokens(self) -> int:
        """Tokens that the group takes in a row, the prompt counted once: what all but attention sees."""
        return self.sequence_tokens - (len(self.samples) - 1) * len(self.prompt_ids)


def pad_to(length: int, multiple: int) -> int:
    """The next multiple of ``multiple`` at or above ``length``."""
    return -(-length // multiple) * multiple


def collate(
    groups: Sequence[PrefixGroup],
    token_weights: Sequence[float] | np.ndarray,
    *,
    multiple: int,
    device: torch.device,
    packed: bool = False,
    context_parallel_size: int = 1,
) -> MicroBatch:
    """One micro-batch of these groups' samples.

    Without samples it is one dummy sequence without a token to train on, so that all ranks run the same schedule.

    Args:
        token_weights: float [samples], the weight in the loss of each completion token of a sample.
        multiple: what the tokens of a row are padded to.
        packed: True: one row of all groups. False: padded rows, which take groups of one sample only.
        context_parallel_size: ranks that the row is cut over. Each group is padded for that (``chunks``), whatever
            ``multiple`` is.

    Raises:
        ValueError: padded rows with groups of several samples, or to be cut.
    """
    samples = [sample for group in groups for sample in group.samples]
    rows = _pack(groups, multiple, context_parallel_size) if packed else _pad(groups, multiple, context_parallel_size)
    lengths = [len(sample.completion_ids) for sample in samples]

    def flat(parts: Sequence[np.ndarray], dtype: torch.dtype) -> torch.Tensor:
        joined = np.concatenate(parts) if parts else np.zeros(0)
        return torch.as_tensor(joined, dtype=dtype).to(device)

    def index(places: np.ndarray | None) -> torch.Tensor | None:
        return None if places is None else torch.from_numpy(places).to(device)

    return MicroBatch(
        input_ids=torch.from_numpy(rows.ids).to(device),
        position_ids=torch.from_numpy(rows.position_ids).to(device),
        cu_seqlens=None if rows.bounds is None else torch.tensor(rows.bounds, dtype=torch.int32).to(device),
        row=None if rows.segments is None else RowAttention.of(rows.segments, rows.groups, device),
        longest=int(rows.position_ids.max()) + 1,
        positions=flat(rows.predictions, torch.int64),
        targets=flat([sample.completion_ids for sample in samples], torch.int64),
        lengths=tuple(lengths),
        advantages=flat([np.full(n, s.advantage) for n, s in zip(lengths, samples, strict=True)], torch.float32),
        # A log-prob that is not finite says nothing of what sampled the token, which then has no part in the loss.
        weights=flat(
            [np.where(np.isfinite(s.rollout_logprobs), w, 0.0) for s, w in zip(samples, token_weights, strict=True)],
            torch.float32,
        ),
        versions=flat(
            [np.zeros(n) if s.versions is None else s.versions for n, s in zip(lengths, samples, strict=True)],
            torch.int64,
        ),
        rollout_logprobs=flat([sample.rollout_logprobs for sample in samples], torch.float32),
        expand=index(rows.expand),
        contract=index(rows.contract),
        parts=index(rows.parts),
        routes=index(_routes(samples, rows)),
    )


def chunks(context_parallel_size: int) -> int:
    """Pieces that context parallelism cuts a prefix group into; its tokens are padded to a multiple."""
    return 2 * context_parallel_size if context_parallel_size > 1 else 1


def mirrored_parts(bounds: Sequence[int], ranks: int) -> np.ndarray:
    """Which tokens of a row each rank takes: of 2 ``ranks`` chunks of each piece chunk r and chunk 2 ``ranks`` - 1 - r.

    Args:
        bounds: where each piece starts, and where the last one ends; pieces are multiples of 2 ``ranks`` tokens.

    Returns:
        int64 [ranks, tokens / ranks]

    Example:
        ``mirrored_parts([0, 4, 12], 2)`` is ``[[0, 3, 4, 5, 10, 11], [1, 2, 6, 7, 8, 9]]``.
    """
    pieces = [np.arange(start, end).reshape(2 * ranks, -1) for start, end in itertools.pairwise(bounds)]
    return np.stack([np.concatenate([piece[[r, -1 - r]].ravel() for piece in pieces]) for r in range(ranks)])


@dataclass(frozen=True, slots=True)
class _Rows:
    """Sequences laid out as the model takes them."""

    ids: np.ndarray
    """int64 [b, s]"""
    position_ids: np.ndarray
    """int64 [b, s]"""
    predictions: Sequence[np.ndarray]
    """Indices, for each sequence, of the flattened hidden states [s * b, h] that predict its completion tokens."""
    bounds: tuple[int, ...] | None = None
    """``MicroBatch.cu_seqlens``"""
    segments: Sequence[int] | None = None
    """Where each prompt, completion and whole sequence of the one row starts, and where the last one ends."""
    groups: Sequence[tuple[int, int, int]] = ()
    """As ``RowAttention.of`` takes them."""
    expand: np.ndarray | None = None
    """``MicroBatch.expand``"""
    contract: np.ndarray | None = None
    """``MicroBatch.contract``"""
    parts: np.ndarray | None = None
    """``MicroBatch.parts``"""


def _pad(groups: Sequence[PrefixGroup], multiple: int, ranks: int) -> _Rows:
    """A row for each sequence, padded on the right; hidden states are flattened as [s, b]."""
    if ranks > 1:
        raise ValueError("context parallelism cuts one row of sequences, not padded rows: packed=True is needed")
    samples = [sample for group in groups for sample in group.samples]
    if len(samples) > len(groups):
        raise ValueError("padded rows take one sample each: sharing prompts needs packed=True")
    rows = max(len(samples), 1)
    longest = pad_to(max([sample.length for sample in samples], default=1), multiple)
    ids = np.zeros((rows, longest), dtype=np.int64)
    predictions = []
    for row, sample in enumerate(samples):
        ids[row, : sample.length] = np.concatenate([sample.prompt_ids, sample.completion_ids])
        # The hidden state at one token predicts the next.
        first = len(sample.prompt_ids) - 1
        predictions.append((first + np.arange(len(sample.completion_ids))) * rows + row)
    return _Rows(ids, np.tile(np.arange(longest), (rows, 1)), predictions)


def _pack(groups: Sequence[PrefixGroup], multiple: int, ranks: int) -> _Rows:
    """One row of all groups. The padding at its end is a sequence of its own, so that none attends to it.

    What pads a group for context parallelism stands behind its last sequence, where no token of that attends to it.
    """
    ids, positions, predictions, sequences = [], [], [], []
    pieces, segments, sharing, end = [0], [0], [], 0
    for group in groups:
        prompt = group.prompt_ids
        if len(group.samples) > 1:
            segments.append(end + len(prompt))
        at_prompt = end + np.arange(len(prompt))
        ids.append(prompt)
        positions.append(np.arange(len(prompt)))
        end += len(prompt)
        for sample in group.samples:
            length = len(sample.completion_ids)
            at_completion = end + np.arange(length)
            ids.append(sample.completion_ids)
            positions.append(len(prompt) + np.arange(length))
            sequences.append(np.concatenate([at_prompt, at_completion]))
            predictions.append(np.concatenate([at_prompt[-1:], at_completion])[:length])
            end += length
            segments.append(end)
        if extra := pad_to(end - pieces[-1], chunks(ranks)) - (end - pieces[-1]):
            ids.append(np.zeros(extra))
            positions.append(len(sequences[-1]) + np.arange(extra))
            sequences[-1] = np.concatenate([sequences[-1], end + np.arange(extra)])
            end += extra
            segments[-1] = end
        if len(group.samples) > 1:
            sharing.append((int(at_prompt[0]), int(at_prompt[-1]) + 1, end))
        pieces.append(end)
    if padding := pad_to(max(end, 1), math.lcm(multiple, chunks(ranks))) - end:
        ids.append(np.zeros(padding))
        positions.append(np.arange(padding))
        sequences.append(end + np.arange(padding))
        pieces.append(end + padding)
        segments.append(end + padding)
    bounds = np.cumsum([0, *map(len, sequences)])
    expand = np.concatenate(sequences)
    contract = np.empty(end + padding, np.int64)
    # Written backwards, so that a shared prompt takes its results from its first sequence.
    contract[expand[::-1]] = np.arange(len(expand))[::-1]
    shared = len(expand) > len(contract)
    return _Rows(
        ids=np.concatenate(ids).astype(np.int64)[None],
        position_ids=np.concatenate(positions)[None],
        predictions=predictions,
        bounds=tuple(bounds.tolist()),
        segments=sorted(set(segments)),  # a completion without a token is none
        groups=sharing,
        expand=expand if shared else None,
        contract=contract if shared else None,
        parts=mirrored_parts(pieces, ranks) if ranks > 1 else None,
    )


def _routes(samples: Sequence[Sample], rows: _Rows) -> np.ndarray | None:
    """``MicroBatch.routes``; None if no sample has any. Of a shared prompt all samples have the same."""
    width = next((sample.routes.prompt.shape[1:] for sample in samples if sample.routes), None)
    if width is None:
        return None
    stride = len(rows.ids)  # a row's neighbours stand so far apart in the flattened hidden states
    routes = np.full((rows.ids.size, *width), NO_ROUTE, np.uint8)
    for sample, at in zip(samples, rows.predictions, strict=True):
        if sample.routes:
            routes[at[0] - stride * np.arange(len(sample.prompt_ids))[::-1]] = sample.routes.prompt
            routes[at[1:]] = sample.routes.completion
    return routes
