"""A KV cache with independent rows, and the attention that reads it.

mcore 0.16 offers two inference contexts. The static one keeps one offset for the whole batch, rotates all cached keys
anew in each step, and hides padding by a mask that TransformerEngine's attention ignores when it decodes. The dynamic
one is for CUDA and flash-attn only. In ``KVCache`` rows are independent, each sequence has positions 0, 1, 2, ... of
its own, and keys are stored rotated.

One forward pass takes a packed batch of T tokens: first one token for each decoding row, then drafts of some of them
(``speculation``), then whole prompts, one after the other. Everything but the attention treats them alike; it alone
pads drafts and prompts to a common width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


class Attention(Protocol):
    """What a decoder's layers need of a cache whose forward pass is laid out."""

    @property
    def logits_at(self) -> Tensor | None:
        """int64 [rows], which of the T tokens each running row's logits come from; None: token i is row i's."""

    def attend(self, layer: int, mixed: Tensor) -> Tensor:
        """See ``KVCache.attend``."""
        ...


_Masks = dict[int | None, Tensor | None]
"""By the window of a layer: minus infinity where a query does not see a token; None: each sees all."""


class _Drafts(NamedTuple):
    """The attention of a pass's drafts; int64, on the cache's device."""

    rows: Tensor
    """[n], the rows that have some."""
    square: Tensor
    """[n, width], which of the drafts each has, padded by its last."""
    real: Tensor
    """[drafts], which of the square's are no padding."""
    extent: int
    """How many tokens they read at most."""
    masks: _Masks
    """[n, 1, width * queries per key, extent]"""


