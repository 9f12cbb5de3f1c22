"""avg@k, pass@k and maj@k of judged completions, their standard errors, and paired differences.

Pure functions of plain arrays. Problems are the units: the completions of one problem share its difficulty and are not
independent, so every standard error is that of a mean of per-problem numbers.

A verdict is 1 for right, 0 for wrong, and NaN for a completion that could not be judged. That one is neither right nor
wrong: it is left out, and so is a problem of which too few are left.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

EXACT_FLIPS = 16
"""If at most so many problems differ, the sign-flip test goes through all 2**n sign patterns."""
BLOCK = 1000
"""Resamples are made so many at a time, to bound their memory."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean over problems, with its standard error."""

    value: float
    stderr: float
    """Standard deviation of the per-problem numbers (n - 1 below) over sqrt(n); NaN for a single problem."""


def over_problems(values: np.ndarray) -> Estimate:
    """The mean of per-problem numbers [P] and its standard error, without those that are NaN; NaN where none is left.

    The error is that of other problems of the same kind being drawn, and their completions with them.
    """
    values = np.asarray(values, dtype=np.float64)
    values = values[~np.isnan(values)]
    if not len(values):
        return Estimate(math.nan, math.nan)
    error = values.std(ddof=1) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return Estimate(float(values.mean()), float(error))


def shares(correct: np.ndarray) -> np.ndarray:
    """float64 [P]: each problem's share of right completions among its judged ones [P, k]; NaN where there are none."""
    rows = [row[~np.isnan(row)] for row in np.asarray(correct, dtype=np.float64)]
    return np.array([row.mean() if len(row) else math.nan for row in rows])


def average(correct: np.ndarray) -> Estimate:
    """avg@k: the mean over problems of the share of right completions.

    Args:
        correct: bool or float [P, k].
    """
    return over_problems(shares(correct))


def sampling_error(correct: np.ndarray) -> float:
    """Standard error of avg@k for these very problems, were their completions drawn anew; NaN for k = 1.

    sqrt(sum_i s_i^2 / k_i) / P with s_i the standard deviation (k_i - 1 below) of problem i, over the P problems with
    at least two judged completions k_i.

    Args:
        correct: bool or float [P, k].
    """
    rows = [row[~np.isnan(row)] for row in np.asarray(correct, dtype=np.float64)]
    errors = np.array([row.var(ddof=1) / len(row) for row in rows if len(row) > 1])
    return float(np.sqrt(errors.sum()) / len(errors)) if len(errors) else math.nan


def pass_at(correct: np.ndarray, k: int) -> Estimate:
    """pass@k without bias: the chance that k of the n completions, drawn without replacement, hold a right one.

    1 - C(n - c, k) / C(n, k) for each problem with c right ones (Chen et al. 2021, arXiv 2107.03374). n counts its
    judged completions; a problem with fewer than k of them is left out.

    Args:
        correct: bool or float [P, n].
        k: 1 <= k <= n.
    """
    correct = np.asarray(correct, dtype=np.float64)
    if not 1 <= k <= correct.shape[1]:
        raise ValueError(f"pass@{k} of {correct.shape[1]} completions")
    counts = zip((~np.isnan(correct)).sum(axis=1).tolist(), (correct == 1).sum(axis=1).tolist(), strict=True)
    return over_problems(
        np.array([1.0 - math.comb(n - c, k) / math.comb(n, k) if n >= k else math.nan for n, c in counts])
    )


def majority(answers: Sequence[Sequence[str | None]], correct: np.ndarray) -> Estimate:
    """maj@k: whether the most frequent answer of each problem's k completions is right.

    Answers are the same if their texts are (``votes.answer_of`` normalises them). Of answers with equally many votes,
    and of completions that gave the same answer but were judged differently, one is taken at random: the expectation
    over that is a problem's number. A completion that could not be judged has no vote.

    Args:
        answers: [P][k], None for a completion without an answer, which has no vote.
        correct: bool or float [P, k].
    """
    return over_problems(np.array([_voted(row, right) for row, right in zip(answers, correct, strict=True)]))


def _voted(answers: Sequence[str | None], correct: Sequence[float]) -> float:
    if all(map(math.isnan, correct)):
        return math.nan
    verdicts: dict[str, list[float]] = defaultdict(list)
    for answer, right in zip(answers, correct, strict=True):
        if answer is not None and not math.isnan(right):
            verdicts[answer].append(float(right))
    votes = Counter({answer: len(found) for answer, found in verdicts.items()})
    most = max(votes.values(), default=0)
    shares = [float(np.mean(verdicts[answer])) for answer, count in votes.items() if count == most]
    return float(np.mean(shares)) if shares else 0.0


