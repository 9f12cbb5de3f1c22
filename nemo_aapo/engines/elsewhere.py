"""What engines have in common: completions that came one by one, as one result."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from nemo_aapo.engines.base import RolloutStats
from nemo_aapo.types import Completion

Finished = list[tuple[int, int, Completion]]
"""(i, j, completion j of prompt i), in the order in which they ended."""


def arranged(finished: Finished, seeds: Sequence[Sequence[int]]) -> list[list[Completion]]:
    """The completions in the order of the prompts and their seeds, as ``RolloutEngine.generate`` returns them."""
    found = {(i, j): completion for i, j, completion in finished}
    places = [[(i, j) for j in range(len(row))] for i, row in enumerate(seeds)]
    return [[found[place] for place in itertools.takewhile(found.__contains__, row)] for row in places]


def stats_of(finished: Finished, seconds: float) -> RolloutStats:
    """The figures of one ``generate`` call, of which the caller sees neither steps nor idle rows.

    Args:
        seconds: wall-clock time of the call.
    """
    lengths = [len(completion.token_ids) for _, _, completion in finished]
    tokens = sum(lengths)
    return RolloutStats(
        tokens=tokens,
        seconds=seconds,
        steps=0,
        tail_factor=max(lengths) * len(lengths) / tokens if tokens else 1.0,
        idle_fraction=float("nan"),
    )
