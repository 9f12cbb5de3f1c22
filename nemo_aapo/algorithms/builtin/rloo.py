"""RLOO, REINFORCE Leave-One-Out (arXiv 2402.14740): ``algorithm=rloo``.

    A_i  = r_i - (sum over j != i of r_j) / (n - 1)    n: completions of the group that were scored
    L    = - sum_i sum_t w_it A_i log pi(o_it)
    w_it = 1 / (sequences x max_new_tokens)            a sum over tokens, a mean over sequences, up to a constant

The baseline of a completion does not know its own reward, so that A_i is unbiased. A_i = (r_i - mean r) n / (n - 1).
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from nemo_aapo.algorithms.base import ScoredGroups
from nemo_aapo.algorithms.builtin.aapo import AAPO


class RLOO(AAPO):
    """A baseline of the other completions: ``conf/algorithm/rloo.yaml`` sets the switches."""

    paper: ClassVar[str] = "RLOO ([arXiv 2402.14740](https://arxiv.org/abs/2402.14740))"

    def group_advantages(self, groups: ScoredGroups) -> np.ndarray:
        """A_i above; 0 for the only one that was scored."""
        scored = (~np.isnan(groups.rewards)).sum(axis=1, keepdims=True)
        return super().group_advantages(groups) * (scored / np.maximum(scored - 1, 1))
