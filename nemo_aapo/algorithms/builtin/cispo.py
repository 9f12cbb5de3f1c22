"""CISPO, Clipped Importance Sampling Policy Optimization (MiniMax-M1, arXiv 2506.13585): ``algorithm=cispo``.

    A_i  = (r_i - mean r) / (std r + 1e-4)
    L    = - sum_i sum_t w_it sg(clip(rho_it, 1 - low, 1 + high)) A_i log pi(o_it)      sg: without a gradient
    w_it = 1 / (tokens of the batch)

The clip bounds a token's weight and leaves its gradient, where GRPO's takes the gradient away. The paper sets no lower
bound and does not name the upper one; here low = 1 (none) and high = 4, TRL's and verl's order of magnitude.
"""

from __future__ import annotations

from typing import ClassVar

from nemo_aapo.algorithms.builtin.aapo import AAPO


class CISPO(AAPO):
    """Cross-entropy under a clipped ratio: ``conf/algorithm/cispo.yaml`` sets the switches."""

    paper: ClassVar[str] = "CISPO ([arXiv 2506.13585](https://arxiv.org/abs/2506.13585))"
