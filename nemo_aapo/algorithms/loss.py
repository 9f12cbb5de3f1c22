"""Log-probs and advantages -> the loss: the equations that the papers share.

    L = - sum_i sum_t w_it A_i log pi(o_it)                                      cross_entropy: AAPO, GPG, RLOO
    L = - sum_i sum_t w_it min(rho_it A_i, clip(rho_it) A_i) + beta KL           ratio_clip: GRPO, DAPO, REINFORCE++
    L = - sum_i sum_t w_it min(s_i A_i, clip(s_i) A_i) + beta KL                 sequence_ratio_clip: GSPO
    L = - sum_i sum_t w_it sg(clip(rho_it)) A_i log pi(o_it) + beta KL           clipped_weight: CISPO
    w_it = 1 / (denominator of the whole optimizer batch)                        token_weights

Every loss is a plain sum over tokens. As the weights hold the denominator of the whole optimizer batch, adding up
micro-batches and data-parallel ranks in any way gives the loss of that batch.

A token with weight 0 is padding: whatever the other tensors hold there, NaN included, has no effect.

Each loss comes with a dict of detached scalars for metrics. Summed over all micro-batches and ranks and divided by the
sum of ``"tokens"`` they are the metrics of the same names. Keys that start with ``min/`` are minima instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch

from nemo_aapo.algorithms.base import Loss, Tokens
from nemo_aapo.config.schema import Clip

LossAggregation = Literal["token", "sequence", "fixed_length"]

MAX_LOG_RATIO = 20.0
"""Log-ratios are clamped to +-20 before ``exp``: float32 overflows near 88, and 0 * inf would be a NaN gradient."""


def token_weights(
    lengths: Sequence[int] | np.ndarray,
    aggregation: LossAggregation,
    *,
    total_tokens: int,
    total_sequences: int,
    fixed_length: int,
) -> np.ndarray:
    """The weight w_it of each sequence's tokens in the loss: one over the denominator.

        token         1 / (tokens of all sequences)            DAPO (arXiv 2503.14476), and AAPO's and GPG's loss
        sequence      1 / (sequences * own length)             GRPO (arXiv 2402.03300): mean of the sequences' means
        fixed_length  1 / (sequences * fixed_length)           Dr. GRPO (arXiv 2503.20783)

    The totals count every scored completion of the optimizer batch over all data-parallel ranks, also empty ones and
    those that are skipped because their advantage is zero: skipping must not change the loss. A completion whose
    scoring failed is in none of them.

    Args:
        lengths: int [S], completion tokens of the sequences at hand; may be 0.
        aggregation: which of the three denominators.
        total_tokens: tokens of all scored completions of the whole optimizer batch.
        total_sequences: scored completions of the whole optimizer batch.
        fixed_length: the length limit of completions (``rollout.max_new_tokens``).

    Returns:
        float64 [S]; 0 for an empty sequence, which has no tokens to weigh.

    Raises:
        ValueError: totals smaller than what is at hand, or an unknown aggregation.
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    if lengths.sum() > total_tokens or len(lengths) > total_sequences:
        raise ValueError(
            f"{lengths.sum()} tokens in {len(lengths)} sequences are more than the totals of the optimizer batch, "
            f"{total_tokens} tokens in {total_sequences} sequences: the totals must count all ranks"
        )
    if aggregation == "token":
        denominators = np.full(lengths.shape, total_tokens)
    elif aggregation == "sequence":
        denominators = total_sequences * lengths
    elif aggregation == "fixed_length":
        denominators = np.full(lengths.shape, total_sequences * fixed_length)
    else:
        raise ValueError(f"loss aggregation {aggregation!r}: known are 'token', 'sequence' and 'fixed_length'")
    return np.where(lengths > 0, 1.0 / np.maximum(denominators, 1), 0.0)


