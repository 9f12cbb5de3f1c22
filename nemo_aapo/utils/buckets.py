"""A stream of sized items, cut into buckets of a bounded size."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    import torch

T = TypeVar("T")


def buckets(items: Iterable[T], size_of: Callable[[T], int], most: int) -> Iterator[list[T]]:
    """The items in their order, as many at a time as have a size of at most ``most`` together; a larger one is alone.

    >>> list(buckets([2, 2, 5, 1], lambda size: size, most=4))
    [[2, 2], [5], [1]]
    """
    bucket: list[T] = []
    filled = 0
    for item in items:
        size = size_of(item)
        if bucket and filled + size > most:
            yield bucket
            bucket, filled = [], 0
        bucket.append(item)
        filled += size
    if bucket:
        yield bucket


def tensor_buckets(
    named_tensors: Iterable[tuple[str, torch.Tensor]], most_bytes: int
) -> Iterator[list[tuple[str, torch.Tensor]]]:
    """Buckets of (name, tensor), measured in bytes.

    A caller that lets go of a bucket before it asks for the next one holds one bucket, and the tensor behind it, in
    memory at a time.
    """
    return buckets(named_tensors, lambda item: item[1].nbytes, most_bytes)
