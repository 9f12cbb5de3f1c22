"""AAPO, Advantage-Augmented Policy Optimization (arXiv 2505.14264): ``algorithm=aapo``, ``algorithm=aapo_paper``.

    A_i     = (r_i - mean r) / (std r + 1e-4)
    delta_i = clip(r_i - r'_i, low, high)              r': rewards of the frozen reference for the same prompt
    A*_i    = A_i + delta_i
    L       = - sum_i sum_t w_it A*_i log pi(o_it)     w_it = 1 / (tokens of the batch)

Defaults of the paper: low = -0.2, high = 0.28. ``aapo_paper`` samples the reference anew in each step and pairs by
index; ``aapo`` stores its rewards once and takes the mean over all K, which has the same mean and a lower variance.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from nemo_aapo.algorithms import advantage
from nemo_aapo.algorithms.base import Algorithm, Loss, ScoredGroups, Tokens
from nemo_aapo.config.schema import Clip, Margin, MarginSchedule


@dataclass(frozen=True)
class AAPO(Algorithm):
    """The switches that it shares with those that descend from it; GPG and GRPO are settings of them."""

    scale_rewards: bool
    margin: Margin | None
    scale_margin: bool
    margin_schedule: MarginSchedule | None
    loss: Literal["cross_entropy", "ratio_clip", "sequence_ratio_clip", "clipped_weight"]
    clip: Clip | None
    dual_clip: float | None
    kl_coefficient: float

    paper: ClassVar[str] = "AAPO ([arXiv 2505.14264](https://arxiv.org/abs/2505.14264))"

    @property
    def needs_reference_rewards(self) -> bool:
        """With a margin."""
        return self.margin is not None

    @property
    def needs_reference_logprobs(self) -> bool:
        """With a KL term."""
        return self.kl_coefficient > 0

    @property
    def needs_old_logprobs(self) -> bool:
        """With a ratio."""
        return self.loss != "cross_entropy"

    def advantages(self, groups: ScoredGroups) -> np.ndarray:
        """A*_i, or A_i without a margin.

        Raises:
            ValueError: reference rewards or seeds are missing, or shapes do not fit.
        """
        own = self.group_advantages(groups)
        return own if self.margin is None else own + self._margin(groups, self.margin)

    def group_advantages(self, groups: ScoredGroups) -> np.ndarray:
        """A_i, without the margin."""
        return advantage.group_advantage(groups.rewards, self.scale_rewards)

    def _margin(self, groups: ScoredGroups, margin: Margin) -> np.ndarray:
        if groups.reference_rewards is None:
            raise ValueError(f"{type(self).__name__} has a margin: it needs the prompts' reference rewards")
        group_size, samples = groups.rewards.shape[1], np.shape(groups.reference_rewards)[1]
        pairs = None
        if margin.estimator == "sampled" and samples != group_size:
            if groups.seeds is None:
                raise ValueError(f"choosing {group_size} of {samples} reference rewards needs seeds of the groups")
            pairs = advantage.sample_pairs(groups.seeds, group_size, samples)
        low, high = self._bounds(margin, groups.step)
        return advantage.margin(
            groups.rewards, groups.reference_rewards, low, high, margin.estimator, pairs, scale=self.scale_margin
        )

    def _bounds(self, margin: Margin, step: int) -> tuple[float, float]:
        share = 1.0
        if (by := self.margin_schedule) is not None:
            share = advantage.schedule(by.shape, step / by.steps, by.end)
        return share * margin.low, share * margin.high

    def metrics(self, groups: ScoredGroups, advantages: np.ndarray) -> dict[str, float]:
        """What is the margin's part in A*; nothing without a margin."""
        if self.margin is None:
            return {}
        low, high = self._bounds(self.margin, groups.step)
        return advantage.margin_metrics(self.group_advantages(groups), advantages, low=low, high=high)

    def token_loss(self, tokens: Tokens) -> Loss:
        """The loss that ``algorithm.loss`` names."""
        from nemo_aapo.algorithms import loss  # torch, without which settings are checked

        if self.loss == "cross_entropy":
            return loss.cross_entropy(tokens)
        assert self.clip is not None, "the checks of the configuration want a clip with a ratio"
        if self.loss == "clipped_weight":
            return loss.clipped_weight(tokens, self.clip, self.kl_coefficient)
        of_ratios = loss.ratio_clip if self.loss == "ratio_clip" else loss.sequence_ratio_clip
        return of_ratios(tokens, self.clip, self.kl_coefficient, self.dual_clip)
