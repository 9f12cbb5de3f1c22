"""Completions spread over data-parallel ranks that decode in step, so that all of them need about as many steps.

Where experts are spread over data-parallel ranks, those ranks take every decoding step together, and the one with the
longest completions decides for all. So the completions of a prompt are shared out among them, and come back to the rank
whose group they belong to once they have been generated and judged there. Which tokens come out does not depend on it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

from nemo_aapo.distributed import parallel
from nemo_aapo.types import Completion, Routes


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


def own_shard(count: int, rank: int | None = None) -> slice:
    """Which of ``count`` items this data-parallel rank, or another, takes: neighbours, as evenly as can be."""
    rank, size = parallel.data_parallel_rank() if rank is None else rank, parallel.data_parallel_size()
    return slice(rank * count // size, (rank + 1) * count // size)


def owner(prompt: int, prompts: int, ranks: int) -> int:
    """The data-parallel rank in whose shard of all prompts one lies (``own_shard``).

    Example:
        Of 5 prompts rank 0 of 2 has the first two, and ``[owner(i, 5, 2) for i in range(5)]`` is ``[0, 0, 1, 1, 1]``.
    """
    return ((prompt + 1) * ranks - 1) // prompts


def with_one_prompt(row: Sequence[Completion]) -> tuple[Completion, ...]:
    """The completions of one prompt, with the prompt's routes that the first of them has.

    Whoever generated the others has made them anew, and in another batch a near tie may have fallen otherwise.
    """
    first = next((completion.routes for completion in row if completion.routes is not None), None)
    if first is None or all(c.routes is not None and c.routes.prompt is first.prompt for c in row):
        return tuple(row)
    return tuple(
        completion
        if completion.routes is None
        else dataclasses.replace(completion, routes=Routes(first.prompt, completion.routes.completion))
        for completion in row
    )


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
