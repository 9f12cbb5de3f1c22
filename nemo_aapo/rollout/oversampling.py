"""More prompts than a step needs are generated, and those without a signal are left out (``rollout.oversample``).

A group teaches nothing if all its *final* advantages are zero. Rewards that are all equal are not the same: there, the
margin to the reference still teaches. Which groups are taken depends on the order of the prompts alone, not on which
were finished first, so short completions have no preference and a resumed run takes the same ones.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from nemo_aapo.distributed import parallel
from nemo_aapo.rollout.spread import own_shard, owner
from nemo_aapo.types import Group


def chosen(signals: Sequence[bool], needed: int) -> list[int]:
    """Which groups a step trains on, in their order: the first with a signal; where they are too few, others too.

    >>> chosen([False, True, True, False, True], 2), chosen([False, True, False, False], 3)
    ([1, 2], [0, 1, 2])
    """
    by_worth = sorted(range(len(signals)), key=lambda i: not signals[i])  # stable: in order among equals
    return sorted(by_worth[:needed])


def select(groups: Sequence[Group], drawn: int, needed: int) -> tuple[list[tuple[int, Group]], dict[str, float]]:
    """The groups that a step trains on, shared out anew over the data-parallel ranks. Collective.

    Args:
        groups: this rank's of the ``drawn`` ones of all ranks, with final advantages.

    Returns:
        This rank's of the ``needed`` ones, each with its number among those drawn; what was left out, as metrics.
    """
    first = own_shard(drawn).start
    numbered = list(enumerate(groups, first))
    if drawn == needed:
        return numbered, {}
    mine = [bool(np.nan_to_num(group.final_advantages).any()) for group in groups]
    signals = [signal for part in parallel.gather_data_parallel(mine) for signal in part]
    outgoing: list[list[tuple[int, Group]]] = [[] for _ in range(parallel.data_parallel_size())]
    for place, number in enumerate(chosen(signals, needed)):
        if first <= number < first + len(groups):
            outgoing[owner(place, needed, len(outgoing))].append(numbered[number - first])
    taken = sorted(parallel.exchange_data_parallel(outgoing), key=lambda pair: pair[0])
    return taken, {
        "rollout/no_signal_fraction": 1.0 - sum(signals) / drawn,
        "rollout/wasted_fraction": max(0, sum(signals) - needed) / drawn,
    }
