"""Metrics of a step's groups: pure functions of plain arrays."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from nemo_aapo.types import Group


@dataclass(frozen=True, slots=True)
class GroupNumbers:
    """The numbers of one group that metrics need: small enough to be gathered from all ranks."""

    rewards: np.ndarray
    """float64 [G]"""
    reward_parts: dict[str, np.ndarray]
    """Name of a reward -> float64 [G]"""
    reference_rewards: np.ndarray | None
    """float64 [K]; None where the algorithm needs none"""
    advantages: np.ndarray
    """float64 [G]"""
    lengths: np.ndarray
    """int64 [G], tokens of each completion"""
    truncated: np.ndarray
    """bool [G], True for a completion that was cut at the length limit"""
    failed: np.ndarray
    """bool [G], True where scoring failed"""
    policy_version: int
    """Version of the policy that generated the completions."""


def group_numbers(group: Group) -> GroupNumbers:
    """The numbers of a group that has its advantages, without tokens and texts."""
    return GroupNumbers(
        rewards=group.rewards,
        reward_parts=group.reward_parts,
        reference_rewards=group.reference_rewards,
        advantages=group.final_advantages,
        lengths=np.array([len(completion.token_ids) for completion in group.completions]),
        truncated=np.array([completion.finish_reason == "length" for completion in group.completions]),
        failed=group.failed,
        policy_version=group.completions[0].policy_version,
    )


def step_metrics(groups: Sequence[GroupNumbers], policy_version: int) -> dict[str, float]:
    """Metrics of the groups of one training step, over all ranks, before a policy of this version learns from them.

    ``groups/zero_std`` counts groups whose rewards are all equal, ``groups/zero_advantage`` those without any final
    advantage: the difference is the number of groups that learn by the margin alone.
    """
    rewards = np.stack([group.rewards for group in groups])
    advantages = np.stack([group.advantages for group in groups])
    metrics = {
        "reward/mean": rewards.mean(),
        "reward/std": rewards.std(),
        "reward/failed_fraction": np.concatenate([group.failed for group in groups]).mean(),
        "advantage/mean": advantages.mean(),
        "advantage/abs_mean": np.abs(advantages).mean(),
        "groups/zero_std": (rewards == rewards[:, :1]).all(axis=1).mean(),
        "groups/zero_advantage": (advantages == 0).all(axis=1).mean(),
        "rollout/lag": policy_version - np.mean([group.policy_version for group in groups]),
        **_lengths(groups),
    }
    references = [group.reference_rewards for group in groups if group.reference_rewards is not None]
    metrics["reference_reward/mean"] = np.concatenate(references).mean() if references else float("nan")
    if len(groups[0].reward_parts) > 1:
        for name in groups[0].reward_parts:
            metrics[f"reward/{name}"] = np.concatenate([group.reward_parts[name] for group in groups]).mean()
    return {key: float(value) for key, value in metrics.items()}


def _lengths(groups: Sequence[GroupNumbers]) -> dict[str, float]:
    lengths = np.concatenate([group.lengths for group in groups])
    return {
        "completion_length/mean": lengths.mean(),
        "completion_length/max": lengths.max(),
        "rollout/tail_factor": lengths.max() / max(lengths.mean(), 1e-9),
        "truncated_fraction": np.concatenate([group.truncated for group in groups]).mean(),
    }