def cross_entropy(tokens: Tokens) -> Loss:
    """Advantage-weighted cross-entropy, the loss of AAPO (arXiv 2505.14264) and GPG (arXiv 2504.02546).

        L = - sum_i sum_t w_it A*_i log pi(o_it)

    No ratio, no clip. With ``algorithm.importance_weight_cap`` w_it holds the detached min(pi / pi_rollout, cap), which
    corrects for the engine's numerics and, after a first update, for the policy's lag.
    """
    return -(tokens.weights * tokens.advantages * tokens.logprobs).sum(), {}


def ratio_clip(tokens: Tokens, clip: Clip, kl_coefficient: float = 0.0, dual_clip: float | None = None) -> Loss:
    """GRPO's clipped surrogate with the KL term in the loss (DeepSeekMath, arXiv 2402.03300, equations 3 and 4).

        rho_it = pi(o_it) / pi_old(o_it)
        L      = sum_i sum_t w_it ( - min(rho_it A_i, clip(rho_it, 1 - clip_low, 1 + clip_high) A_i) + beta KL_it )
        KL_it  = pi_ref / pi - log(pi_ref / pi) - 1         (k3: unbiased for KL(pi, pi_ref) and never negative)

    Two bounds as in DAPO (arXiv 2503.14476). In the first update the ratio is 1, with the gradient of pi. With
    ``algorithm.importance_weight_cap`` the surrogate, not the KL, is multiplied by the detached min(pi_old /
    pi_rollout, cap): the ratio corrects for the policy's lag, this for the engine's numerics.

    Args:
        clip: how far the ratio may go from 1.
        kl_coefficient: beta; the reference's log-probs are needed where it is not 0.
        dual_clip: c > 1: with a negative advantage the surrogate is at least c A (Ye et al., arXiv 1912.09729).
    """
    assert tokens.old_logprobs is not None, "an algorithm with a ratio needs the old log-probs"
    rho = ratio(tokens.logprobs - tokens.old_logprobs)
    return with_kl(*_surrogate(rho, tokens, clip, dual_clip), tokens, kl_coefficient)


def sequence_ratio_clip(
    tokens: Tokens, clip: Clip, kl_coefficient: float = 0.0, dual_clip: float | None = None
) -> Loss:
    """``ratio_clip`` with one ratio for each sequence, the geometric mean of its tokens' (GSPO, arXiv 2507.18071).

        s_i = exp((1 / |o_i|) sum_t log(pi(o_it) / pi_old(o_it)))

    The minimum and the clip are of sequences; their gradient spreads over the tokens evenly.
    """
    assert tokens.old_logprobs is not None, "an algorithm with a ratio needs the old log-probs"
    rho = ratio(tokens.sequence_mean(tokens.logprobs - tokens.old_logprobs))
    return with_kl(*_surrogate(rho, tokens, clip, dual_clip), tokens, kl_coefficient)


def clipped_weight(tokens: Tokens, clip: Clip, kl_coefficient: float = 0.0) -> Loss:
    """Cross-entropy under a detached, clipped ratio, which takes no token's gradient away (CISPO, arXiv 2506.13585).

    L = - sum_i sum_t w_it sg(clip(rho_it, 1 - clip_low, 1 + clip_high)) A_i log pi(o_it)
    """
    assert tokens.old_logprobs is not None, "an algorithm with a ratio needs the old log-probs"
    rho = ratio(tokens.logprobs.detach() - tokens.old_logprobs)
    weights = tokens.weights * rho.clamp(1 - clip.low, 1 + clip.high)
    metrics = ratio_metrics(rho, tokens, clip)
    return with_kl(-(weights * tokens.advantages * tokens.logprobs).sum(), metrics, tokens, kl_coefficient)


def _surrogate(rho: torch.Tensor, tokens: Tokens, clip: Clip, dual_clip: float | None) -> Loss:
    surrogate = torch.minimum(rho * tokens.advantages, rho.clamp(1 - clip.low, 1 + clip.high) * tokens.advantages)
    if dual_clip is not None:  # the minimum leaves a large ratio with a negative advantage without a bound
        bound = torch.where(tokens.advantages < 0, dual_clip * tokens.advantages, -torch.inf)
        surrogate = torch.maximum(surrogate, bound)
    return -(tokens.weights * surrogate).sum(), ratio_metrics(rho.detach(), tokens, clip)