@dataclass(frozen=True, slots=True)
class Difference:
    """B minus A on the same problems, by per-problem means."""

    problems: int
    """Number of problems."""
    value: float
    """Mean of the paired differences."""
    stderr: float
    """Standard error of that mean."""
    low: float
    """Lower end of the 95 % interval, by bootstrap over problems (percentiles)."""
    high: float
    """Upper end of that interval."""
    p_value: float
    """Two-sided p-value of the sign-flip permutation test: how often differences this large come about if A and B do
    not differ."""


def paired_difference(a: np.ndarray, b: np.ndarray, *, seed: int, resamples: int = 10_000) -> Difference:
    """Compare per-problem means [P] of two policies on the same problems. The same seed gives the same numbers."""
    return macro_difference([(a, b)], seed=seed, resamples=resamples)


def macro_difference(
    strata: Sequence[tuple[np.ndarray, np.ndarray]], *, seed: int, resamples: int = 10_000
) -> Difference:
    """Compare the mean over several benchmarks, each with equal weight; problems are resampled within each.

    Args:
        strata: for each benchmark the per-problem means [P_i] of A and of B.
        seed: the seed of bootstrap and permutation.
        resamples: how many each of the two makes.
    """
    differences = [np.asarray(b, dtype=np.float64) - np.asarray(a, dtype=np.float64) for a, b in strata]
    generator = np.random.Generator(np.random.PCG64(seed))
    means = sum(_bootstrap_means(d, resamples, generator) for d in differences) / len(differences)
    low, high = np.quantile(means, [0.025, 0.975])
    estimates = [over_problems(d) for d in differences]
    return Difference(
        problems=sum(len(d) for d in differences),
        value=float(np.mean([e.value for e in estimates])),
        stderr=math.sqrt(sum(e.stderr**2 for e in estimates)) / len(estimates),
        low=float(low),
        high=float(high),
        p_value=_sign_flips(differences, resamples, generator),
    )


def _bootstrap_means(values: np.ndarray, resamples: int, generator: np.random.Generator) -> np.ndarray:
    """float64 [resamples], means of resamples of the values, drawn with replacement."""
    blocks = [min(BLOCK, resamples - start) for start in range(0, resamples, BLOCK)]
    return np.concatenate([values[generator.integers(0, len(values), (n, len(values)))].mean(axis=1) for n in blocks])


def _sign_flips(differences: Sequence[np.ndarray], resamples: int, generator: np.random.Generator) -> float:
    """Two-sided p-value of the mean of means, under random signs: all patterns if they are few, else random ones."""
    # Each problem's part of the mean over benchmarks. Problems without a difference can't change it.
    parts = np.concatenate([d / (len(d) * len(differences)) for d in differences])
    parts = parts[parts != 0]
    if not len(parts):
        return 1.0
    observed = abs(parts.sum()) * (1 - 1e-12)  # so that rounding does not make equal sums smaller
    if len(parts) <= EXACT_FLIPS:
        patterns = (np.arange(2 ** len(parts))[:, None] >> np.arange(len(parts)) & 1) * 2 - 1
        return float((np.abs(patterns @ parts) >= observed).mean())
    extreme = 0
    for start in range(0, resamples, BLOCK):
        signs = generator.integers(0, 2, (min(BLOCK, resamples - start), len(parts))) * 2 - 1
        extreme += int((np.abs(signs @ parts) >= observed).sum())
    return (extreme + 1) / (resamples + 1)  # counts the observed pattern as one of the resamples


def student_t_quantile(p: float, df: int) -> float:
    """The quantile of Student's t distribution, for 0.5 <= p < 1 and integer degrees of freedom, to about 1e-10."""
    low, high = 0.0, 1.0
    while _student_t_cdf(high, df) < p:
        high *= 2
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if _student_t_cdf(middle, df) < p else (low, middle)
    return (low + high) / 2


def _student_t_cdf(t: float, df: int) -> float:
    """The distribution function for t >= 0, by the finite series 26.7.3 and 26.7.4 of Abramowitz and Stegun."""
    angle = math.atan(t / math.sqrt(df))
    cosine_squared = math.cos(angle) ** 2
    term = total = math.cos(angle) if df % 2 else 1.0
    for i in range(3 if df % 2 else 2, df - 1, 2):
        term *= cosine_squared * (i - 1) / i
        total += term
    if df == 1:
        return 0.5 + angle / math.pi
    if df % 2:
        return 0.5 + (angle + math.sin(angle) * total) / math.pi
    return 0.5 + math.sin(angle) * total / 2
