"""One outcome for all ranks: what one of them does, or all, ends well everywhere or in the same error everywhere.

A rank that raised alone would leave the others waiting in their next collective. Errors cross as their class and
message: those of ``errors.py`` and of arithmetic come out as they are, any other as a RuntimeError. Collectives take a
group of their own where another thread of the process may be in the midst of one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch.distributed as dist

from nemo_aapo.errors import ConfigError, Interrupted, RunError

T = TypeVar("T")
Group = dist.ProcessGroup | None
"""None: the group of all ranks that everybody uses. Any other holds all ranks too, but for ``first_error``."""
Failure = type[RunError] | None
"""What errors of other classes become, but for a ConfigError; None: they stay what they are."""


def agree(action: Callable[[], T]) -> T:
    """Run something on every rank; if it raises on one of them, raise on all of them instead of waiting for it.

    Raises:
        Whatever it raised here; on ranks where it went well, the first failing rank's error.
    """
    result, error = _attempt(action, None)
    error = first_error(error)
    if error is not None:
        raise error
    return cast(T, result)  # it did not fail


def first_error(error: Exception | None, group: Group = None) -> Exception | None:
    """This rank's error, or else that of the first rank of a group that has one; None if none has. Collective."""
    if dist.get_world_size(group) > 1:
        told: list[Any] = [None] * dist.get_world_size(group)
        dist.all_gather_object(told, _told(error), group=group)
        failed = [entry for entry in told if entry is not None]
        if error is None and failed:
            return _again(*failed[0])
    return error


def on_first_rank(action: Callable[[], T], group: Group = None, failure: Failure = None) -> T:
    """Rank 0 acts; all ranks get its result, or raise its error.

    Args:
        failure: what an error of any other class becomes on all ranks.
    """
    result: T | None = None
    error: Exception | None = None
    if dist.get_rank() == 0:
        result, error = _attempt(action, failure)
    if dist.get_world_size() > 1:
        box: list[Any] = [(result, _told(error))]
        dist.broadcast_object_list(box, src=0, group=group)
        result, told = box[0]
        if error is None and told is not None:
            error = _again(*told)
    if error is not None:
        raise error
    return cast(T, result)  # it did not fail


def on_all_ranks(action: Callable[[], T], group: Group = None, failure: Failure = None) -> list[T]:
    """All ranks act; each gets all results in rank order, or raises the first error.

    The message of an error that is no ConfigError begins with the rank.

    Args:
        failure: what an error of any other class becomes on all ranks.
    """
    result, error = _attempt(action, failure)
    outcomes: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(outcomes, (result, _told(error)), group=group)
    for rank, (_, told) in enumerate(outcomes):
        if told is not None:
            kind, message = told
            raise _again(kind, message if issubclass(kind, ConfigError) else f"rank {rank}: {message}") from error
    return [value for value, _ in outcomes]


def _attempt(action: Callable[[], T], failure: Failure) -> tuple[T | None, Exception | None]:
    try:
        return action(), None
    except Exception as error:
        if failure is None or isinstance(error, failure | ConfigError | Interrupted):
            return None, error
        wrapped = failure(f"{type(error).__name__}: {error}")
        wrapped.__cause__ = error
        return None, wrapped


def _told(error: Exception | None) -> tuple[type[Exception], str] | None:
    return None if error is None else (type(error), str(error))


def _again(kind: type[Exception], message: str) -> Exception:
    crosses = issubclass(kind, ValueError | ArithmeticError | RunError | Interrupted)
    try:
        return kind(message) if crosses else RuntimeError(message)
    except TypeError:  # made of more than a message, as a UnicodeDecodeError and a JSONDecodeError are
        return RuntimeError(f"{kind.__name__}: {message}")
