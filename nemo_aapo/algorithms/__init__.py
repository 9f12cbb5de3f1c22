"""AAPO, GPG and GRPO as settings of one algorithm.

    delta_i = clip(r_i - r'_i, low, high)                   the margin over the frozen reference; AAPO only
    A*_i    = (r_i - mean r) / (std r + eps) + delta_i      the division is a switch
    L       = - sum_i sum_t w_it A*_i log pi(o_it)          or the clipped ratio in place of log pi; GRPO only

AAPO (arXiv 2505.14264) has all of it, GPG (arXiv 2504.02546) no margin and no division, GRPO (DeepSeekMath, arXiv
2402.03300) no margin, the clipped ratio and a KL term. ``advantage`` and ``loss`` hold the equations; ``Algorithm``
picks from them by the configuration.
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
    """The pure functions with a run's settings filled in. ``config`` has passed the checks of ``nemo_aapo.config``."""

    config: AlgorithmConfig
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
        """The final advantages A* of N groups, each by itself; see ``alpha`` for what depends on all of them.

        Args:
            rewards: float64 [N, G].
            reference_rewards: float64 [N, K]; needed with a margin, and not used without.
            pair_seeds: one for each group; needed by the sampled margin with K > G, where they name the reference
                rewards that the completions are compared with.

        Returns:
            float64 [N, G].

        Raises:
            ValueError: something needed is missing, shapes that do not fit, or a reward that is not finite.
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
            pairs = advantage.draw_pairs(pair_seeds, group_size, reference_samples)
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
        """``loss.token_weights`` with the configured aggregation: float64 [S] for completions of ``lengths`` [S]."""
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
        """The configured loss: ``loss.cross_entropy_loss`` or ``loss.ratio_clip_loss``, which see for the arguments.

        Returns:
            This part of the loss (a scalar sum), and detached sums for metrics.
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
