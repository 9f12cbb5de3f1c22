"""Attention within spans on a GPU: the flash kernels that torch's CUDA builds contain (``Kernels``). Never run.

TransformerEngine's own attention returns no log-sum-exps. These are FlashAttention-2's kernels for sequences end to
end, in bf16 or fp16; ``torch.ops.aten._flash_attention_forward`` and ``_backward`` are what nested tensors call, too.
"""

from __future__ import annotations

import torch

from nemo_aapo.mcore.attention.spans import Spans

_forward = torch.ops.aten._flash_attention_forward
_backward = torch.ops.aten._flash_attention_backward


def forward(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, spans: Spans, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """``Kernels.forward``"""
    q, k, v = _tokens(query, spans.query_tokens), _tokens(key, spans.key_tokens), _tokens(value, spans.key_tokens)
    out, lse, *_ = _forward(q, k, v, *_bounds(spans), 0.0, spans.is_causal, False, scale=scale)
    return out, lse


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
    random = torch.empty(2, dtype=torch.uint64, device=query.device)  # the state of a dropout that there is not
    unused = torch.empty((), dtype=torch.uint64, device=query.device)
    do, q, o = (_tokens(x, spans.query_tokens) for x in (grad, query, out))
    k, v = (_tokens(x, spans.key_tokens) for x in (key, value))
    logs = _tokens(lse.t(), spans.query_tokens).t().contiguous()
    return _backward(do, q, k, v, o, logs, *_bounds(spans), 0.0, spans.is_causal, random, unused, scale=scale)


def _tokens(x: torch.Tensor, tokens: torch.Tensor | None) -> torch.Tensor:
    return x.contiguous() if tokens is None else x.index_select(0, tokens)


def _bounds(spans: Spans) -> tuple[torch.Tensor, torch.Tensor, int, int]:
    return spans.queries, spans.keys, spans.most_queries, spans.most_keys
