"""Algorithms: scored groups in, advantages and a loss out.

    base        what an algorithm is: a class with two hooks, and what the hooks take
    builtin/    one file for each algorithm that comes with the product
    registry    algorithms by name, and those of a user's own file
    advantage   the equations of advantages, pure functions of float64 arrays
    loss        the equations of losses and denominators, pure functions of tensors
    hooks       an algorithm's two hooks called: their errors in words, what they give looked at
    objective   what trainer and learner hold: an algorithm under the settings that hold for every one

In the symbols of AAPO (arXiv 2505.14264): prompt q has completions o_1 .. o_G with rewards r_1 .. r_G, and the frozen
reference's completions of the same prompt have rewards r'_1 .. r'_K; A_i is a completion's advantage, w_it the weight
of its tokens in the loss.

A completion whose scoring failed (its reward is NaN) has no advantage, and is in no mean, no deviation, no margin and
no denominator: loss and gradient are what they would be had it never been sampled.
"""

from nemo_aapo.algorithms.base import Algorithm, ScoredGroups, Tokens

__all__ = ["Algorithm", "ScoredGroups", "Tokens"]