class KVCache:
    """Keys and values of this rank's layers, and the layout of the forward pass that is under way."""

    def __init__(
        self,
        *,
        rows: int,
        length: int,
        heads: int,
        head_size: int,
        queries_per_key: int,
        angles: Sequence[Tensor],
        windows: Sequence[int | None],
        scale: float,
        dtype: torch.dtype,
    ) -> None:
        """
        Args:
            rows: sequences at a time. length: tokens that one of them may have.
            heads: key-value heads of this rank, each with ``queries_per_key`` query heads.
            angles: rotary angles of each layer, float32 [length, rotated part of a head], on the device of the cache.
            windows: keys that a token sees in each layer, its own among them; None: all before it.
            scale: factor on the attention scores, before the softmax.
            dtype: the dtype of keys and values.
        """
        device = angles[0].device
        # A token's keys and values lie side by side, so that one copy writes them. The memory starts as zeros because
        # attention multiplies masked entries by 0, and 0 * NaN would be NaN.
        self.kv = torch.zeros(len(angles), rows, length, heads, 2, head_size, dtype=dtype, device=device)
        self.logits_at: Tensor | None = None
        """int64 [rows], which of the T tokens each running row's logits come from; None: token i is row i's."""
        self._queries, self._scale = queries_per_key, scale
        self._windows = windows
        different = {id(of_layer): of_layer for of_layer in angles}
        self._table_of_layer = [list(different).index(id(of_layer)) for of_layer in angles]
        self._tables = [_turns(of_layer, queries_per_key) for of_layer in different.values()]
        self._kept: Tensor | None = None

    def begin(
        self,
        tokens: np.ndarray,
        lengths: np.ndarray,
        prompts: Sequence[np.ndarray],
        rows_per_prompt: Sequence[int],
        drafts: np.ndarray | None = None,
        first_row: int | None = None,
    ) -> Tensor:
        """Lay out one forward pass.

        Args:
            tokens: int64 [D], what the decoding rows 0 .. R-1 feed: one of each, then the drafts, row by row.
            lengths: int64 [R], how many tokens they have in the cache. What lies behind those is overwritten.
            prompts: token ids of the N prompts to prefill.
            rows_per_prompt: [N], how many of the rows from ``first_row`` on each prompt fills.
            drafts: int64 [R], how many of the tokens are drafts of each decoding row; None: there are none.
            first_row: R by default.

        Returns:
            int64 [T] token ids. T = D + the prompts' lengths.
        """
        device = self.kv.device
        self._rows, self._decoding = len(lengths), len(tokens)
        self._prompts = len(prompts)
        self._first_row = self._rows if first_row is None else first_row
        positions = lengths
        if self._decoding:
            positions = self._lay_out_decoding(lengths, drafts)
        self.logits_at = None
        if prompts:
            self._lay_out_prefill(np.array([len(prompt) for prompt in prompts]), rows_per_prompt)
            tokens = np.concatenate([tokens, *prompts])
            positions = np.concatenate([positions, *(np.arange(len(prompt)) for prompt in prompts)])
        at = torch.from_numpy(positions).to(device)
        self._turns_now = [(cos[at], sin[at]) for cos, sin in self._tables]
        return torch.from_numpy(tokens).to(device)

    def _lay_out_decoding(self, lengths: np.ndarray, drafts: np.ndarray | None) -> np.ndarray:
        """Work out where the decoding rows write, and how far each token reads.

        Returns:
            int64 [D], the positions of their tokens.
        """
        positions, rows, row_length = lengths, np.arange(self._rows), self.kv.shape[2]
        self._drafts = None
        if drafts is not None and self._decoding > self._rows:
            drafting, firsts = rows.repeat(drafts), np.cumsum(drafts) - drafts
            behind = lengths[drafting] + np.arange(len(drafting)) - firsts[drafting] + 1
            rows, positions = np.concatenate([rows, drafting]), np.concatenate([lengths, behind])
            self._drafts = self._lay_out_drafts(behind, firsts, drafts)
        self._write_at = torch.from_numpy(rows * row_length + positions).to(self.kv.device)
        self._extent, self._masks = self._reach(lengths)
        return positions

    def _reach(self, last: np.ndarray) -> tuple[int, _Masks]:
        """How far queries at positions ``last`` int64 [rows, ...] read.

        Returns:
            The most tokens that one of them reads, and masks [rows, 1, queries, tokens].
        """
        extent = int(last.max()) + 1
        return extent, {window: self._mask(last, extent, window) for window in set(self._windows)}

    def _mask(self, last: np.ndarray, extent: int, window: int | None) -> Tensor | None:
        places, own = np.arange(extent), last[..., None]
        unseen = places > own
        if window is not None:
            unseen |= places <= own - window
        if not unseen.any():
            return None
        mask = torch.from_numpy(np.where(unseen, np.float32(-np.inf), np.float32(0)))
        return mask.reshape(len(last), 1, -1, extent).to(self.kv)

    def _lay_out_drafts(self, positions: np.ndarray, firsts: np.ndarray, counts: np.ndarray) -> _Drafts:
        """Work out the attention of the drafts, which is padded to the same number in each row that has some.

        Args:
            positions: int64 [drafts]. firsts, counts: int64 [R], where a row's drafts are among them, and how many.
        """
        rows = np.flatnonzero(counts)
        counts = counts[rows]
        width = int(counts.max())
        square = firsts[rows, None] + np.minimum(np.arange(width), counts[:, None] - 1)
        extent, masks = self._reach(positions[square].repeat(self._queries, axis=1))
        real = np.flatnonzero(np.arange(width) < counts[:, None])
        on_device = [torch.from_numpy(x).to(self.kv.device) for x in (rows, square, real)]
        return _Drafts(on_device[0], on_device[1], on_device[2], extent, masks)

    def _lay_out_prefill(self, lengths: np.ndarray, rows_per_prompt: Sequence[int]) -> None:
        """Work out where the prompts lie in the packed batch, and how attention pads them to a common width.

        Args:
            lengths: int64 [N], the prompts' tokens.
        """
        device, width = self.kv.device, int(lengths.max())
        starts = np.cumsum(lengths) - lengths
        ends = np.repeat(starts + lengths - 1, rows_per_prompt)
        self.logits_at = torch.from_numpy(np.concatenate([np.arange(self._decoding), self._decoding + ends])).to(device)
        self._prompt_of_row = torch.from_numpy(np.repeat(np.arange(len(lengths)), rows_per_prompt)).to(device)
        self._prompt_masks = {window: _windowed(width, window, device) for window in set(self._windows)}
        # [N, width]: which packed token; a prompt's last one stands in for its padding
        columns = np.minimum(np.arange(width), lengths[:, None] - 1)
        self._padded = torch.from_numpy(starts[:, None] + columns).to(device)
        self._real = torch.from_numpy(np.flatnonzero(np.arange(width) < lengths[:, None])).to(device)

    def attend(self, layer: int, mixed: Tensor) -> Tensor:
        """Rotate, store keys and values, and attend to what each sequence has.

        Args:
            layer: index on this rank.
            mixed: [T, heads, queries per key + 2, head size]: for each key-value head its queries, its key, its value.

        Returns:
            [T, heads * queries per key * head size]
        """
        mixed, cut, parts = self._rotate(layer, mixed), self._decoding, []
        if cut:
            parts.append(self._decode(layer, mixed[:cut]))
        if self._prompts:
            parts.append(self._prefill(layer, mixed[cut:]))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def attend_rows(self, layer: int, mixed: Tensor, lengths: Tensor) -> Tensor:
        """``attend`` on a GPU for one token of each of the first rows, without ``begin``.

        Args:
            layer: index on this rank.
            mixed: [R, heads, queries per key + 2, head size], as in ``attend``, contiguous.
            lengths: int64 [R], how many tokens the rows have in the cache.

        Returns:
            [R, heads * queries per key * head size]
        """
        from nemo_aapo.engines.megatron.kernels import decode_triton  # triton comes with torch's CUDA builds only

        cache = self.kv[layer]
        cos, sin = (table[:, 0, 0] for table in self._tables[self._table_of_layer[layer]])
        queries = decode_triton.rotate_and_store(mixed, lengths, cos, sin, cache)
        return decode_triton.attend(queries, cache, lengths, self._scale)

    def _rotate(self, layer: int, mixed: Tensor) -> Tensor:
        """Rotary embedding as in mcore's rope_utils, not interleaved, in float32; what is beyond the angles stays.

        All heads go in one piece, with cosines that were looked up once for all layers.
        """
        cos, sin = self._turns_now[self._table_of_layer[layer]]
        size = cos.shape[-1]
        x = mixed[..., :size].float()
        turned = (x * cos).addcmul_(x.roll(size // 2, dims=-1), sin).to(mixed.dtype)
        return turned if size == mixed.shape[-1] else torch.cat((turned, mixed[..., size:]), -1)

    def _decode(self, layer: int, mixed: Tensor) -> Tensor:
        """Attention of the decoding rows' tokens, each over everything before it in its row."""
        cache, queries, drafts = self.kv[layer], mixed[:, :, : self._queries], self._drafts
        window = self._windows[layer]
        cache.flatten(0, 1).index_copy_(0, self._write_at, mixed[:, :, self._queries :])
        out = self._attend(queries[: self._rows], cache[: self._rows], self._extent, self._masks[window]).flatten(1)
        if drafts is None:
            return out
        everyone = len(drafts.rows) == self._rows
        read = cache[: self._rows] if everyone else cache[drafts.rows, : drafts.extent]
        # [rows with drafts, heads, width * queries per key, head size]
        queries = queries[self._rows :][drafts.square].transpose(1, 2).flatten(2, 3)
        behind = self._attend(queries, read, drafts.extent, drafts.masks[window]).unflatten(2, (-1, self._queries))
        return torch.cat((out, behind.transpose(1, 2).flatten(0, 1)[drafts.real].flatten(1)))

    def _attend(self, queries: Tensor, cache: Tensor, extent: int, mask: Tensor | None) -> Tensor:
        """Attention over the first ``extent`` tokens of rows.

        Query heads that share a key take the place of query positions, so that one call serves them all.
        """
        keys, values = cache[:, :extent].transpose(1, 2).unbind(3)
        return F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, scale=self._scale)

    def _prefill(self, layer: int, mixed: Tensor) -> Tensor:
        """Attention within whole prompts. They are padded at the end, where the causal mask hides the padding."""
        mixed = mixed[self._padded]  # [N, width, heads, queries per key + 2, head size]
        rows = slice(self._first_row, self._first_row + len(self._prompt_of_row))
        new = mixed[:, :, :, self._queries :]
        self.kv[layer, rows, : new.shape[1]] = new[self._prompt_of_row]
        query = mixed[:, :, :, : self._queries].flatten(2, 3).transpose(1, 2)
        key, value = new.transpose(1, 2).unbind(3)
        grouped, mask = self._queries > 1, self._prompt_masks[self._windows[layer]]
        out = F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=mask is None, scale=self._scale, enable_gqa=grouped
        )
        return out.transpose(1, 2).flatten(0, 1)[self._real].flatten(1)

    def move(self, source: np.ndarray, target: np.ndarray, length: int) -> None:
        """Copy the first ``length`` tokens of the source rows to the target rows."""
        self.kv[:, torch.from_numpy(target), :length] = self.kv[:, torch.from_numpy(source), :length]

    def keep(self, row: int, length: int) -> None:
        """Keep a copy of a prompt's keys and values for those of its completions that have no row yet."""
        self._kept = self.kv[:, row, :length].clone()

    def restore(self, start: int, stop: int) -> None:
        """Fill rows with the prompt that ``keep`` copied."""
        assert self._kept is not None, "restore without keep"
        self.kv[:, start:stop, : self._kept.shape[1]] = self._kept[:, None]


def _turns(angles: Tensor, queries_per_key: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines [length, 1, queries per key + 2, rotated part]: queries and key turn, the value stays as it is.

    Args:
        angles: float32 [length, rotated part].
    """
    length, size = angles.shape
    cos = torch.ones(length, 1, queries_per_key + 2, size, device=angles.device)
    sin = torch.zeros_like(cos)
    cos[:, :, :-1] = angles.cos()[:, None, None]
    sin[:, :, :-1] = angles.sin()[:, None, None]
    sin[..., : size // 2].neg_()
    return cos, sin


def _windowed(length: int, window: int | None, device: torch.device) -> Tensor | None:
    """bool [length, length], the keys that each token of a sequence sees; None: all up to its own."""
    if window is None or window >= length:
        return None
    return torch.ones(length, length, dtype=torch.bool, device=device).tril_().triu_(1 - window)
