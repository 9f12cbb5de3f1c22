"""Rewards -> advantages: A_i, delta_i and A*_i of AAPO (arXiv 2505.14264).

    A_i     = (r_i - mean r) / (std r + eps)      group_advantage
    delta_i = clip(r_i - r'_i, low, high)         margin
    A*_i    = A_i + delta_i                       builtin/aapo.py; the margin is not divided by the std

Pure functions of float64 arrays. N is the number of groups (prompts), G the number of completions of a group, K the
number of rewards of the frozen reference for the same prompt. Every function treats each group by itself, so that the
result does not depend on how the groups are distributed over ranks.

NaN is the reward of a completion whose scoring failed. It is in no mean, no deviation and no margin, and its own
advantage is NaN: the rest is what it would be had that completion never been sampled.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np

SCALE_EPS = 1e-4
"""Added to the standard deviation in ``group_advantage`` (AAPO and GRPO implementations agree on the value)."""

MarginEstimator = Literal["sampled", "expected"]


def group_advantage(rewards: np.ndarray, scale_rewards: bool, eps: float = SCALE_EPS) -> np.ndarray:
    """The group-relative advantage A_i of GRPO (arXiv 2402.03300, outcome supervision), GPG and AAPO.

        A_i = r_i - mean(r)                      scale_rewards off
        A_i = (r_i - mean(r)) / (std(r) + eps)   scale_rewards on; std with Bessel's correction (N - 1)

    N, mean and std are those of the rewards that are there. A group of equal rewards gets exactly 0.0, and so does a
    group of one. Equality is decided by comparing the rewards: subtracting a rounded mean can leave 1e-17, which the
    division by eps would turn into a signal.

    Args:
        rewards: float64 [N, G].
        scale_rewards: divide by the standard deviation.
        eps: added to the standard deviation.

    Returns:
        float64 [N, G]; NaN where the reward is.

    Raises:
        ValueError: not a table, or an infinite reward.
    """
    rewards = _table(rewards, "rewards")
    centred = rewards - _mean(rewards)[:, None]
    if scale_rewards:
        centred /= _std(rewards)[:, None] + eps
    return np.where(zero_std(rewards)[:, None] & ~np.isnan(rewards), 0.0, centred)


def margin(
    rewards: np.ndarray,
    reference_rewards: np.ndarray,
    low: float,
    high: float,
    estimator: MarginEstimator,
    pairs: np.ndarray | None = None,
    *,
    scale: bool = False,
) -> np.ndarray:
    """AAPO's advantage margin delta_i (arXiv 2505.14264): how much better than the frozen reference a completion did.

        sampled    delta_i = clip(r_i - r'_k(i), low, high)              k(i): the partner of completion i
        expected   delta_i = (1/K) sum_k clip(r_i - r'_k, low, high)

    Both have the same mean over the reference's samples; the expected one averages K of them and has the lower
    variance. The clip is inside the mean: it bounds each comparison, as in the paper.

    With ``scale`` each difference is divided by std(r') + 1e-4 before the clip, so that the bounds are in units of the
    reference's spread: 0.28 then means the same of a reward between 0.9 and 1 as of one between -10 and 10. Where the
    reference always got the same, whatever differs from it is at a bound.

    K counts the reference rewards that are there. A completion whose partner has none gets the expected margin in its
    place, which has the same mean; a group without any reference reward has no margin to add: 0.

    Args:
        rewards: float64 [N, G].
        reference_rewards: float64 [N, K], the same reward for reference completions sampled with the same spec.
        low: lower bound, <= 0.
        high: upper bound, >= 0.
        estimator: see above.
        pairs: int [N, G], for ``"sampled"``: column of ``reference_rewards`` that each completion is compared with
            (see ``sample_pairs``). None pairs by index, the paper's way, and needs K = G.
        scale: see above.

    Returns:
        float64 [N, G], each in [low, high]; NaN where the reward is.

    Raises:
        ValueError: shapes that do not fit, or an infinite reward.
    """
    rewards, reference_rewards = _table(rewards, "rewards"), _table(reference_rewards, "reference_rewards")
    if len(rewards) != len(reference_rewards):
        raise ValueError(f"{len(rewards)} groups of rewards, but {len(reference_rewards)} of reference rewards")
    unit = _std(reference_rewards)[:, None] + SCALE_EPS if scale else np.ones((len(rewards), 1))
    differences = rewards[:, :, None] - reference_rewards[:, None, :]
    expected = _mean(np.clip(differences / unit[:, :, None], low, high))
    expected = np.where(np.isnan(rewards), np.nan, expected)
    if estimator == "expected":
        return expected
    if estimator != "sampled":
        raise ValueError(f"margin estimator {estimator!r}: known are 'sampled' and 'expected'")
    if pairs is not None:
        reference_rewards = np.take_along_axis(reference_rewards, pairs, axis=1)
    if rewards.shape != reference_rewards.shape:
        raise ValueError(
            f"rewards {rewards.shape} are paired by index with reference rewards {reference_rewards.shape}: "
            "give one reference reward per completion, or pass pairs"
        )
    return np.where(np.isnan(reference_rewards), expected, np.clip((rewards - reference_rewards) / unit, low, high))


def schedule(shape: Literal["linear", "cosine"], done: float, end: float) -> float:
    """A share that goes from 1 to ``end`` while ``done`` goes from 0 to 1, and stays there."""
    done = min(done, 1.0)
    left = 1.0 - done if shape == "linear" else (1.0 + math.cos(math.pi * done)) / 2.0
    return end + (1.0 - end) * left


def sample_pairs(seeds: Sequence[int], group_size: int, reference_samples: int) -> np.ndarray:
    """The partners k(i): one of the K reference samples for each completion, without repeats inside a group.

    Args:
        seeds: one for each of the N groups. A group's partners depend on its seed alone.
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
    partners = [np.random.default_rng(seed).permutation(reference_samples)[:group_size] for seed in seeds]
    return np.array(partners, dtype=np.int64).reshape(len(seeds), group_size)


def gpg_alpha(groups: int, dead_groups: int) -> float:
    """GPG's correction alpha = B / (B - M) (arXiv 2504.02546): M of the B groups carry no gradient but count in the
    loss's denominator; alpha times the loss is the loss over the others.

    Args:
        groups: B, groups of the optimizer step over all ranks, but for those without any scored completion.
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
    """bool [N], the groups whose rewards [N, G] are all equal: A_i is 0 there, and a method without margin learns
    nothing. So it is in a group that has none, or one."""
    first = np.argmin(np.isnan(rewards), axis=1)[:, None]
    return ((rewards == np.take_along_axis(rewards, first, axis=1)) | np.isnan(rewards)).all(axis=1)


def zero_advantage(advantages: np.ndarray) -> np.ndarray:
    """bool [N], the groups that have advantages A*_i [N, G], all of them exactly zero. Only these may be skipped: under
    AAPO a group of equal rewards can still have a margin."""
    return ((advantages == 0.0) | np.isnan(advantages)).all(axis=1) & scored(advantages)


def scored(values: np.ndarray) -> np.ndarray:
    """bool [N], the groups of which at least one completion was scored: of the values [N, G] not all are NaN."""
    return ~np.isnan(values).all(axis=1)


def margin_metrics(own: np.ndarray, advantages: np.ndarray, *, low: float, high: float) -> dict[str, float]:
    """How much of final advantages A* = A + delta is the group's, and how much the margin over the reference.

    Args:
        own, advantages: float64 [N, G] of a step's groups, A and A*; NaN where there is none.
        low, high: the margin's bounds.

    Returns:
        Means over the scored completions: ``advantage/group_abs_mean`` of abs(A_i), ``margin/mean`` and
        ``margin/abs_mean`` of delta_i, and ``margin/at_bound``, the share of completions with one of its two bounds.
    """
    there = ~np.isnan(advantages)
    own, delta = own[there], (advantages - own)[there]
    values = {
        "advantage/group_abs_mean": np.abs(own),
        "margin/mean": delta,
        "margin/abs_mean": np.abs(delta),
        "margin/at_bound": np.isclose(delta, low, atol=1e-9) | np.isclose(delta, high, atol=1e-9),
    }
    return {name: float(value.mean()) if len(value) else float("nan") for name, value in values.items()}


def _mean(values: np.ndarray) -> np.ndarray:
    """Over the last axis, of what is not NaN; 0 where there is nothing."""
    there = ~np.isnan(values)
    return np.where(there, values, 0.0).sum(axis=-1) / np.maximum(there.sum(axis=-1), 1)


def _std(values: np.ndarray) -> np.ndarray:
    """With Bessel's correction over the last axis, of what is not NaN; 0 where there are not two of them."""
    there = ~np.isnan(values)
    squares = np.where(there, (values - _mean(values)[..., None]) ** 2, 0.0).sum(axis=-1)
    return np.sqrt(squares / np.maximum(there.sum(axis=-1) - 1, 1))


def _table(values: np.ndarray, name: str) -> np.ndarray:
    """The values as float64 [N, columns] with columns >= 1, none infinite; ValueError otherwise."""
    table = np.asarray(values, dtype=np.float64)
    if table.ndim != 2 or table.shape[1] == 0:
        raise ValueError(f"{name} must be of shape [groups, samples], samples >= 1, not {table.shape}")
    if np.isinf(table).any():
        group, column = np.argwhere(np.isinf(table))[0]
        raise ValueError(f"{name}[{group}, {column}] is {table[group, column]}: rewards must be finite numbers")
    return table
