"""mcore's attention on a CPU, for padded rows, packed sequences, and rows that context parallelism cuts.

Of a cut row each rank has queries, keys and values of its tokens. Either they are exchanged for those of all tokens and
some of the heads (all-to-all, as in DeepSpeed-Ulysses, arXiv 2309.14509), so that attention stays as it is; or, where
key-value heads are fewer than ranks, every rank gets the keys and values of all tokens, for its own queries.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.tensor_parallel.mappings import all_to_all, gather_from_sequence_parallel_region
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnMaskType
from torch.utils.checkpoint import checkpoint

from nemo_aapo.distributed import parallel
from nemo_aapo.mcore.attention.merged import attend
from nemo_aapo.mcore.packing import PackedSequences


class LocalAttention(DotProductAttention):
    """mcore's attention by torch's kernel, which holds no scores; also for packed sequences.

    Packed, which mcore leaves to TransformerEngine, each sequence attends to itself alone: there is no mask that a
    mistake could leak through.
    """

    def __init__(self, config: Any, *arguments: Any, **more: Any) -> None:
        uncut = copy.copy(config)
        uncut.context_parallel_size = 1  # mcore's own asserts that it is
        super().__init__(uncut, *arguments, **more)
        window = self.scale_mask_softmax.window_size
        self.window: int | None = None if window is None else window[0] + 1
        """Keys that a token sees, its own among them; None: all before it."""

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        attn_mask_type: Any = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: PackedSequences | None = None,
    ) -> torch.Tensor:
        """Padded: as in mcore. Packed: query [t, heads, size], key and value [t, groups, size] -> [t, heads * size]."""
        if packed_seq_params is not None and packed_seq_params.parts is not None:
            return self.cut(query, key, value, packed_seq_params)
        if packed_seq_params is not None:
            return self.packed(query, key, value, packed_seq_params)
        plain = attention_mask is None and attention_bias is None and len(query) == len(key)
        if plain and self.is_known():
            return self.padded(query, key, value)
        return super().forward(query, key, value, attention_mask, attn_mask_type, attention_bias)

    def is_known(self) -> bool:
        """Whether softmax(scale q k) under a causal mask, or one with a window, is all that the configuration asks for.

        An offset of the softmax, dropout, and a factor that goes out of the product and into the softmax
        (``apply_query_key_layer_scaling``) are left to mcore. ``attention_softmax_in_fp32`` changes nothing in fp32.
        """
        return (
            self.attn_mask_type is AttnMaskType.causal
            and self.scale_mask_softmax.scale is None
            and self.config.softmax_type == "vanilla"
            and self.attention_dropout.p == 0.0
        )

    def padded(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Causal. query [s, b, heads, size], key and value [s, b, groups, size] -> [s, b, heads * size].

        Rows are padded on the right, so what a real token sees is real; what a padding token gets, nobody reads.
        """
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        out = self._attend(q, k, v)
        return out.permute(2, 0, 1, 3).flatten(2)

    def packed(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, sequences: PackedSequences
    ) -> torch.Tensor:
        """Causal within each sequence; shapes as of ``forward``."""
        if self.window is not None:
            return self.by_sequence(query, key, value, sequences)
        return attend(query, key, value, sequences.row, self.softmax_scale).flatten(1)

    def by_sequence(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, sequences: PackedSequences
    ) -> torch.Tensor:
        """``packed`` with a window, which may begin within a shared prompt: one whole sequence after the other."""
        order = sequences.expand
        if order is None:
            order = torch.arange(len(query))
        results = []
        for tokens in order.split(sequences.bounds.diff().tolist()):
            q, k, v = (x.index_select(0, tokens).transpose(0, 1)[None] for x in (query, key, value))
            results.append(self._attend(q, k, v)[0].transpose(0, 1).flatten(1))
        whole = torch.cat(results)
        return whole if sequences.contract is None else whole.index_select(0, sequences.contract)

    def cut(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, sequences: PackedSequences
    ) -> torch.Tensor:
        """As ``packed``, of this rank's part: query [t / CP, heads, size] -> [t / CP, heads * size]. Collective."""
        group = parallel.groups().context
        if key.shape[1] % group.size():
            return self.gathered(query, key, value, sequences, group)
        assert sequences.parts is not None
        order = sequences.parts.flatten()  # all tokens come as the parts of the ranks, end to end
        q, k, v = (_heads_cut(x, group).index_select(0, order.argsort()) for x in (query, key, value))
        return _tokens_cut(self.packed(q, k, v, sequences).index_select(0, order), group)

    def gathered(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        sequences: PackedSequences,
        group: dist.ProcessGroup,
    ) -> torch.Tensor:
        """``cut`` for any number of heads: this rank's queries, keys and values of all ranks."""
        own = sequences.own_queries
        everyone = gather_from_sequence_parallel_region(  # backward: what all ranks add to each gradient is summed
            torch.cat((key, value), 1), tensor_parallel_output_grad=True, group=group
        )
        seen = dict(zip(own.seen, everyone.index_select(0, own.keys).split(list(own.seen.values())), strict=True))
        queries = query.index_select(0, own.order).split([run.stop - run.start for run in own.runs])
        results = []
        for run, part in zip(own.runs, queries, strict=True):
            whole = (part, *seen[run.sequence][: run.stop].chunk(2, 1))
            q, k, v = (x.transpose(0, 1)[None] for x in whole)
            # Made again for the backward pass: kept, the masks would take as much as the scores that the kernel spares.
            out = checkpoint(self._attend, q, k, v, use_reentrant=False, preserve_rng_state=False)
            results.append(out[0].transpose(0, 1).flatten(1))
        return torch.cat(results).index_select(0, own.order.argsort())

    def _attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Causal: of the k tokens of the keys the last s ask.

        query [b, heads, s, size], key and value [b, groups, k, size] -> [b, heads, s, size].
        """
        grouped = query.shape[1] != key.shape[1]
        mask = causal_mask(query.shape[2], key.shape[2], self.window)
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=mask is None, scale=self.softmax_scale, enable_gqa=grouped
        )


def causal_mask(queries: int, keys: int, window: int | None) -> torch.Tensor | None:
    """Which of so many keys the last so many tokens see, bool [queries, keys].

    None where that is all up to their own, and they are as many as the keys.

    Args:
        window: keys that a token sees, its own among them; None: all before it.
    """
    is_cut = window is not None and window < keys
    if queries == keys and not is_cut:
        return None
    mask = torch.ones(queries, keys, dtype=torch.bool).tril_(keys - queries)
    return mask.triu_(keys - queries + 1 - window) if window is not None else mask


def _heads_cut(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """Of this rank's tokens all heads [t / CP, heads, size] -> of all tokens a share of them [t, heads / CP, size]."""
    return all_to_all(group, x.unflatten(1, (group.size(), -1)).transpose(0, 1).flatten(0, 1))


def _tokens_cut(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """Of all tokens this rank's heads [t, units / CP] -> of its tokens all of them [t / CP, units]."""
    return all_to_all(group, x).unflatten(0, (group.size(), -1)).transpose(0, 1).flatten(1)
