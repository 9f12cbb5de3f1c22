"""Metrics of a step's groups: pure functions of plain arrays."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from nemo_aapo.types import RIGHT, Group


@dataclass(frozen=True, slots=True)
class GroupNumbers:
    """The numbers of one group that metrics need: small enough to be gathered from all ranks."""

    rewards: np.ndarray
    """float64 [G]; NaN where scoring failed"""
    reward_parts: dict[str, np.ndarray]
    """Name of a reward -> float64 [G]; NaN where it gave none"""
    reference_rewards: np.ndarray | None
    """float64 [K], NaN where scoring failed; None where the algorithm needs none"""
    advantages: np.ndarray
    """float64 [G]; NaN where scoring failed"""
    lengths: np.ndarray
    """int64 [G], tokens of each completion"""
    truncated: np.ndarray
    """bool [G], True for a completion that was cut at the length limit"""
    failed: np.ndarray
    """bool [G], True where scoring failed"""
    version_sums: np.ndarray
    """int64 [G], versions of the policy that sampled a completion's tokens, added up over them"""
    oldest: np.ndarray
    """int64 [G], the version that sampled the first token"""
    mixed: np.ndarray
    """bool [G], True for a completion that several versions sampled"""
    prompt_tokens: int
    """Tokens of the prompt."""


GroupTokens = tuple[int, list[int]]
"""How many tokens a group's prompt has, and each of its completions."""


def group_tokens(group: Group) -> GroupTokens:
    """The tokens that were generated for a group, be it trained on or not."""
    return len(group.prompt.token_ids), [len(completion.token_ids) for completion in group.completions]


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
        version_sums=np.array([completion.token_versions.sum(dtype=np.int64) for completion in group.completions]),
        oldest=np.array([completion.policy_version for completion in group.completions]),
        mixed=np.array([completion.versions is not None for completion in group.completions]),
        prompt_tokens=len(group.prompt.token_ids),
    )


def step_metrics(groups: Sequence[GroupNumbers], policy_version: int, verdict: str) -> dict[str, float]:
    """Metrics of the groups of one training step, over all ranks, before a policy of this version learns from them.

    ``groups/zero_std`` counts groups whose rewards are all equal, ``groups/zero_advantage`` those without any final
    advantage: the difference is the number of groups that learn by the margin alone. All are over what was scored, and
    NaN where nothing was; ``groups/failed`` counts the groups of which no completion was.

    Args:
        verdict: name of the reward that tells right from wrong.
    """
    rewards = np.concatenate([group.rewards for group in groups])
    advantages = np.concatenate([group.advantages for group in groups])
    scored = [(_there(group.rewards), _there(group.advantages)) for group in groups if len(_there(group.rewards))]
    metrics = {
        "reward/mean": _mean(rewards),
        "reward/std": _there(rewards).std() if scored else np.nan,
        "reward/failed_fraction": np.concatenate([group.failed for group in groups]).mean(),
        "advantage/mean": _mean(advantages),
        "advantage/abs_mean": _mean(np.abs(advantages)),
        "groups/zero_std": _mean(np.array([float((own == own[0]).all()) for own, _ in scored])),
        "groups/zero_advantage": _mean(np.array([float((own == 0).all()) for _, own in scored])),
        **_verdicts([group.reward_parts[verdict] for group in groups if verdict in group.reward_parts]),
        "groups/failed": 1.0 - len(scored) / len(groups),
        **_lags(groups, policy_version),
        **_lengths(groups),
    }
    references = [group.reference_rewards for group in groups if group.reference_rewards is not None]
    metrics["reference_reward/mean"] = _mean(np.concatenate(references)) if references else np.nan
    if len(groups[0].reward_parts) > 1:
        for name in groups[0].reward_parts:
            metrics[f"reward/{name}"] = _mean(np.concatenate([group.reward_parts[name] for group in groups]))
    return {key: float(value) for key, value in metrics.items()}


def _lags(groups: Sequence[GroupNumbers], policy_version: int) -> dict[str, float]:
    """Over tokens, how many versions behind the policy was that sampled them."""
    tokens = max(1, sum(int(group.lengths.sum()) for group in groups))
    behind = sum(int((policy_version * group.lengths - group.version_sums).sum()) for group in groups)
    return {
        "rollout/lag": behind / tokens,
        "rollout/lag_max": policy_version - min(group.oldest.min() for group in groups),
        "rollout/mixed_versions": np.concatenate([group.mixed for group in groups]).mean(),
    }


def _verdicts(values: Sequence[np.ndarray]) -> dict[str, float]:
    """Shares of the groups that were judged whose completions are all right, or all wrong."""
    shares = np.array([float((_there(row) >= RIGHT).mean()) for row in values if len(_there(row))])
    return {
        "groups/all_right": _mean((shares == 1.0).astype(float)),
        "groups/all_wrong": _mean((shares == 0.0).astype(float)),
    }


def _there(values: np.ndarray) -> np.ndarray:
    return values[~np.isnan(values)]


def _mean(values: np.ndarray) -> float:
    """Of what is not NaN; NaN where nothing is."""
    there = _there(values)
    return float(there.mean()) if len(there) else np.nan


def _lengths(groups: Sequence[GroupNumbers]) -> dict[str, float]:
    lengths = np.concatenate([group.lengths for group in groups])
    return {
        "completion_length/mean": lengths.mean(),
        "completion_length/max": lengths.max(),
        "rollout/tail_factor": lengths.max() / max(lengths.mean(), 1e-9),
        "truncated_fraction": np.concatenate([group.truncated for group in groups]).mean(),
    }
