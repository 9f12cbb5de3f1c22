"""A KV cache with independent rows for mcore's GPTModel, and the attention that reads it.

mcore 0.16 offers two inference contexts. The static one keeps one offset for the whole batch, rotates all cached keys
anew in each step, and hides padding by a mask that TransformerEngine's attention ignores when it decodes. The dynamic
one is for CUDA and flash-attn only. ``SlotCache`` is a third, on the same extension point (``BaseInferenceContext``):
rows are independent, each sequence has positions 0, 1, 2, ... of its own, and keys are stored rotated.

One forward pass takes a packed batch of T tokens: first one token for each decoding row, then whole prompts, padded
to a common width. Everything but the attention treats them alike, as a sequence of T tokens with batch size 1.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
import torch.nn.functional as F
from megatron.core.inference.contexts import BaseInferenceContext
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.attention import SelfAttention

SEQUENCE_PARALLEL_SWITCHES = ("sequence_parallel", "scatter_to_sequence_parallel", "reduce_scatter_embeddings")
"""Attributes in which mcore's modules keep a copy of ``config.sequence_parallel``."""


class SlotCache(BaseInferenceContext):
    """Keys and values of this rank's layers, and the layout of the forward pass that is under way."""

    def __init__(self, model: GPTModel, rows: int, length: int) -> None:
        """Args: rows: sequences at a time. length: tokens that one of them may have."""
        super().__init__(materialize_only_last_token_logits=True)
        attention = model.decoder.layers[0].self_attention
        parameter = next(model.parameters())
        heads, size = attention.num_query_groups_per_partition, attention.hidden_size_per_attention_head
        # [layers, keys or values, rows, heads, length, head size]; zeros, as a masked NaN would still be a NaN
        self.kv = torch.zeros(
            len(model.decoder.layers), 2, rows, heads, length, size, dtype=parameter.dtype, device=parameter.device
        )
        self.max_sequence_length = length  # mcore asks: how many rotary angles to compute
        angles = model.rotary_pos_emb(length)[:, 0]
        self._cos, self._sin = angles.cos(), angles.sin()  # [length, 1, head size]
        self._sin[..., : size // 2].neg_()
        self._scale = model.config.softmax_scale or size**-0.5
        self._kept: torch.Tensor | None = None

    def begin(
        self, tokens: np.ndarray, lengths: np.ndarray, prompts: Sequence[np.ndarray], shares: Sequence[int]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Lay out one forward pass.

        Args:
            tokens: int64 [D], what the decoding rows 0 .. D-1 feed.
            lengths: int64 [D], how many tokens they have in the cache.
            prompts: token ids of the N prompts to prefill.
            shares: [N], how many of the rows from D on each prompt fills.

        Returns:
            int64 [T] token ids, and their positions within their sequences. T = D + N * width.
        """
        device, (decoding, width) = self.kv.device, (len(lengths), max(map(len, prompts), default=0))
        padded = np.zeros((len(prompts), width), dtype=np.int64)
        for row, prompt in zip(padded, prompts, strict=True):
            row[: len(prompt)] = prompt
        positions = np.concatenate([lengths, np.tile(np.arange(width), len(prompts))])
        self._positions = torch.from_numpy(positions).to(device)
        self._cos_now, self._sin_now = self._cos[self._positions], self._sin[self._positions]
        self._decoding, self._prompts, self._width = decoding, len(prompts), width
        last = np.array([decoding + n * width + len(prompt) - 1 for n, prompt in enumerate(prompts)], dtype=np.int64)
        logits_at = np.concatenate([np.arange(decoding), np.repeat(last, shares)])
        self._logits_at = torch.from_numpy(logits_at).to(device)
        self._prompt_of_row = torch.from_numpy(np.repeat(np.arange(len(prompts)), shares)).to(device)
        if decoding:
            self._extent = int(lengths.max()) + 1
            self._row = torch.arange(decoding, device=device)
            self._mask = None
            if lengths.min() + 1 < self._extent:
                columns = torch.arange(self._extent, device=device)
                later = columns > self._positions[:decoding, None]
                self._mask = torch.zeros_like(later, dtype=self.kv.dtype).masked_fill_(later, -torch.inf)[:, None, None]
        return torch.from_numpy(np.concatenate([tokens, padded.ravel()])).to(device), self._positions

    def rotate(self, query: torch.Tensor, key: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Rotary embedding (as in mcore's rope_utils, not interleaved) of [T, heads, head size], in float32.

        Queries and keys go together, with cosines that were computed once: mcore's function does each alone and
        computes them in every layer, which is a tenth of a small model's decoding step.
        """
        x = torch.cat((query, key), dim=1).float()
        rotated = (x * self._cos_now).addcmul_(x.roll(x.shape[-1] // 2, dims=-1), self._sin_now).to(query.dtype)
        return rotated[:, : query.shape[1]], rotated[:, query.shape[1] :]

    def attend(self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Store keys and values and attend to what each sequence has.

        Args:
            layer: index on this rank.
            query: [T, heads, head size]. key, value: [T, key-value heads, head size]. Rotated.

        Returns:
            [T, heads * head size]
        """
        cut, parts = self._decoding, []
        if cut:
            parts.append(self._decode(layer, query[:cut], key[:cut], value[:cut]))
        if self._prompts:
            parts.append(self._prefill(layer, query[cut:], key[cut:], value[cut:]))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _decode(self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """One token a row, against everything before it."""
        keys, values = self.kv[layer]
        at = self._positions[: self._decoding]
        keys[self._row, :, at] = key
        values[self._row, :, at] = value
        rows, heads, size = key.shape
        out = F.scaled_dot_product_attention(
            query.reshape(rows, heads, -1, size),  # heads that share a key stand in for the query's length
            keys[:rows, :, : self._extent],
            values[:rows, :, : self._extent],
            attn_mask=self._mask,
            scale=self._scale,
        )
        return out.reshape(rows, -1)

    def _prefill(self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Whole prompts, padded at the end: causality alone hides the padding."""
        query, key, value = (x.unflatten(0, (self._prompts, self._width)).transpose(1, 2) for x in (query, key, value))
        start = self._decoding
        rows = slice(start, start + len(self._prompt_of_row))
        self.kv[layer, 0, rows, :, : self._width] = key[self._prompt_of_row]
        self.kv[layer, 1, rows, :, : self._width] = value[self._prompt_of_row]
        grouped = query.shape[1] != key.shape[1]
        out = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=self._scale, enable_gqa=grouped)
        return out.transpose(1, 2).flatten(0, 1).flatten(1)

    def move(self, source: np.ndarray, target: np.ndarray, length: int) -> None:
        """Copy the first ``length`` tokens of the source rows to the target rows."""
        source, target = torch.from_numpy(source), torch.from_numpy(target)
        self.kv[:, :, target, :, :length] = self.kv[:, :, source, :, :length]

    def keep(self, row: int, length: int) -> None:
        """Put a prompt's keys and values aside for those of its completions that have no row yet."""
        self._kept = self.kv[:, :, row, :, :length].clone()

    def restore(self, start: int, stop: int) -> None:
        """Fill rows with the prompt that was put aside."""
        self.kv[:, :, start:stop, :, : self._kept.shape[-2]] = self._kept[:, :, None]

    def is_static_batching(self) -> bool:
        """mcore asks: False, so that it leaves offsets and masks to the attention."""
        return False

    def is_decode_only(self) -> bool:
        """mcore asks: whether CUDA graphs of the decoding step apply. They don't."""
        return False

    def last_token_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """mcore asks: of the last hidden states [1, T, hidden], each row's last [rows, hidden]."""
        return hidden[0, self._logits_at]


def _attention_forward(
    attention: SelfAttention,
    layer: int,
    hidden_states: torch.Tensor,
    inference_context: SlotCache,
    **_unused: object,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """What ``SelfAttention.forward`` does, on a SlotCache: hidden states [T, 1, hidden] -> the same, and a bias."""
    query, key, value = attention.get_query_key_value_tensors(hidden_states, None)
    query, key = inference_context.rotate(query[:, 0], key[:, 0])
    context = inference_context.attend(layer, query, key, value[:, 0])
    return attention.linear_proj(context[:, None])


@contextmanager
def decoding(model: GPTModel) -> Iterator[None]:
    """The model in shape for ``SlotCache``; on leaving, in the shape it had before.

    Evaluation mode, no gradients, no sequence parallelism (a step has too few tokens to split), attention on the
    cache. Not ``inference_mode``: mcore keeps buffers and rotary angles for later, which training then can't use.
    """
    training = model.training
    undo: list[tuple[object, str]] = []
    for module in model.modules():
        for holder in (module, getattr(module, "config", None)):
            for name in SEQUENCE_PARALLEL_SWITCHES:
                if getattr(holder, name, False):
                    undo.append((holder, name))
                    setattr(holder, name, False)
    attentions = [layer.self_attention for layer in model.decoder.layers]
    for index, attention in enumerate(attentions):
        attention.forward = functools.partial(_attention_forward, attention, index)
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for attention in attentions:
            del attention.forward  # the class's own comes to light again
        for holder, name in undo:
            setattr(holder, name, True)
        model.set_input_tensor(None)
        model.train(training)


def check_supported(model: GPTModel) -> None:
    """Refuse models whose attention does more than ``_attention_forward`` does.

    Raises:
        ValueError: which setting, and what it is.
    """
    config = model.config
    found = {
        "position_embedding_type": (model.position_embedding_type, "rope"),
        "rotary_percent": (model.rotary_percent, 1.0),
        "rotary_interleaved": (config.rotary_interleaved, False),
        "multi_latent_attention": (config.multi_latent_attention, False),
        "window_size": (config.window_size, None),
        "softmax_type": (config.softmax_type, "vanilla"),
        "no_rope_freq": (config.no_rope_freq, None),
        "attention_output_gate": (config.attention_output_gate, False),
        "apply_query_key_layer_scaling": (config.apply_query_key_layer_scaling, False),
        "mtp_num_layers": (config.mtp_num_layers or None, None),
        "fp8": (config.fp8, None),  # its kernels want row counts that a decoding step doesn't have
        "context_parallel_size": (config.context_parallel_size, 1),
        "virtual_pipeline_model_parallel_size": (config.virtual_pipeline_model_parallel_size, None),
    }
    wrong = [f"{name}={value!r} (only {wanted!r})" for name, (value, wanted) in found.items() if value != wanted]
    if wrong:
        raise ValueError(f"the Megatron rollout engine can't decode a model with {', '.join(wrong)}")
