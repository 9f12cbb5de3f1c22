"""Attention within a row whose prompts are shared, exact, without a copy of any prompt.

Softmax over the keys of two sets is a mean of the softmaxes over each, weighted by the sums of their exponentials. So a
completion's token attends to its own segment and, apart from that, to the prompt; the two results o with log-sum-exp l
are merged:

    l = log(exp(l_own) + exp(l_prompt)),    o = o_own exp(l_own - l) + o_prompt exp(l_prompt - l).

The backward pass needs no gradient of the log-sum-exps: with P_ij = exp(s_ij - l_i) and D_i = do_i . o_i,

    dv_j = sum_i P_ij do_i,    ds_ij = P_ij (do_i . v_j - D_i),

which is what an attention kernel's backward pass computes of o and l, key by key. It is given the merged ones, so that
each of the two calls adds its keys' part, as in ring attention (arXiv 2310.01889).
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch.autograd.function import once_differentiable

from nemo_aapo.mcore.attention.spans import RowAttention, Spans

Gradients = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


class Kernels(Protocol):
    """A module with both passes of attention within spans of a row, q queries and k keys of its t tokens."""

    def forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, spans: Spans, scale: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """query [t, heads, size], key and value [t, groups, size] -> [q, heads, size] and the log-sum-exps of scale *
        query . key, float32 (float64 of such queries) [heads, q]."""

    def backward(
        self,
        grad: torch.Tensor,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
        spans: Spans,
        scale: float,
    ) -> Gradients:
        """Gradients of query [q, heads, size], key and value [k, groups, size].

        grad and out are [t, heads, size], lse is [heads, t]; these may be of attention to other keys besides.
        """


def attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, row: RowAttention, scale: float
) -> torch.Tensor:
    """query [t, heads, size], key and value [t, groups, size] of a row -> [t, heads, size]."""
    return _RowAttention.apply(query, key, value, row, scale, _kernels(query.device))


def _kernels(device: torch.device) -> Kernels:
    if device.type == "cpu":
        from nemo_aapo.mcore.cpu import flash

        return flash
    from nemo_aapo.mcore.attention import flash_gpu

    return flash_gpu


class _RowAttention(torch.autograd.Function):
    """Saves what it was given, the result and its log-sum-exps: no copy of a prompt, no score."""

    @staticmethod
    def forward(
        ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, row: RowAttention, scale: float, kernels: Kernels
    ) -> torch.Tensor:
        out, lse = kernels.forward(q, k, v, row.own, scale)
        if row.shared is not None:
            at = row.shared.query_tokens
            assert at is not None
            to_prompt, lse_prompt = kernels.forward(q, k, v, row.shared, scale)
            to_own, lse_own = out.index_select(0, at), lse.index_select(1, at)
            share = torch.sigmoid(lse_prompt - lse_own).t().unsqueeze(-1)
            both = to_own.to(share.dtype).lerp_(to_prompt.to(share.dtype), share)
            out.index_copy_(0, at, both.to(out.dtype))
            lse.index_copy_(1, at, torch.logaddexp(lse_own, lse_prompt))
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.row, ctx.scale, ctx.kernels = row, scale, kernels
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        row, kernels = ctx.row, ctx.kernels
        found = kernels.backward(grad, q, k, v, out, lse, row.own, ctx.scale)
        if row.shared is not None:
            parts = kernels.backward(grad, q, k, v, out, lse, row.shared, ctx.scale)
            at, seen = row.shared.query_tokens, row.shared.key_tokens
            for whole, part, tokens in zip(found, parts, (at, seen, seen), strict=True):
                whole.index_add_(0, tokens, part)
        return *found, None, None, None
