"""REINFORCE++ (arXiv 2501.03262): ``algorithm=reinforce_pp``.

    A_i  = (r_i - mean R) / (std R + 1e-4)             R: all rewards of the step's batch, over all ranks
    L    = - sum_i sum_t w_it min(rho_it A_i, clip(rho_it, 1 - low, 1 + high) A_i)
    w_it = 1 / (tokens of the batch)

The baseline is the batch's mean, not the prompt's own, so that one completion a prompt would do. Defaults: low = high =
0.2. The paper subtracts beta KL from the rewards of tokens; ``algorithm.kl_coefficient`` adds it to the loss.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from nemo_aapo.algorithms import advantage
from nemo_aapo.algorithms.base import ScoredGroups
from nemo_aapo.algorithms.builtin.aapo import AAPO


class ReinforcePP(AAPO):
    """Advantages over the whole batch: ``conf/algorithm/reinforce_pp.yaml`` sets the switches."""

    paper: ClassVar[str] = "REINFORCE++ ([arXiv 2501.03262](https://arxiv.org/abs/2501.03262))"
    whole_batch: ClassVar[bool] = True

    def group_advantages(self, groups: ScoredGroups) -> np.ndarray:
        """The batch as one group."""
        whole = advantage.group_advantage(groups.rewards.reshape(1, -1), self.scale_rewards)
        return whole.reshape(groups.rewards.shape)
