"""GPG, Group Policy Gradient (arXiv 2504.02546): ``algorithm=gpg``.

    A_i = r_i - mean r                                       no division by the standard deviation
    L   = - alpha sum_i sum_t w_it A_i log pi(o_it)          alpha = B / (B - M): M of B groups have no advantage

It is AAPO without margin and division. ``algorithm.rescale_dead_groups`` is alpha, which counts the groups of all
ranks and so stands outside the hooks (``Objective.alpha``).
"""

from __future__ import annotations

from typing import ClassVar

from nemo_aapo.algorithms.builtin.aapo import AAPO


class GPG(AAPO):
    """``conf/algorithm/gpg.yaml`` sets its switches."""

    paper: ClassVar[str] = "GPG ([arXiv 2504.02546](https://arxiv.org/abs/2504.02546))"
