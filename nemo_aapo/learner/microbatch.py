"""A micro-batch's tensors: sequences as padded rows, end to end in one row, or with prompts that they share.

The completions of a group have their prompt in common, and what a transformer computes of a token depends on the tokens
before it alone. So the prompt need not be computed once for each of them: a bundle of completions stands in the row
behind one copy of it. Only attention sees whole sequences: ``expand`` spreads queries, keys and values to them, and
``contract`` takes its results back to the row. Loss and gradients are the same (up to rounding): each completion's
gradient flows into the one copy. The idea is that of Prefix Grouper (arXiv 2506.05433).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from nemo_aapo.mcore.micro_batch import MicroBatch
from nemo_aapo.types import Sample

Bundle = tuple[Sample, ...]
"""Completions of one prompt that stand in a row behind one copy of it. One alone is a sequence as any other."""


def bundled(samples: Sequence[Sample], budget: int) -> list[Bundle]:
    """Cut a group into bundles of at most ``budget`` tokens, longest first, as few as that order makes.

    Args:
        samples: with one prompt. One that exceeds the budget is a bundle of its own.
        budget: of whole sequences, the prompt counted with each: what attention sees stays within it.
    """
    bundles: list[list[Sample]] = []
    room = 0
    for sample in sorted(samples, key=lambda sample: -sample.length):
        if sample.length > room:
            bundles.append([])
            room = budget
        bundles[-1].append(sample)
        room -= sample.length
    return [tuple(bundle) for bundle in bundles]


def length_of(bundle: Sequence[Sample]) -> int:
    """Tokens of its whole sequences, the prompt counted with each."""
    return sum(sample.length for sample in bundle)


def row_length_of(bundle: Bundle) -> int:
    """Tokens that it takes in a row."""
    return length_of(bundle) - (len(bundle) - 1) * len(bundle[0].prompt_ids)


def pad_to(length: int, multiple: int) -> int:
    """The next multiple of ``multiple`` at or above ``length``."""
    return -(-length // multiple) * multiple


def collate(
    bundles: Sequence[Bundle],
    token_weights: Sequence[float],
    *,
    multiple: int,
    device: torch.device,
    packed: bool = False,
) -> MicroBatch:
    """One micro-batch of these bundles' samples; ``token_weights[k]`` is the weight of each completion token of the
    k-th of them.

    Without samples it is one dummy sequence without a token to train on, so that all ranks run the same schedule.

    Args:
        multiple: what the tokens of a row are padded to.
        packed: one row. Padded rows take bundles of one sample.
    """
    samples = list(itertools.chain(*bundles))
    rows = (_pack if packed else _pad)(bundles, multiple)
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
        longest=int(rows.position_ids.max()) + 1,
        positions=flat(rows.predictions, torch.int64),
        targets=flat([sample.completion_ids for sample in samples], torch.int64),
        lengths=tuple(lengths),
        advantages=flat([np.full(n, s.advantage) for n, s in zip(lengths, samples, strict=True)], torch.float32),
        weights=flat([np.full(n, w) for n, w in zip(lengths, token_weights, strict=True)], torch.float32),
        rollout_logprobs=flat([sample.rollout_logprobs for sample in samples], torch.float32),
        expand=index(rows.expand),
        contract=index(rows.contract),
    )


@dataclass(frozen=True, slots=True)
class _Rows:
    """Sequences laid out as the model takes them."""

    ids: np.ndarray
    """int64 [b, s]"""
    position_ids: np.ndarray
    """int64 [b, s]"""
    predictions: Sequence[np.ndarray]
    """For each sequence: where its completion tokens are predicted, in the flattened hidden states [s * b, h]."""
    bounds: tuple[int, ...] | None = None
    """``MicroBatch.cu_seqlens``"""
    expand: np.ndarray | None = None
    contract: np.ndarray | None = None


def _pad(bundles: Sequence[Bundle], multiple: int) -> _Rows:
    """A row for each sequence, padded on the right; hidden states are flattened as [s, b]."""
    samples = [sample for (sample,) in bundles]
    rows = max(len(samples), 1)
    longest = pad_to(max([sample.length for sample in samples], default=1), multiple)
    ids = np.zeros((rows, longest), dtype=np.int64)
    predictions = []
    for row, sample in enumerate(samples):
        ids[row, : sample.length] = np.concatenate([sample.prompt_ids, sample.completion_ids])
        # the state at one token predicts the next
        first = len(sample.prompt_ids) - 1
        predictions.append((first + np.arange(len(sample.completion_ids))) * rows + row)
    return _Rows(ids, np.tile(np.arange(longest), (rows, 1)), predictions)


def _pack(bundles: Sequence[Bundle], multiple: int) -> _Rows:
    """One row of all bundles. What pads it at the end is a sequence of its own: none attends to it."""
    ids, positions, predictions, sequences = [], [], [], []
    end = 0
    for bundle in bundles:
        prompt = bundle[0].prompt_ids
        at_prompt = end + np.arange(len(prompt))
        ids.append(prompt)
        positions.append(np.arange(len(prompt)))
        end += len(prompt)
        for sample in bundle:
            length = len(sample.completion_ids)
            at_completion = end + np.arange(length)
            ids.append(sample.completion_ids)
            positions.append(len(prompt) + np.arange(length))
            sequences.append(np.concatenate([at_prompt, at_completion]))
            predictions.append(np.concatenate([at_prompt[-1:], at_completion])[:length])
            end += length
    if padding := pad_to(max(end, 1), multiple) - end:
        ids.append(np.zeros(padding))
        positions.append(np.arange(padding))
        sequences.append(end + np.arange(padding))
    bounds = np.cumsum([0, *map(len, sequences)])
    expand = np.concatenate(sequences)
    contract = np.empty(end + padding, np.int64)
    # backwards, so that a prompt's results are those of its first sequence
    contract[expand[::-1]] = np.arange(len(expand))[::-1]
    shared = len(expand) > len(contract)
    return _Rows(
        ids=np.concatenate(ids).astype(np.int64)[None],
        position_ids=np.concatenate(positions)[None],
        predictions=predictions,
        bounds=tuple(bounds.tolist()),
        expand=expand if shared else None,
        contract=contract if shared else None,
    )
