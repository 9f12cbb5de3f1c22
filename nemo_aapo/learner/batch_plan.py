"""Sequences -> micro-batches under one token budget, balanced over the data-parallel ranks.

``max_tokens_per_microbatch`` alone decides. The plan is a pure function of the sequences' lengths, so that every rank
works out the same one; only then do sequences move to the rank that trains on them.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from nemo_aapo.learner.microbatch import pad_to


def plan(
    lengths: Sequence[int], *, budget: int, data_parallel_size: int, multiple: int = 1, packed: bool = False
) -> list[list[list[int]]]:
    """Distribute sequences over micro-batches of at most ``budget`` tokens, padding included; as many on every rank.

    Longest first. Padded rows: the sorted sequences are cut into micro-batches, so that neighbours need little padding.
    Packed: each sequence goes to the first micro-batch that has room for it. Micro-batches then go to the rank with the
    least work so far, where work counts tokens and, for attention, squared lengths. Distributing sequences first and
    cutting them into micro-batches on each rank balances better on paper, but pads more: the busiest rank then has 6 to
    25 % more padded tokens (measured on log-normal lengths).

    Args:
        lengths: prompt + completion tokens of each sequence of the whole optimizer batch. What is said of a sequence
            here holds of a prefix group, which stays whole, too.
        budget: upper bound of a micro-batch's tokens (``padded_tokens``).
        data_parallel_size: number of ranks to distribute to.
        multiple: what token counts are padded to: each sequence's or, packed, the micro-batch's.
        packed: sequences lie end to end in one row.

    Returns:
        ``plan[rank][micro-batch]``: indices into ``lengths``. A micro-batch is empty where there are fewer sequences
        than ranks.

    Raises:
        ValueError: one sequence alone exceeds the budget.
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    if order and pad_to(lengths[order[0]], multiple) > budget:
        raise ValueError(f"a sequence of {lengths[order[0]]} tokens exceeds max_tokens_per_microbatch={budget}")
    batches: list[list[int]] = []
    sums: list[int] = []
    for i in order:
        # Of micro-batches of padded rows only the newest can have room: the next one is begun when one is full.
        for k in range(0 if packed else max(len(batches) - 1, 0), len(batches)):
            rows = (len(batches[k]) + 1) * pad_to(lengths[batches[k][0]], multiple)
            if (pad_to(sums[k] + lengths[i], multiple) if packed else rows) <= budget:
                batches[k].append(i)
                sums[k] += lengths[i]
                break
        else:
            batches.append([i])
            sums.append(lengths[i])
    _split_until_divisible(batches, data_parallel_size)
    return _distribute(batches, lengths, data_parallel_size)


def padded_tokens(lengths: Sequence[int], multiple: int, packed: bool) -> int:
    """Tokens that the forward pass of a micro-batch of these sequences sees, padding included."""
    if packed:
        return pad_to(sum(lengths), multiple)
    return len(lengths) * pad_to(max(lengths, default=0), multiple)


def _split_until_divisible(batches: list[list[int]], ranks: int) -> None:
    """Halve the fullest micro-batches (or add empty ones) until each rank gets the same number, at least one."""
    while not batches or len(batches) % ranks:
        fullest = max(range(len(batches)), key=lambda k: len(batches[k]), default=None)
        if fullest is None or len(batches[fullest]) < 2:
            batches.append([])
            continue
        whole = batches[fullest]
        batches[fullest : fullest + 1] = [whole[: len(whole) // 2], whole[len(whole) // 2 :]]


def _distribute(batches: list[list[int]], lengths: Sequence[int], ranks: int) -> list[list[list[int]]]:
    """Assign micro-batches to ranks, heaviest first, each to the rank with the least work so far; as many to each."""
    mean = max(1.0, float(np.mean(lengths)) if len(lengths) else 1.0)

    def work(batch: list[int]) -> float:
        return sum(lengths[i] * (1.0 + lengths[i] / mean) for i in batch)

    assigned: list[list[list[int]]] = [[] for _ in range(ranks)]
    load = [0.0] * ranks
    per_rank = len(batches) // ranks
    for batch in sorted(batches, key=lambda batch: (-work(batch), batch)):
        target = min((r for r in range(ranks) if len(assigned[r]) < per_rank), key=lambda r: (load[r], r))
        assigned[target].append(batch)
        load[target] += work(batch)
    return assigned


def padding_fraction(
    batches: Sequence[Sequence[int]], lengths: Sequence[int], multiple: int = 1, packed: bool = False
) -> float:
    """Fraction of the forward pass's tokens that is padding."""
    padded = sum(padded_tokens([lengths[i] for i in b], multiple, packed) for b in batches if b)
    return 1.0 - sum(lengths[i] for b in batches for i in b) / padded if padded else 0.0
