"""Log-probs of given tokens, and entropies, from hidden states: no [tokens, vocabulary] tensor is ever held.

At a vocabulary of 151,936 the float32 logits of 8,192 tokens take 5 GB, and autograd keeps several such tensors. Here
output layer, softmax and selection are one autograd function that works through the vocabulary tile by tile:

    forward   each tile leaves four numbers per token (its softmax statistics); merged over the tiles and, with one
              all-gather, over the tensor-parallel ranks, they give log-prob, entropy and log-sum-exp
    backward  recomputes each tile's logits; with the log-sum-exp known, tiles need nothing of one another, and ranks
              need no communication

Tiles cut the vocabulary, not the tokens: so the weight's gradient is written once, each part by one matrix product,
instead of being accumulated over chunks of tokens in the weight's (perhaps low) precision.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

MIN_TILE_LOGITS = 2**18
"""Fewest logits of a tile on a CPU (1 MiB of float32, about a core's cache): smaller tiles only cost time."""

CUDA_MIN_TILE_LOGITS = 2**26
"""Fewest logits of a tile on a GPU (256 MiB of float32), whose products want thousands of rows and columns."""

TILE_ALIGNMENT = 128
"""A tile's width is a multiple of so many columns, which suits the GPU's matrix units."""


def selected_logprobs(
    hidden: torch.Tensor,
    weight_shard: torch.Tensor,
    targets: torch.Tensor,
    *,
    temperature: float,
    vocab_size: int,
    tp_group: dist.ProcessGroup | None,
    vocab_start: int,
    chunk_tokens: int,
    entropy_gradient: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """log softmax(hidden @ weight.T / temperature)[target], and the entropy of that softmax, for each of n tokens.

    Collective over ``tp_group``: one all-gather of 4 n numbers in the forward pass, nothing in the backward pass.
    The gradient of ``weight_shard`` is complete; the gradient of ``hidden`` is this rank's **partial sum**. Adding it
    up over the ranks is left to the backward of what handed out ``hidden``: mcore's
    ``copy_to_tensor_model_parallel_region`` or, under sequence parallelism,
    ``gather_from_sequence_parallel_region(..., tensor_parallel_output_grad=True)``.

    Args:
        hidden: [n, h], the last layer's normalised output, in the weight's dtype; the same on all ranks of the group.
        weight_shard: [v, h], this rank's rows of the output layer (vocab-parallel, as mcore cuts it).
        targets: int64 [n], token ids of the whole vocabulary.
        temperature: the logits are divided by it; positive.
        vocab_size: the true vocabulary; rows of the padded weight beyond it take no part in the softmax.
        tp_group: the ranks that share the vocabulary; None means that this rank has all of it.
        vocab_start: the token id of the shard's first row.
        chunk_tokens: bounds the memory: no more logits exist at a time than so many tokens have on this rank,
            ``chunk_tokens * v`` (but see ``MIN_TILE_LOGITS`` and its twin for GPUs). They take two buffers of the
            result's dtype or, on a GPU, one of it and one of the inputs' dtype.
        entropy_gradient: the entropies carry a gradient, too, for which the backward pass holds one buffer more.

    Returns:
        Log-probs [n] and entropies [n] in nats, float32 (float64 for float64 inputs). A target outside
        [0, vocab_size) has log-prob -inf.

    Raises:
        ValueError: shapes or dtypes that do not fit, or a temperature or chunk that is not positive.
    """
    if hidden.ndim != 2 or hidden.shape[1:] != weight_shard.shape[1:] or hidden.shape[:1] != targets.shape:
        raise ValueError(
            f"hidden {tuple(hidden.shape)}, weight_shard {tuple(weight_shard.shape)}, targets {tuple(targets.shape)}: "
            "[n, h], [v, h] and [n] are needed"
        )
    if hidden.dtype != weight_shard.dtype:
        raise ValueError(f"hidden is {hidden.dtype} and weight_shard {weight_shard.dtype}: one dtype is needed")
    if not temperature > 0 or chunk_tokens < 1:
        raise ValueError(f"temperature={temperature}, chunk_tokens={chunk_tokens}: both must be positive")
    rows = min(max(vocab_size - vocab_start, 0), weight_shard.shape[0])  # 0 where the shard is nothing but padding
    return _SelectedLogprobs.apply(
        hidden,
        weight_shard,
        targets - vocab_start,
        rows,
        1.0 / temperature,
        tp_group,
        chunk_tokens * rows,
        entropy_gradient,
    )


_OfEntropy = tuple[torch.Tensor, torch.Tensor]
"""Entropies [n], and the loss's gradients by them."""


class _SelectedLogprobs(torch.autograd.Function):
    """``selected_logprobs`` with targets counted from the shard's first row; ``rows`` of its rows are real tokens."""

    @staticmethod
    def forward(
        ctx: Any,  # torch's context takes any attribute
        hidden: torch.Tensor,
        weight: torch.Tensor,
        targets: torch.Tensor,
        rows: int,
        inverse_temperature: float,
        tp_group: dist.ProcessGroup | None,
        max_logits: int,
        entropy_gradient: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.rows, ctx.inverse_temperature, ctx.max_logits = rows, inverse_temperature, max_logits
        statistics = _shard_statistics(hidden, weight[:rows], targets, inverse_temperature, max_logits)
        if tp_group is not None and tp_group.size() > 1:
            gathered = statistics.new_empty(tp_group.size() * 4, statistics.shape[1])
            dist.all_gather(list(gathered.chunk(tp_group.size())), statistics, group=tp_group)
            statistics = _merge(gathered.unflatten(0, (-1, 4)))
        maximum, total, weighted, target = statistics
        log_total = total.log()
        logprobs, entropy = target - maximum - log_total, log_total - weighted / total
        ctx.save_for_backward(hidden, weight, targets, maximum + log_total, entropy if entropy_gradient else None)
        if not entropy_gradient:
            ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logprobs: torch.Tensor, grad_entropy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden, weight, targets, logsumexp, entropy = ctx.saved_tensors
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        grad = grad_logprobs * ctx.inverse_temperature
        of_entropy = None if entropy is None else (entropy, grad_entropy * ctx.inverse_temperature)
        grad_hidden = torch.zeros_like(hidden, dtype=grad.dtype) if need_hidden else None
        grad_weight = torch.empty_like(weight) if need_weight else None
        if grad_weight is not None:
            grad_weight[ctx.rows :] = 0.0  # rows of padding are in no tile
        for tile, logits in _tiles(hidden, weight[: ctx.rows], ctx.inverse_temperature, ctx.max_logits):
            grad_logits = _grad_tile(logits, targets, tile.start, logsumexp, grad, of_entropy, hidden.dtype)
            if grad_hidden is not None:
                _add_product(grad_hidden, grad_logits, weight[tile])
            if grad_weight is not None:
                torch.mm(grad_logits.t(), hidden, out=grad_weight[tile])
        return None if grad_hidden is None else grad_hidden.to(hidden.dtype), grad_weight, *[None] * 6


def _fused(logits: torch.Tensor) -> bool:
    """True where kernels of ``logprobs_triton`` take the place of torch operations."""
    return logits.is_cuda and logits.dtype == torch.float32


def _shard_statistics(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, inverse_temperature: float, max_logits: int
) -> torch.Tensor:
    """[4, n], the numbers of ``_statistics`` over all rows of ``weight``."""
    statistics = _no_statistics(hidden)
    scratch: torch.Tensor | None = None
    for tile, logits in _tiles(hidden, weight, inverse_temperature, max_logits):
        if _fused(logits):
            from nemo_aapo.learner.logprobs_triton import add_statistics  # triton comes with torch's CUDA builds only

            add_statistics(logits, targets, tile.start, statistics)
        else:
            scratch = torch.empty_like(logits) if scratch is None else scratch.resize_(logits.shape)
            part = _statistics(logits, targets - tile.start, scratch)
            statistics = _merge(torch.stack([statistics, part]))
    return statistics


def _tiles(
    hidden: torch.Tensor, weight: torch.Tensor, inverse_temperature: float, max_logits: int
) -> Iterator[tuple[slice, torch.Tensor]]:
    """Yield (rows of the weight, hidden @ weight[rows].T / temperature) for one tile of the vocabulary after the other.

    The logits [n, tile] are float32 (float64 for float64) whatever the inputs are. All tiles use one buffer, which the
    caller may overwrite until it asks for the next tile: on a CPU, page faults of new buffers would cost more than the
    arithmetic.
    """
    tokens, rows = hidden.shape[0], weight.shape[0]
    least = CUDA_MIN_TILE_LOGITS if hidden.is_cuda else MIN_TILE_LOGITS
    columns = max(max_logits, least) // max(tokens, 1) // TILE_ALIGNMENT * TILE_ALIGNMENT
    columns = max(columns, TILE_ALIGNMENT)
    buffer = hidden.new_empty(tokens * min(columns, rows), dtype=_statistics_dtype(hidden))
    # cuBLAS adds up 16-bit products in float32 and can return them so. Rounding to bfloat16 would move a logit of 20 by
    # up to 0.06, and the target's log-prob with it.
    one_buffer = hidden.is_cuda or buffer.dtype == hidden.dtype
    product = buffer if one_buffer else torch.empty_like(buffer, dtype=hidden.dtype)
    for start in range(0, rows, columns):
        tile = slice(start, min(start + columns, rows))
        shape = (tokens, tile.stop - tile.start)
        logits, out = (flat[: shape[0] * shape[1]].view(shape) for flat in (buffer, product))
        if out.dtype == hidden.dtype:
            torch.addmm(out, hidden, weight[tile].t(), beta=0, alpha=inverse_temperature, out=out)
        else:
            torch.mm(hidden, weight[tile].t(), out_dtype=out.dtype, out=out)
            if inverse_temperature != 1.0:
                out.mul_(inverse_temperature)
        if product is not buffer:
            logits.copy_(out)
        yield tile, logits


def _statistics_dtype(hidden: torch.Tensor) -> torch.dtype:
    return torch.promote_types(hidden.dtype, torch.float32)


def _no_statistics(hidden: torch.Tensor) -> torch.Tensor:
    """[4, n], the statistics of no columns at all, which change nothing in ``_merge``.

    They are all that a shard of nothing but padding has. Their maximum is the least finite number: differences of
    maxima that are -inf would be NaN.
    """
    statistics = hidden.new_zeros(4, hidden.shape[0], dtype=_statistics_dtype(hidden))
    statistics[0] = torch.finfo(statistics.dtype).min
    statistics[3] = -torch.inf
    return statistics


def _statistics(logits: torch.Tensor, targets: torch.Tensor, scratch: torch.Tensor) -> torch.Tensor:
    """Softmax statistics of the columns of ``logits`` [n, c], which are overwritten, as is ``scratch`` [n, c].

    Returns:
        [4, n]: the largest logit m, sum exp(z - m), sum (z - m) exp(z - m), and the target's logit or, where the
        target is not among the columns, -inf.
    """
    inside, column = _locate(targets, logits.shape[1])
    target = torch.where(inside, logits.gather(1, column[:, None])[:, 0], -torch.inf)
    maximum = logits.amax(1)
    shifted = logits.sub_(maximum[:, None])
    exp = torch.exp(shifted, out=scratch)
    return torch.stack([maximum, exp.sum(1), exp.mul_(shifted).sum(1), target])


def _merge(parts: torch.Tensor) -> torch.Tensor:
    """Statistics [p, 4, n] of p parts of the vocabulary -> [4, n] of all of it."""
    maximum, total, weighted, target = parts.unbind(1)
    largest = maximum.amax(0)
    shift = maximum - largest
    scale = shift.exp()
    return torch.stack([largest, (scale * total).sum(0), (scale * (weighted + shift * total)).sum(0), target.amax(0)])


def _grad_tile(
    logits: torch.Tensor,
    targets: torch.Tensor,
    first: int,
    logsumexp: torch.Tensor,
    grad: torch.Tensor,
    of_entropy: _OfEntropy | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """``_grad_logits`` of the tile that begins at column ``first``, in ``dtype``; ``logits`` may be overwritten."""
    if not _fused(logits) or of_entropy is not None:  # the kernel knows log-probs only
        return _grad_logits(logits, targets - first, logsumexp, grad, of_entropy).to(dtype)
    from nemo_aapo.learner.logprobs_triton import grad_logits  # triton comes with torch's CUDA builds only

    out = logits if dtype == logits.dtype else torch.empty_like(logits, dtype=dtype)
    return grad_logits(logits, targets, first, logsumexp, grad, out)


def _grad_logits(
    logits: torch.Tensor,
    targets: torch.Tensor,
    logsumexp: torch.Tensor,
    grad: torch.Tensor,
    of_entropy: _OfEntropy | None = None,
) -> torch.Tensor:
    """d loss / d logits, written over ``logits`` [n, c]. With p = softmax, and of an entropy H its gradient e:

    grad * (1[column = target] - p) - e * p * (log p + H)
    """
    inside, column = _locate(targets, logits.shape[1])
    log_p, factor = logits.sub_(logsumexp[:, None]), -grad[:, None]
    if of_entropy is not None:
        entropy, e = (value[:, None] for value in of_entropy)
        factor = torch.mul(log_p, -e).add_(factor - e * entropy)
    log_p.exp_().mul_(factor)
    return logits.scatter_add_(1, column[:, None], torch.where(inside, grad, 0.0)[:, None])


def _locate(targets: torch.Tensor, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    """bool [n], whether each target is among the columns; and int64 [n], an index that is valid for all of them."""
    return (targets >= 0) & (targets < columns), targets.clamp(0, columns - 1)


def _add_product(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """total += left @ right, added up in ``total``'s precision."""
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    elif total.is_cuda:
        total += torch.mm(left, right, out_dtype=total.dtype)
    else:
        total += left @ right
