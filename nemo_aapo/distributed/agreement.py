"""One outcome for all ranks: what one of them does, or all, ends well everywhere or in the same error everywhere.

A rank that raised alone would leave the others waiting in their next collective. Collectives take a group of their own
where another thread of the process may be in the midst of one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from nemo_aapo.errors import CheckpointError, ConfigError

T = TypeVar("T")
Group = dist.ProcessGroup | None
"""None: the group of all ranks that everybody uses. Any other holds all ranks too."""


def on_first_rank(action: Callable[[], T], group: Group = None) -> T:
    """Rank 0 acts; all ranks get its result, or raise its error.

    Raises:
        CheckpointError, ConfigError: what ``action`` raised; any other error as the cause of a CheckpointError.
    """
    box: list[Any] = [_outcome(action) if dist.get_rank() == 0 else None]
    if dist.get_world_size() > 1:
        dist.broadcast_object_list(box, src=0, group=group)
    if isinstance(box[0], CheckpointError | ConfigError):
        raise box[0]
    return box[0]


def on_all_ranks(action: Callable[[], T], group: Group = None) -> list[T]:
    """All ranks act; each gets all results in rank order, or raises the first error.

    Raises:
        CheckpointError, ConfigError: as ``on_first_rank``; the message of the former begins with the rank.
    """
    outcomes: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(outcomes, _outcome(action), group=group)
    for rank, outcome in enumerate(outcomes):
        if isinstance(outcome, ConfigError):
            raise outcome
        if isinstance(outcome, CheckpointError):
            raise CheckpointError(f"rank {rank}: {outcome}") from outcome
    return outcomes


def _outcome(action: Callable[[], T]) -> T | CheckpointError | ConfigError:
    try:
        return action()
    except (CheckpointError, ConfigError) as error:
        return error
    except Exception as error:
        failure = CheckpointError(f"{type(error).__name__}: {error}")
        failure.__cause__ = error
        return failure
