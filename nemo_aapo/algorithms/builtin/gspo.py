"""GSPO, Group Sequence Policy Optimization (arXiv 2507.18071): ``algorithm=gspo``.

    A_i  = (r_i - mean r) / (std r + 1e-4)
    s_i  = (pi(o_i) / pi_old(o_i)) ^ (1 / |o_i|)       one ratio for the sequence: the geometric mean of its tokens'
    L    = - sum_i sum_t w_it min(s_i A_i, clip(s_i, 1 - low, 1 + high) A_i)
    w_it = 1 / (sequences x own length)

Defaults of the paper: low = 3e-4, high = 4e-4; a mean over tokens hardly moves, so the bounds are narrow.
"""

from __future__ import annotations

from typing import ClassVar

from nemo_aapo.algorithms.builtin.aapo import AAPO


class GSPO(AAPO):
    """GRPO with a ratio of sequences: ``conf/algorithm/gspo.yaml`` sets the switches."""

    paper: ClassVar[str] = "GSPO ([arXiv 2507.18071](https://arxiv.org/abs/2507.18071))"
