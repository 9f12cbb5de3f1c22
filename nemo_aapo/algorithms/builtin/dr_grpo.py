"""Dr. GRPO, GRPO done right (arXiv 2503.20783): ``algorithm=dr_grpo``.

    A_i  = r_i - mean r                                no division: it weighs easy and hard questions more
    L    = - sum_i sum_t w_it min(rho_it A_i, clip(rho_it, 1 - low, 1 + high) A_i)
    w_it = 1 / (sequences x max_new_tokens)            no division by the own length: it favours long wrong answers

Defaults of the paper: low = high = 0.2, no KL term.
"""

from __future__ import annotations

from typing import ClassVar

from nemo_aapo.algorithms.builtin.aapo import AAPO


class DrGRPO(AAPO):
    """GRPO without its two normalisations: ``conf/algorithm/dr_grpo.yaml`` sets the switches."""

    paper: ClassVar[str] = "Dr. GRPO ([arXiv 2503.20783](https://arxiv.org/abs/2503.20783))"