def with_kl(value: torch.Tensor, metrics: dict[str, torch.Tensor], tokens: Tokens, coefficient: float) -> Loss:
    """The loss with the KL term of ``ratio_clip``."""
    if not coefficient:
        return value, metrics
    assert tokens.reference_logprobs is not None, "an algorithm with a KL term needs the reference's log-probs"
    assert tokens.shares is not None, "set before an algorithm sees the tokens"
    kl = k3(tokens.reference_logprobs - tokens.logprobs)
    return value + coefficient * (tokens.shares * kl).sum(), {**metrics, "kl": kl.detach().sum()}


def entropy_sum(tokens: Tokens) -> torch.Tensor:
    """sum_i sum_t w_it H_it, the policy's entropy by the loss's denominator (A3C, arXiv 1602.01783).

    As the KL term it does not depend on what sampled the token: it has no importance weight and no mask.
    """
    assert tokens.shares is not None, "set before an algorithm sees the tokens"
    if tokens.entropy is None:
        raise ValueError("algorithm.entropy_coefficient needs the tokens' entropies")
    return (tokens.shares * tokens.entropy).sum()


def blank(values: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """The values with zeros at padding. Multiplying by weight 0 would not do, as 0 * NaN is NaN."""
    return torch.where(valid, values, 0.0)


def ratio(log_ratio: torch.Tensor) -> torch.Tensor:
    """exp of log-ratios [n], which are bounded first: no overflow, whatever two policies disagree about."""
    return log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()


def k3(log_ratio: torch.Tensor) -> torch.Tensor:
    """Schulman's estimator of KL(p, q) from samples of p, with ``log_ratio`` = log q - log p; 0 where they agree."""
    log_ratio = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    return log_ratio.exp() - log_ratio - 1.0


def importance_weight(
    logprobs: torch.Tensor, rollout_logprobs: torch.Tensor, valid: torch.Tensor, cap: float
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """min(pi / pi_rollout, cap), and metrics of the weight before it is capped."""
    weight = ratio(logprobs.detach() - rollout_logprobs)
    metrics = {
        "importance_weight/mean": blank(weight, valid).sum(),
        "importance_weight/truncated_fraction": ((weight > cap) & valid).sum(),
    }
    return weight.clamp(max=cap), metrics


def token_metrics(logprobs: torch.Tensor, advantages: torch.Tensor, valid: torch.Tensor) -> dict[str, torch.Tensor]:
    """The token count, and the lowest log-prob among tokens that are pushed down.

    A negative advantage pushes without bound; a minimum that falls from step to step is the first sign of it.
    """
    pushed_down = torch.where(valid & (advantages < 0), logprobs.detach(), torch.inf)
    lowest = pushed_down.min() if pushed_down.numel() else pushed_down.new_full((), torch.inf)
    return {"tokens": valid.sum(), "min/negative_advantage_logprob": lowest}


def parity_metrics(logprobs: torch.Tensor, rollout_logprobs: torch.Tensor) -> dict[str, torch.Tensor]:
    """How far the engine's log-probs are from the learner's: exp of the first metric is the multiplicative
    probability error, the second estimates KL(pi_rollout, pi)."""
    difference = logprobs.detach() - rollout_logprobs
    return {"parity/abs_logprob_difference": difference.abs().sum(), "parity/kl": k3(difference).sum()}


def ratio_metrics(rho: torch.Tensor, tokens: Tokens, clip: Clip) -> dict[str, torch.Tensor]:
    """The mean ratio, and how many tokens the clip left without a gradient, on each side."""
    valid, advantages = tokens.valid, tokens.advantages
    assert valid is not None, "set before an algorithm sees the tokens"
    return {
        "ratio/mean": blank(rho, valid).sum(),
        "ratio/clipped_low_fraction": (valid & (rho < 1 - clip.low) & (advantages < 0)).sum(),
        "ratio/clipped_high_fraction": (valid & (rho > 1 + clip.high) & (advantages > 0)).sum(),
    }
