"""From rewards to advantages: how much each completion's tokens are pushed up or down.

Pure functions of float64 arrays. N is the number of groups (prompts), G the completions of a group, K the stored
rewards of the frozen reference model for the same prompt. Every function treats each group by itself, so that the
result does not depend on how the groups are dealt over ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

SCALE_EPS = 1e-4
"""Added to the standard deviation in ``group_advantage`` (AAPO and GRPO implementations agree on the value)."""

MarginEstimator = Literal["sampled", "expected"]


def group_advantage(rewards: np.ndarray, scale_rewards: bool, eps: float = SCALE_EPS) -> np.ndarray:
    """The group-relative advantage of GRPO (arXiv 2402.03300, outcome supervision), GPG and AAPO.

        A_i = r_i - mean(r)                      scale_rewards off
        A_i = (r_i - mean(r)) / (std(r) + eps)   scale_rewards on; std with Bessel's correction (N - 1)

    A group of equal rewards gets exactly 0.0. That is decided by comparing the rewards: subtracting a rounded mean
    can leave 1e-17, which the division by eps and a test on ``std == 0`` would take for a signal. A group of one is
    such a group.

    Args:
        rewards: float64 [N, G].
        scale_rewards: divide by the standard deviation.
        eps: added to the standard deviation.

    Returns:
        float64 [N, G].

    Raises:
        ValueError: not a table, or a reward that is not finite.
    """
    rewards = _table(rewards, "rewards")
    centred = rewards - rewards.mean(axis=1, keepdims=True)
    if scale_rewards and rewards.shape[1] > 1:  # Bessel's std of one value is 0 / 0
        centred /= rewards.std(axis=1, ddof=1, keepdims=True) + eps
    return np.where(zero_std(rewards)[:, None], 0.0, centred)


def margin(
    rewards: np.ndarray,
    reference_rewards: np.ndarray,
    low: float,
    high: float,
    estimator: MarginEstimator,
    pairs: np.ndarray | None = None,
) -> np.ndarray:
    """AAPO's advantage margin (arXiv 2505.14264): how much better than the frozen reference a completion did.

        sampled    delta_i = clip(r_i - r'_k(i), low, high)              k(i): the partner of completion i
        expected   delta_i = (1/K) sum_k clip(r_i - r'_k, low, high)

    Both have the same mean over the reference's samples; the expected one averages K of them and has the lower
    variance. The clip is inside the mean: it bounds each comparison, as in the paper.

    Args:
        rewards: float64 [N, G].
        reference_rewards: float64 [N, K], the same rewards of reference completions drawn with the same settings.
        low: lower bound, <= 0.
        high: upper bound, >= 0.
        estimator: see above.
        pairs: int [N, G], for ``"sampled"``: column of ``reference_rewards`` that each completion is compared with
            (see ``draw_pairs``). None pairs by index, the paper's way, and needs K = G.

    Returns:
        float64 [N, G], each in [low, high].

    Raises:
        ValueError: shapes that do not fit, or a reward that is not finite.
    """
    rewards, reference_rewards = _table(rewards, "rewards"), _table(reference_rewards, "reference_rewards")
    if len(rewards) != len(reference_rewards):
        raise ValueError(f"{len(rewards)} groups of rewards, but {len(reference_rewards)} of reference rewards")
    if estimator == "expected":
        return np.clip(rewards[:, :, None] - reference_rewards[:, None, :], low, high).mean(axis=2)
    if estimator != "sampled":
        raise ValueError(f"margin estimator {estimator!r}: known are 'sampled' and 'expected'")
    if pairs is not None:
        reference_rewards = np.take_along_axis(reference_rewards, pairs, axis=1)
    if rewards.shape != reference_rewards.shape:
        raise ValueError(
            f"rewards {rewards.shape} are paired by index with reference rewards {reference_rewards.shape}: "
            "give one reference reward per completion, or pass pairs"
        )
    return np.clip(rewards - reference_rewards, low, high)


def draw_pairs(seeds: Sequence[int], group_size: int, reference_samples: int) -> np.ndarray:
    """A partner among the K reference samples for each completion, without repeats inside a group.

    Args:
        seeds: one for each of the N groups. A group's draw depends on its seed alone.
        group_size: G.
        reference_samples: K >= G.

    Returns:
        int64 [N, G], columns in [0, K).

    Raises:
        ValueError: K < G.
    """
    if reference_samples < group_size:
        raise ValueError(
            f"{reference_samples} reference rewards for {group_size} completions: the sampled margin needs at least "
            "one each; store more, or use the expected margin"
        )
    drawn = [np.random.default_rng(seed).permutation(reference_samples)[:group_size] for seed in seeds]
    return np.array(drawn, dtype=np.int64).reshape(len(seeds), group_size)


def augmented_advantage(
    rewards: np.ndarray,
    reference_rewards: np.ndarray,
    *,
    scale_rewards: bool,
    low: float,
    high: float,
    estimator: MarginEstimator,
    pairs: np.ndarray | None = None,
) -> np.ndarray:
    """AAPO's augmented advantage A*_i = A_i + delta_i (arXiv 2505.14264). The margin is not divided by the std.

    Arguments, result [N, G] and errors as in ``group_advantage`` and ``margin``.
    """
    return group_advantage(rewards, scale_rewards) + margin(rewards, reference_rewards, low, high, estimator, pairs)


def gpg_alpha(groups: int, dead_groups: int) -> float:
    """GPG's correction alpha = B / (B - M) (arXiv 2504.02546): M of the B groups carry no gradient but count in the
    loss's denominator; alpha times the loss is the loss over the others.

    Args:
        groups: B, groups of the optimizer step over all ranks.
        dead_groups: M, those of them whose final advantages are all zero (``zero_advantage``), over all ranks.

    Returns:
        alpha >= 1. It is 1 where all groups are dead: there is nothing to scale.

    Raises:
        ValueError: not 0 <= M <= B.
    """
    if not 0 <= dead_groups <= groups:
        raise ValueError(f"{dead_groups} dead groups of {groups}")
    return groups / (groups - dead_groups) if dead_groups < groups else 1.0


def zero_std(rewards: np.ndarray) -> np.ndarray:
    """Bool [N]: groups whose rewards [N, G] are all equal, where a group-only method learns nothing."""
    return (rewards == rewards[:, :1]).all(axis=1)


def zero_advantage(advantages: np.ndarray) -> np.ndarray:
    """Bool [N]: groups whose final advantages [N, G] are all exactly zero. Only these may be skipped: under AAPO a
    group of equal rewards can still carry a margin."""
    return (advantages == 0.0).all(axis=1)


def _table(values: np.ndarray, name: str) -> np.ndarray:
    """As float64 [N, columns], columns >= 1, all finite."""
    table = np.asarray(values, dtype=np.float64)
    if table.ndim != 2 or table.shape[1] == 0:
        raise ValueError(f"{name} must be of shape [groups, samples], samples >= 1, not {table.shape}")
    if not np.isfinite(table).all():
        group, column = np.argwhere(~np.isfinite(table))[0]
        raise ValueError(f"{name}[{group}, {column}] is {table[group, column]}: rewards must be finite numbers")
    return table
