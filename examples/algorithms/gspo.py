"""GSPO (arXiv 2507.18071) as if it were not built in: one importance ratio for a sequence.

python scripts/train.py experiment=quickstart algorithm.custom=examples/algorithms/gspo.py:GSPO \
    algorithm.settings='{low: 3.0e-4, high: 4.0e-4}' algorithm.loss_aggregation=sequence algorithm.updates_per_rollout=2
"""

from dataclasses import dataclass

import torch

from nemo_aapo import Algorithm
from nemo_aapo.algorithms.advantage import group_advantage
from nemo_aapo.algorithms.loss import ratio


@dataclass(frozen=True)
class GSPO(Algorithm):
    low: float = 3e-4
    high: float = 4e-4
    needs_old_logprobs = True

    def advantages(self, groups):
        return group_advantage(groups.rewards, scale_rewards=True)

    def token_loss(self, tokens):
        s = ratio(tokens.sequence_mean(tokens.logprobs - tokens.old_logprobs))
        clipped = s.clamp(1 - self.low, 1 + self.high)
        surrogate = torch.minimum(s * tokens.advantages, clipped * tokens.advantages)
        # a sum over tokens: the learner makes it the mean over all micro-batches and ranks
        return -(tokens.weights * surrogate).sum(), {"ratio/mean": (s.detach() * tokens.valid).sum()}
