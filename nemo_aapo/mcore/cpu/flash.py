"""Attention within spans on a CPU: torch's flash kernels, whose backward pass takes any log-sum-exps (``Kernels``)."""

from __future__ import annotations

import torch

from nemo_aapo.mcore.attention.spans import Spans

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def forward(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, spans: Spans, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """``Kernels.forward``"""
    batches, place, _ = spans.batches
    results, logs = [], []
    for batch in batches:
        q, k, v = _padded(query, batch.queries), _padded(key, batch.keys), _padded(value, batch.keys)
        out, lse = _forward(q, k, v, 0.0, spans.is_causal, attn_mask=batch.mask, scale=scale)
        results.append(_flat(out))
        logs.append(_flat(lse))
    return _joined(results, place), _joined(logs, place).t()


def backward(
    grad: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    spans: Spans,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``Kernels.backward``"""
    batches, query_place, key_place = spans.batches
    found: tuple[list[torch.Tensor], ...] = ([], [], [])
    for batch in batches:
        gradient = _padded(grad, batch.queries)
        if len(batch.padding):
            _flat(gradient).index_fill_(0, batch.padding, 0.0)  # the keys that padding sees must get nothing of it
        q, k, v = _padded(query, batch.queries), _padded(key, batch.keys), _padded(value, batch.keys)
        results, logs = _padded(out, batch.queries), _padded(lse.t(), batch.queries)
        parts = _backward(gradient, q, k, v, results, logs, 0.0, spans.is_causal, attn_mask=batch.mask, scale=scale)
        for whole, part in zip(found, parts, strict=True):
            whole.append(_flat(part))
    places = (query_place, key_place, key_place)
    dq, dk, dv = (_joined(parts, place) for parts, place in zip(found, places, strict=True))
    return dq, dk, dv


def _padded(x: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """[t, heads, ...] -> [b, heads, s, ...], the tokens [b, s] of it."""
    return x.index_select(0, tokens.flatten()).unflatten(0, tokens.shape).transpose(1, 2)


def _flat(x: torch.Tensor) -> torch.Tensor:
    """[b, heads, s, ...] -> [b * s, heads, ...]; a view of what ``_padded`` made and of what the kernels return."""
    return x.transpose(1, 2).flatten(0, 1)


def _joined(parts: list[torch.Tensor], place: torch.Tensor | None) -> torch.Tensor:
    """The batches' results in the order of the row."""
    whole = parts[0] if len(parts) == 1 else torch.cat(parts)
    return whole if place is None else whole.index_select(0, place)
