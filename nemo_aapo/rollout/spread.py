"""Completions spread over data-parallel ranks that decode in step, so that all of them need about as many steps.

Where experts are spread over data-parallel ranks, those ranks take every decoding step together, and the one with the
longest completions decides for all. So the completions of a prompt are shared out among them, and come back to the rank
whose group they belong to once they have been generated and judged there. Which tokens come out does not depend on it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from nemo_aapo.distributed import parallel


class Place(NamedTuple):
    """Which completion of a call it is."""

    prompt: int
    """Index among the prompts of all ranks."""
    completion: int
    """Index among those of the prompt."""


def ranks_in_step(shares_weights: bool) -> int:
    """Data-parallel ranks, this one and its neighbours, whose engines decode in step.

    Args:
        shares_weights: the engine serves the learner's own weights, hence also its layout.
    """
    return max(parallel.expert_parallel_size() // parallel.tensor_parallel_size(), 1) if shares_weights else 1


def spread(expected: Sequence[float], completions: Sequence[int], ranks: int) -> list[list[Place]]:
    """The completions of some prompts, spread over ranks by their expected tokens: longest first, to whom has fewest.

    Args:
        expected: tokens of one completion of each prompt. completions: how many each prompt has.

    Example:
        ``spread([3, 40], [2, 2], 2)`` is ``[[(1, 0), (0, 0)], [(1, 1), (0, 1)]]``.
    """
    parts: list[list[Place]] = [[] for _ in range(ranks)]
    loads = [(0.0, 0)] * ranks  # tokens, completions
    for prompt in sorted(range(len(expected)), key=lambda i: -expected[i]):
        for completion in range(completions[prompt]):
            rank = loads.index(min(loads))
            parts[rank].append(Place(prompt, completion))
            tokens, count = loads[rank]
            loads[rank] = tokens + expected[prompt], count + 1
    return parts
