"""DAPO, Decoupled clip and dynamic sampling (arXiv 2503.14476): ``algorithm=dapo``.

    A_i  = (r_i - mean r) / (std r + 1e-4)
    L    = - sum_i sum_t w_it min(rho_it A_i, clip(rho_it, 1 - low, 1 + high) A_i)
    w_it = 1 / (tokens of the batch)                   long completions count by their tokens

Defaults of the paper: low = 0.2, high = 0.28 ("clip higher"), no KL term, and completions that were cut at the length
limit have no part in the loss (``algorithm.mask_truncated``). Its soft length penalty is the reward ``overlong``. Its
dynamic sampling, which samples more prompts until a batch has no group of equal rewards, is ``rollout.oversample``,
bounded by a factor: groups without a signal that are left over stay in the denominator
(``algorithm.rescale_dead_groups`` takes them out of it).
"""

from __future__ import annotations

from typing import ClassVar

from nemo_aapo.algorithms.builtin.aapo import AAPO


class DAPO(AAPO):
    """GRPO with two bounds and one mean over all tokens: ``conf/algorithm/dapo.yaml`` sets the switches."""

    paper: ClassVar[str] = "DAPO ([arXiv 2503.14476](https://arxiv.org/abs/2503.14476))"
