"""AAPO whose margin fades: its bounds fall by a cosine from the paper's to a share of them at the last step.

python scripts/train.py experiment=quickstart algorithm.custom=examples/algorithms/margin_schedule.py:FadingMargin
"""

import math
from dataclasses import dataclass

from nemo_aapo import Algorithm
from nemo_aapo.algorithms.advantage import group_advantage, margin
from nemo_aapo.algorithms.loss import cross_entropy


@dataclass(frozen=True)
class FadingMargin(Algorithm):
    low: float = -0.2
    high: float = 0.28
    last: float = 0.1  # share of the bounds that is left at the end
    needs_reference_rewards = True

    def __post_init__(self):
        if not self.low <= 0 <= self.high:
            raise ValueError(f"low={self.low}, high={self.high}: low <= 0 <= high is needed")

    def share(self, step, max_steps):
        done = step / max(max_steps - 1, 1)
        return self.last + (1 - self.last) * (1 + math.cos(math.pi * done)) / 2

    def advantages(self, groups):
        share = self.share(groups.step, groups.max_steps)
        delta = margin(groups.rewards, groups.reference_rewards, share * self.low, share * self.high, "expected")
        return group_advantage(groups.rewards, scale_rewards=True) + delta

    def token_loss(self, tokens):
        return cross_entropy(tokens)
