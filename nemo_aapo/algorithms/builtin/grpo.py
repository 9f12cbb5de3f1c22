"""GRPO, Group Relative Policy Optimization (DeepSeekMath, arXiv 2402.03300): ``algorithm=grpo``.

    A_i    = (r_i - mean r) / (std r + 1e-4)
    rho_it = pi(o_it) / pi_old(o_it)
    L      = sum_i sum_t w_it ( - min(rho_it A_i, clip(rho_it, 1 - low, 1 + high) A_i) + beta KL_it )
    KL_it  = pi_ref / pi - log(pi_ref / pi) - 1
    w_it   = 1 / (sequences x own length)                    the mean of the sequences' means

Defaults of the paper: low = high = 0.2, beta = 0.04.
"""

from __future__ import annotations

from typing import ClassVar

from nemo_aapo.algorithms.builtin.aapo import AAPO


class GRPO(AAPO):
    """AAPO without the margin and with the clipped ratio: ``conf/algorithm/grpo.yaml`` sets its switches."""

    paper: ClassVar[str] = "GRPO ([arXiv 2402.03300](https://arxiv.org/abs/2402.03300))"
