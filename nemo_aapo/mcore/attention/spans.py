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
    """int64 [b, s], which token of the row stands there."""
    keys: torch.Tensor
    """int64 [b, u]"""
    padding: torch.Tensor
    """int64, which of the b * s queries are."""
    mask: torch.Tensor | None
    """float32 [b, 1, 1, u], minus infinity at keys that are padding; None where no query would see one."""


@dataclass(frozen=True, eq=False)
class Spans:
    """Queries and keys among the tokens of a row, cut into as many spans: a query sees keys of its own span alone."""

    queries: torch.Tensor
    """int32 [spans + 1], where each span of queries starts and the last one ends."""
    keys: torch.Tensor
    """int32 [spans + 1], the same of the keys."""
    most_queries: int
    """Queries of the longest span."""
    most_keys: int
    query_tokens: torch.Tensor | None = None
    """int64 [q], which tokens of the row the queries are. None: all of them, queries and keys, and a span is causal: a
    token sees those up to itself."""
    key_tokens: torch.Tensor | None = None
    """int64 [k], which the keys are."""

    @classmethod
    def causal(cls, bounds: np.ndarray, device: torch.device) -> Spans:
        """Of all tokens of a row. bounds: int [spans + 1], in host memory."""
        on_device, longest = torch.from_numpy(bounds.astype(np.int32)).to(device), int(np.diff(bounds).max())
        return cls(on_device, on_device, longest, longest)

    @classmethod
    def between(cls, queries: np.ndarray, keys: np.ndarray, device: torch.device) -> Spans:
        """Of the tokens from queries[i, 0] up to queries[i, 1], which see those from keys[i, 0] up to keys[i, 1]."""
        q_lengths, k_lengths = (np.diff(pairs)[:, 0] for pairs in (queries, keys))
        q_bounds, k_bounds = (torch.from_numpy(np.cumsum([0, *n], dtype=np.int32)) for n in (q_lengths, k_lengths))
        q, k = (torch.from_numpy(np.concatenate([np.arange(*p) for p in pairs])) for pairs in (queries, keys))
        longest = int(q_lengths.max()), int(k_lengths.max())
        return cls(q_bounds.to(device), k_bounds.to(device), *longest, q.to(device), k.to(device))

    @property
    def is_causal(self) -> bool:
        """Whether a token sees those up to itself, and not all keys of its span."""
        return self.query_tokens is None

    @functools.cached_property
    def batches(self) -> tuple[list[Batch], torch.Tensor | None, torch.Tensor | None]:
        """For kernels that take padded rows, on a CPU: spans of like lengths together.

        Returns:
            The batches; and int64, where each query, and each key, is among those of all batches, flattened. None: they
            stand there in their order.
        """
        bounds, of_row = (self.queries.numpy(), self.keys.numpy()), (self.query_tokens, self.key_tokens)
        batches, places, done = [], [np.empty(ends[-1], np.int64) for ends in bounds], [0, 0]
        for spans in _like_lengths(*map(np.diff, bounds)):
            rows = [_padded(ends, spans) for ends in bounds]
            for side, (tokens, is_padding) in enumerate(rows):
                places[side][tokens[~is_padding]] = done[side] + np.flatnonzero(~is_padding)
                done[side] += tokens.size
            beyond, mask = torch.from_numpy(rows[1][1]), None
            if not self.is_causal and beyond.any():  # a causal span's padding stands behind all that see it
                mask = torch.zeros(beyond.shape).masked_fill_(beyond, -torch.inf)[:, None, None]
            held = (torch.from_numpy(tokens) for tokens, _ in rows)
            queries, keys = (t if of is None else of[t] for t, of in zip(held, of_row, strict=True))
            batches.append(Batch(queries, keys, torch.from_numpy(np.flatnonzero(rows[0][1])), mask))
        in_order = [
            len(place) == count and (np.diff(place) > 0).all() for place, count in zip(places, done, strict=True)
        ]
        q, k = (None if same else torch.from_numpy(place) for same, place in zip(in_order, places, strict=True))
        return batches, q, k


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
        edges = np.asarray(groups).reshape(-1, 3)
        shared = Spans.between(edges[:, 1:], edges[:, :2], device) if groups else None
        return cls(Spans.causal(np.asarray(segments), device), shared)


def _padded(bounds: np.ndarray, spans: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """int64 [b, s], the tokens of some spans as padded rows, and bool [b, s], which are padding."""
    starts, last = bounds[spans][:, None].astype(np.int64), bounds[spans + 1][:, None].astype(np.int64) - 1
    tokens = starts + np.arange(int((last - starts).max()) + 1)
    return np.minimum(tokens, last), tokens > last


def _like_lengths(queries: np.ndarray, keys: np.ndarray) -> list[np.ndarray]:
    """Indices of spans: those of a batch have ``SHORTEST_OF_BATCH`` of its longest, in their queries and their keys."""
    batches: list[list[int]] = []
    for span in np.lexsort((-queries, -keys)):
        both = queries[[*batches[-1], span]] if batches else queries[:0]
        fits = batches and keys[span] >= SHORTEST_OF_BATCH * keys[batches[-1][0]]
        if fits and both.min() >= SHORTEST_OF_BATCH * both.max():
            batches[-1].append(span)
        else:
            batches.append([span])
    return [np.array(batch) for batch in batches]
