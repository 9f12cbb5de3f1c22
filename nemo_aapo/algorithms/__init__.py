"""AAPO, GPG and GRPO as settings of one algorithm: rewards in, advantages and a loss out.

In the symbols of AAPO (arXiv 2505.14264): prompt q has completions o_1 .. o_G with rewards r_1 .. r_G, and the frozen
reference's completions of the same prompt have rewards r'_1 .. r'_K.

    A_i     = (r_i - mean r) / (std r + eps)                advantage.group_advantage; the division is a switch
    delta_i = clip(r_i - r'_i, low, high)                   advantage.margin; AAPO only
    A*_i    = A_i + delta_i                                 advantage.augmented_advantage
    L       = - sum_i sum_t w_it A*_i log pi(o_it)          loss.cross_entropy_loss; AAPO and GPG
    L       = clipped ratio pi / pi_old, and a KL term      loss.ratio_clip_loss; GRPO
    w_it    = 1 / (number of tokens of the batch)           loss.token_weights; the denominator is a setting

A completion whose scoring failed (its reward is NaN) has no advantage, and is in no mean, no deviation, no margin and
no denominator: loss and gradient are what they would be had it never been sampled.

AAPO takes A*_i and the cross-entropy loss; GPG (arXiv 2504.02546) neither margin nor division; GRPO (DeepSeekMath,
arXiv 2402.03300) no margin, but the clipped ratio and the KL term. ``Algorithm`` picks the functions by the
configuration.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from nemo_aapo.algorithms import advantage, loss
from nemo_aapo.config.schema import AlgorithmConfig


@dataclass(frozen=True, slots=True)
class Algorithm:
    """The functions of ``advantage`` and ``loss`` with a run's settings filled in."""

    config: AlgorithmConfig
    """The settings of the algorithm, which have passed the checks of ``nemo_aapo.config``."""
    max_new_tokens: int
    """The length limit of completions, the denominator of ``loss_aggregation: fixed_length``."""

    @property
    def needs_reference_logprobs(self) -> bool:
        """True if ``token_loss`` takes the frozen reference's log-probs."""
        return self.config.kl_coefficient > 0

    def advantages(
        self,
        rewards: np.ndarray,
        reference_rewards: np.ndarray | None = None,
        pair_seeds: Sequence[int] | None = None,
    ) -> np.ndarray:
        """The final advantages A*_i of N groups, each computed by itself; ``alpha`` depends on all groups.

        Args:
            rewards: float64 [N, G]; NaN where scoring failed.
            reference_rewards: float64 [N, K]; needed with a margin, and not used without. NaN where scoring failed.
            pair_seeds: one for each group; needed by the sampled margin with K > G, where they decide which reference
                rewards the completions are compared with.

        Returns:
            float64 [N, G]; NaN where the reward is.

        Raises:
            ValueError: something needed is missing, shapes that do not fit, or an infinite reward.
        """
        config = self.config
        if config.margin is None:
            return advantage.group_advantage(rewards, config.scale_rewards)
        if reference_rewards is None:
            raise ValueError(f"algorithm {config.name} has a margin: it needs the prompts' reference rewards")
        group_size, reference_samples = np.shape(rewards)[1], np.shape(reference_rewards)[1]
        pairs = None
        if config.margin.estimator == "sampled" and reference_samples != group_size:
            if pair_seeds is None:
                raise ValueError(f"choosing {group_size} of {reference_samples} reference rewards needs pair_seeds")
            pairs = advantage.sample_pairs(pair_seeds, group_size, reference_samples)
        return advantage.augmented_advantage(
            rewards,
            reference_rewards,
            scale_rewards=config.scale_rewards,
            low=config.margin.low,
            high=config.margin.high,
            estimator=config.margin.estimator,
            pairs=pairs,
        )

    def alpha(self, groups: int, dead_groups: int) -> float:
        """The factor on the whole loss: GPG's B / (B - M) with ``rescale_dead_groups``, else 1.

        Both counts are over all data-parallel ranks, which is why ``advantages`` can't apply it; see ``gpg_alpha``.
        """
        return advantage.gpg_alpha(groups, dead_groups) if self.config.rescale_dead_groups else 1.0

    def token_weights(
        self, lengths: Sequence[int] | np.ndarray, *, total_tokens: int, total_sequences: int
    ) -> np.ndarray:
        """The weights w_it: ``loss.token_weights`` with the configured aggregation, float64 [S] for ``lengths`` [S]."""
        return loss.token_weights(
            lengths,
            self.config.loss_aggregation,
            total_tokens=total_tokens,
            total_sequences=total_sequences,
            fixed_length=self.max_new_tokens,
        )

    def token_loss(
        self,
        logprobs: torch.Tensor,
        advantages: torch.Tensor,
        weights: torch.Tensor,
        *,
        rollout_logprobs: torch.Tensor,
        old_logprobs: torch.Tensor | None = None,
        reference_logprobs: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The configured loss L; arguments as in ``loss.cross_entropy_loss`` and ``loss.ratio_clip_loss``.

        Returns:
            These tokens' part of the loss (a scalar sum), and detached sums for metrics.
        """
        config = self.config
        if config.loss == "cross_entropy":
            return loss.cross_entropy_loss(
                logprobs,
                advantages,
                weights,
                rollout_logprobs=rollout_logprobs,
                importance_weight_cap=config.importance_weight_cap,
            )
        assert config.clip is not None, "the checks of the configuration want a clip with the clipped ratio"
        return loss.ratio_clip_loss(
            logprobs,
            advantages,
            weights,
            rollout_logprobs=rollout_logprobs,
            old_logprobs=old_logprobs,
            clip_low=config.clip.low,
            clip_high=config.clip.high,
            kl_coefficient=config.kl_coefficient,
            reference_logprobs=reference_logprobs,
            importance_weight_cap=config.importance_weight_cap,
        )
