"""Completions that came one by one from other processes are one result in the order of what was asked."""

from __future__ import annotations

import math

import numpy as np

from nemo_aapo.engines.elsewhere import arranged, stats_of
from nemo_aapo.types import Completion


def completion(tokens: int) -> Completion:
    return Completion(np.zeros(tokens, np.int32), np.zeros(tokens, np.float32), "length", 0)


def test_completions_are_in_the_order_of_prompts_and_seeds_however_they_came():
    made = {(i, j): completion(i + j) for i, j in [(0, 0), (0, 1), (2, 0)]}
    finished = [(i, j, made[i, j]) for i, j in [(2, 0), (0, 1), (0, 0)]]
    assert arranged(finished, [[5, 6], [], [7]]) == [[made[0, 0], made[0, 1]], [], [made[2, 0]]]


def test_stragglers_are_measured_also_where_nothing_was_generated():
    stats = stats_of([(0, 0, completion(1)), (0, 1, completion(3))], 2.0)
    assert (stats.tokens, stats.seconds, stats.steps, stats.tail_factor) == (4, 2.0, 0, 1.5)
    assert math.isnan(stats.idle_fraction)
    assert stats_of([(0, 0, completion(0))], 1.0).tail_factor == 1.0
    assert stats_of([], 1.0).tokens == 0
