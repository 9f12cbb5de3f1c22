"""Curves of runs -> differences paired by seed, with intervals. Pure functions of arrays."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from nemo_aapo.evaluation.estimators import student_t_quantile


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean over seeds and its 95 % interval, mean plus and minus ``half``."""

    mean: float
    half: float

    @classmethod
    def of(cls, values: Sequence[float] | np.ndarray) -> Interval:
        """Student's t interval of two or more values, which are assumed to be independent and normal."""
        values = np.asarray(values, dtype=np.float64)
        n = len(values)
        half = student_t_quantile(0.975, n - 1) * values.std(ddof=1) / math.sqrt(n)
        return cls(float(values.mean()), float(half))

    def text(self, signed: bool = False) -> str:
        """``0.912 ± 0.008``"""
        return f"{self.mean:{'+' if signed else ''}.3f} ± {self.half:.3f}"

    @property
    def verdict(self) -> str:
        """``higher`` or ``lower`` where the interval leaves out zero; else ``equal``: not to be told apart."""
        return "higher" if self.mean > self.half else "lower" if self.mean < -self.half else "equal"


@dataclass(frozen=True, slots=True)
class Curve:
    """One run's sampled accuracy, and what had been spent by then."""

    accuracy: np.ndarray
    """float64 [V], at each validation; the first is the base model's."""
    spent: dict[str, np.ndarray]
    """``steps``, ``completions``, ``tokens`` -> float64 [V], rising from 0."""

    def mean_until(self, axis: str, budget: float) -> float:
        """Mean accuracy while the budget is spent: the area under the curve, straight between validations, over it.

        Raises:
            ValueError: the run did not spend so much.
        """
        x, y = self.spent[axis], self.accuracy
        if not 0 < budget <= x[-1]:
            raise ValueError(f"the curve ends at {x[-1]:g} {axis}; a mean until {budget:g} would be made up")
        inside = x < budget
        x = np.append(x[inside], budget)
        y = np.append(y[inside], np.interp(budget, self.spent[axis], self.accuracy))
        return float(np.trapezoid(y, x) / budget)

    def at(self, axis: str, amount: float | np.ndarray) -> np.ndarray:
        """Accuracy when so much was spent, straight between validations."""
        return np.interp(amount, self.spent[axis], self.accuracy)


def common_budget(arms: Sequence[Sequence[Curve]], axis: str) -> float:
    """The most that every run of some arms has spent."""
    return min(float(curve.spent[axis][-1]) for curves in arms for curve in curves)


def difference(arm: Sequence[Curve], other: Sequence[Curve], axis: str, budget: float) -> Interval:
    """How much higher an arm's mean accuracy is at an equal budget, paired by seed.

    Args:
        arm, other: curves of the same seeds in the same order.
    """
    pairs = zip(arm, other, strict=True)
    return Interval.of([a.mean_until(axis, budget) - b.mean_until(axis, budget) for a, b in pairs])


def holds(expected: str, found: Interval) -> bool:
    """Whether what came out is what was expected; ``equal`` holds where zero is inside the interval."""
    return found.verdict == expected
