"""What the trainer and the learner hold: an algorithm under the settings of a run that hold for every algorithm.

It sees to what an algorithm can then not get wrong: what could not be scored has no advantage, padding counts nothing,
denominators are those of the whole optimizer batch, and importance weights stand on every token.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from nemo_aapo.algorithms import advantage, hooks, loss, masks
from nemo_aapo.algorithms.base import Algorithm, Loss, ScoredGroups, Tokens
from nemo_aapo.algorithms.registry import algorithm_of
from nemo_aapo.config.schema import AlgorithmConfig
from nemo_aapo.distributed import parallel
from nemo_aapo.errors import AlgorithmError
from nemo_aapo.run.step_metrics import GroupNumbers
from nemo_aapo.types import Group


@dataclass(frozen=True, slots=True)
class Objective:
    """An algorithm's two hooks, with a run's denominators and importance weights around them."""

    config: AlgorithmConfig
    """Settings, which have passed the checks of ``nemo_aapo.config``."""
    max_new_tokens: int
    """The length limit of completions, the denominator of ``loss_aggregation: fixed_length``."""
    algorithm: Algorithm
    """The two hooks."""

    @classmethod
    def of(cls, config: AlgorithmConfig, max_new_tokens: int, algorithm: Algorithm | None = None) -> Objective:
        """The algorithm that the settings name, or one of the caller's own, under these settings.

        Raises:
            ConfigError: there is no such algorithm.
        """
        return cls(config, max_new_tokens, algorithm_of(config) if algorithm is None else algorithm)

    @property
    def learns_without_advantage(self) -> bool:
        """Whether a completion whose advantage is zero can have a gradient."""
        return self.config.entropy_coefficient > 0 or self.algorithm.learns_without_advantage

    def advantages(self, groups: ScoredGroups) -> np.ndarray:
        """The final advantages of N groups; ``alpha`` depends on all groups.

        Returns:
            float64 [N, G]; NaN where the reward is, and with ``mask_truncated`` where a completion was cut off:
            what has no advantage has no part in the loss and its denominator.

        Raises:
            AlgorithmError: of the hook; or an advantage that is not finite.
        """
        if (least := self.config.min_group_size) is not None:
            few = np.sum(~np.isnan(groups.rewards), axis=1, keepdims=True) < least
            groups = dataclasses.replace(groups, rewards=np.where(few, np.nan, groups.rewards))
        without = np.isnan(groups.rewards)
        if self.config.mask_truncated:
            assert groups.truncated is not None, "known of all completions that were sampled"
            without |= groups.truncated
        made = hooks.advantages(self.algorithm, groups)
        if bad := int((~np.isfinite(made) & ~without).sum()):
            raise AlgorithmError(
                f"{type(self.algorithm).__name__}.advantages gave {bad} advantages that are not finite, of completions "
                "with rewards"
            )
        return np.where(without, np.nan, made)

    def with_advantages(self, groups: list[Group], **of_step: Any) -> list[Group]:
        """The groups with their final advantages. Collective for an algorithm that looks at the whole batch.

        Args:
            groups: this rank's.
            of_step: ``seeds``, ``step`` and ``max_steps`` of ``ScoredGroups``.
        """
        own = ScoredGroups.of(groups, **of_step) if groups else None
        if self.algorithm.whole_batch:
            everyone = parallel.gather_data_parallel(own)
            first = sum(len(part.rewards) for part in everyone[: parallel.data_parallel_rank()] if part is not None)
            joined = ScoredGroups.joined([part for part in everyone if part is not None])
            advantages = self.advantages(joined)[first : first + len(groups)]
        elif own is not None:
            advantages = self.advantages(own)
        else:
            return []
        return [group.replace(advantages=row) for group, row in zip(groups, advantages, strict=True)]

    def metrics(self, numbers: Sequence[GroupNumbers], **of_step: Any) -> dict[str, float]:
        """What the algorithm has to say of a step.

        Args:
            numbers: of the groups of all ranks.
            of_step: ``step`` and ``max_steps`` of ``ScoredGroups``.
        """
        known = [group.reference_rewards for group in numbers if group.reference_rewards is not None]
        groups = ScoredGroups(
            rewards=np.stack([group.rewards for group in numbers]),
            reference_rewards=np.stack(known) if known else None,
            reward_parts={name: np.stack([g.reward_parts[name] for g in numbers]) for name in numbers[0].reward_parts},
            lengths=np.stack([group.lengths for group in numbers]),
            truncated=np.stack([group.truncated for group in numbers]),
            **of_step,
        )
        return hooks.metrics(self.algorithm, groups, np.stack([group.advantages for group in numbers]))

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

    def token_loss(self, tokens: Tokens) -> Loss:
        """The loss of a micro-batch.

        Args:
            tokens: with 1 / denominator as ``weights``, 0 at padding: whatever the other tensors hold there, NaN
                included, has no effect. ``old_logprobs`` is None in the first of several updates.

        Returns:
            These tokens' part of the loss (a scalar sum), and detached sums for metrics.

        Raises:
            ValueError: log-probs that the algorithm needs are missing.
            AlgorithmError: of the hook.
        """
        valid = tokens.weights > 0
        metrics = loss.token_metrics(tokens.logprobs, tokens.advantages, valid)
        tokens = self._complete(tokens, valid)
        learner = tokens.logprobs if tokens.old_logprobs is None else tokens.old_logprobs
        metrics |= loss.parity_metrics(learner, tokens.rollout_logprobs)
        if (cap := self.config.importance_weight_cap) is not None:
            correction, more = loss.importance_weight(learner, tokens.rollout_logprobs, valid, cap)
            tokens, metrics = tokens.replace(weights=tokens.weights * correction), metrics | more
        kept = masks.kept(self.config, tokens, learner)
        if kept is not None:
            tokens = tokens.replace(weights=tokens.weights * kept)
            metrics["masked_fraction"] = (~kept & valid).sum()
        value, own = hooks.token_loss(self.algorithm, tokens, metrics)
        if (coefficient := self.config.entropy_coefficient) > 0:
            value = value - coefficient * loss.entropy_sum(tokens)
        return value, metrics | own

    def _complete(self, tokens: Tokens, valid: torch.Tensor) -> Tokens:
        """With zeros at padding, and with the log-probs that the algorithm needs and no others."""
        needs, blank = self.algorithm, lambda values: loss.blank(values, valid)
        logprobs, old, reference = blank(tokens.logprobs), None, None
        if needs.needs_old_logprobs:
            old = logprobs.detach() if tokens.old_logprobs is None else blank(tokens.old_logprobs)
        if needs.needs_reference_logprobs:
            if tokens.reference_logprobs is None:
                raise ValueError(f"{type(needs).__name__} needs the reference's log-probs")
            reference = blank(tokens.reference_logprobs)
        entropy = tokens.entropy
        if entropy is not None and entropy.requires_grad:
            entropy = blank(entropy)
        return tokens.replace(
            logprobs=logprobs,
            rollout_logprobs=blank(tokens.rollout_logprobs),
            advantages=blank(tokens.advantages),
            old_logprobs=old,
            reference_logprobs=reference,
            entropy=entropy,
            shares=tokens.weights,
            valid=valid,
        )
