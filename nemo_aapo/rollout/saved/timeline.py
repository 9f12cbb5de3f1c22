"""What a run in flight may take up again after a kill: which groups of its bank, and which steps as they were made.

In flight, who was fast decides which groups a step trains on. So the bank keeps that choice, too. A run that goes on
after step c makes the steps behind it again on the same groups: its policy after each of them is the same, and the
tokens that this policy had sampled are its own. Where a choice can't be made again, as one of its groups was lost, the
run takes another course from there. Groups with tokens of later policies are another run's then, and are left.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from nemo_aapo.rollout.buffer import Key


def repeated_until(
    done: int, in_hand: Collection[Key], newest: Mapping[Key, int], taken: Mapping[int, Sequence[Key]]
) -> int:
    """The number of steps that are done once all steps have been made again that can be.

    Args:
        done: steps that the checkpoint has.
        in_hand: groups that it holds.
        newest: of groups in the bank, the steps behind the newest policy that sampled a token.
        taken: the groups that each step trained on.

    >>> repeated_until(3, [(3, 0)], {(4, 0): 3, (5, 0): 4}, {3: [(3, 0)], 4: [(5, 0)], 5: [(6, 0)]})
    5
    """
    while done in taken and all(key in in_hand or newest.get(key, done + 1) <= done for key in taken[done]):
        done += 1
    return done
