"""Which tokens of a row attend to which, as spans of neighbouring tokens."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

SHORTEST_OF_BATCH = 0.7
"""Spans are padded to one batch if each has at least this share of the longest one's length.

A lower share computes more padding, a higher one makes more batches; both cost time."""


class Batch(NamedTuple):
    """Spans of like lengths as padded rows; a span's last token stands in for its padding."""

    queries: torch.Tensor
    """int64 [b, s], which of the queries stands there."""
    keys: torch.Tensor
    """int64 [b, u], which of the keys; for a causal span those of the queries."""
    padding: torch.Tensor
    """int64, which of the b * s queries are padding."""


@dataclass(frozen=True, eq=False)
class Spans:
    """Queries and keys, each end to end, cut into as many spans: a query sees keys of its own span alone."""

    queries: torch.Tensor
    """int32 [spans + 1], where each span of queries starts and the last one ends."""
    keys: torch.Tensor
    """int32 [spans + 1], the same of the keys."""
    most_queries: int
    """Queries of the longest span."""
    most_keys: int
    causal: bool
    """True: queries and keys are the same tokens, and a token sees those up to itself. False: all keys of the span."""

    @classmethod
    def of(cls, queries: np.ndarray, keys: np.ndarray, causal: bool, device: torch.device) -> Spans:
        """From bounds int [spans + 1] in host memory."""
        bounds = [torch.from_numpy(b.astype(np.int32)).to(device) for b in (queries, keys)]
        return cls(*bounds, int(np.diff(queries).max()), int(np.diff(keys).max()), causal)

    @functools.cached_property
    def batches(self) -> tuple[list[Batch], torch.Tensor, torch.Tensor]:
        """For kernels that take padded rows, on a CPU.

        Causal spans of like lengths make a batch, since no query sees the padding behind it. Of the others each is a
        batch by itself.

        Returns:
            The batches; and int64, where each query, and each key, is among those of all batches, flattened.
        """
        queries, keys = self.queries.numpy(), self.keys.numpy()
        lengths = np.diff(queries)
        groups = _like_lengths(lengths) if self.causal else np.arange(len(lengths))[:, None]
        batches, place, done = [], np.empty(queries[-1], np.int64), 0
        for spans in groups:
            starts, last = queries[spans], queries[spans + 1] - 1
            width = int((last - starts).max()) + 1
            tokens = starts[:, None] + np.arange(width)
            padding = np.flatnonzero((tokens > last[:, None]).ravel())
            tokens = np.minimum(tokens, last[:, None]).astype(np.int64)
            seen = tokens if self.causal else np.arange(*keys[spans[0] :][:2], dtype=np.int64)[None]
            batches.append(Batch(*map(torch.from_numpy, (tokens, seen, padding))))
            for row, (start, end) in enumerate(zip(starts, last + 1, strict=True)):
                place[start:end] = done + row * width + np.arange(end - start)
            done += tokens.size
        places = torch.from_numpy(place)
        return batches, places, places if self.causal else torch.arange(int(keys[-1]))


@dataclass(frozen=True, eq=False)
class RowAttention:
    """What the tokens of a row attend to: their own segment, and completions to the prompt that they share.

    Segments are prompts and completions of groups, whole sequences, and padding. No token stands in two of them.
    """

    own: Spans
    """Of all tokens of the row, causal within each segment."""
    shared: Spans | None = None
    """A span for each group that shares its prompt: the queries are its completions, the keys its prompt. None: there
    is no such group."""
    completions: torch.Tensor | None = None
    """int64 [c], where in the row the queries of ``shared`` stand."""
    prompts: torch.Tensor | None = None
    """int64 [p], where its keys stand."""

    @classmethod
    def of(cls, segments: Sequence[int], groups: Sequence[tuple[int, int, int]], device: torch.device) -> RowAttention:
        """
        Args:
            segments: [segments + 1], where each starts and the last one ends; none is empty.
            groups: where the prompt of each group that shares it starts, where its completions start, and their end.

        Example:
            A prompt of 3 tokens with completions of 2 and 4, then a sequence of 5:
            ``RowAttention.of([0, 3, 5, 9, 14], [(0, 3, 9)], device)``.
        """
        bounds = np.asarray(segments)
        own = Spans.of(bounds, bounds, True, device)
        if not groups:
            return cls(own)
        edges = np.asarray(groups)
        keys, queries = (np.concatenate(([0], np.cumsum(lengths))) for lengths in np.diff(edges).T)
        at = [np.concatenate([np.arange(*ends) for ends in pairs]) for pairs in (edges[:, 1:], edges[:, :2])]
        return cls(own, Spans.of(queries, keys, False, device), *(torch.from_numpy(place).to(device) for place in at))


def _like_lengths(lengths: np.ndarray) -> list[np.ndarray]:
    """Indices of spans, longest first, cut where one is shorter than ``SHORTEST_OF_BATCH`` of its batch's first."""
    order = np.argsort(-lengths, kind="stable")
    batches, start = [], 0
    while start < len(order):
        fits = lengths[order] >= SHORTEST_OF_BATCH * lengths[order[start]]
        stop = int(np.count_nonzero(fits))
        batches.append(order[start:stop])
        start = stop
    return batches
