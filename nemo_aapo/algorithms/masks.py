"""Which tokens to leave out because what sampled them was another policy than the one that learns.

Engine and learner round differently, servers may be behind by an update, a mixture of experts routes anew: where the
two disagree about a token, its gradient is of something that the policy would not have said. Each mask is a pure
function; those that are set are applied one upon the other, whatever the loss.

    log rho_it = log pi(o_it) - log pi_rollout(o_it)       pi: before the update, for a loss with a ratio; else now

A masked token stays in the denominator: the loss is what it would be had the token's value been 0. So a mask changes
the loss of no other token, and a step of which half is masked takes half a step.
"""

from __future__ import annotations

import torch

from nemo_aapo.algorithms.base import Tokens
from nemo_aapo.algorithms.loss import k3, ratio
from nemo_aapo.config.schema import AlgorithmConfig, Band


def kept(settings: AlgorithmConfig, tokens: Tokens, logprobs: torch.Tensor) -> torch.Tensor | None:
    """bool [n], True for tokens that all masks of the settings let through; None if none is set.

    Args:
        logprobs: float [n], log pi(o_it) above; like the engine's 0 at padding.
    """
    masks = (settings.token_mask, settings.sequence_mask, settings.sequence_kl_limit, settings.probability_change_limit)
    if all(mask is None for mask in masks):
        return None
    made, log_ratio = [], logprobs.detach() - tokens.rollout_logprobs
    if settings.token_mask is not None:
        made.append(token_band(log_ratio, settings.token_mask))
    if settings.sequence_mask is not None:
        made.append(sequence_band(log_ratio, settings.sequence_mask, tokens))
    if settings.sequence_kl_limit is not None:
        made.append(sequence_kl(log_ratio, settings.sequence_kl_limit, tokens))
    if settings.probability_change_limit is not None:
        made.append(not_overshot(tokens, settings.probability_change_limit))
    return torch.stack(made).all(dim=0)


def token_band(log_ratio: torch.Tensor, band: Band) -> torch.Tensor:
    """bool [n]: low <= rho_it <= high. IcePop (the Ling team's Every Step Evolves, arXiv 2510.18855): 0.5 and 5."""
    return _within(log_ratio, band)


def sequence_band(log_ratio: torch.Tensor, band: Band, tokens: Tokens) -> torch.Tensor:
    """bool [n]: low <= geometric mean of rho_it over the completion <= high."""
    return _within(tokens.sequence_mean(log_ratio), band)


def sequence_kl(log_ratio: torch.Tensor, limit: float, tokens: Tokens) -> torch.Tensor:
    """bool [n]: the mean over the completion of rho - log rho - 1, which estimates KL(pi_rollout, pi), is at most the
    limit."""
    return tokens.sequence_mean(k3(log_ratio)) <= limit


def not_overshot(tokens: Tokens, limit: float) -> torch.Tensor:
    """bool [n]: False where pi has moved from pi_rollout by more than the limit in the way that the advantage pushes.

    DPPO's divergence mask (arXiv 2602.04879, its binary total variation): a token with a positive advantage is left out
    once pi - pi_rollout > limit, one with a negative advantage once pi_rollout - pi > limit. What moved the other way
    stays: its gradient brings it back. It looks at probabilities, since a ratio says little of rare tokens.
    """
    change = tokens.logprobs.detach().exp() - tokens.rollout_logprobs.exp()
    return ~((change * tokens.advantages.sign()) > limit)


def _within(log_ratio: torch.Tensor, band: Band) -> torch.Tensor:
    rho = ratio(log_ratio)
    return (rho >= band.low) & (rho <= band.high)
