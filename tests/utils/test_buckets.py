"""Buckets keep the order, lose nothing, and hold no more than they may."""

from __future__ import annotations

import gc
import itertools
import random
import weakref

import torch

from nemo_aapo.utils.buckets import buckets, tensor_buckets


def test_buckets_hold_every_item_once_in_order_and_no_more_than_they_may():
    numbers = random.Random(0)
    for _ in range(50):
        sizes = [numbers.randint(1, 60) for _ in range(20)]
        most = numbers.randint(1, 100)
        made = list(buckets(sizes, lambda size: size, most))
        assert [size for bucket in made for size in bucket] == sizes
        assert all(sum(bucket) <= most or len(bucket) == 1 for bucket in made)
        assert all(sum(one) + two[0] > most for one, two in itertools.pairwise(made))  # none was closed early
    assert list(buckets([], lambda size: size, 10)) == []


def test_tensors_are_measured_in_bytes():
    named = [
        (name, torch.zeros(4, dtype=dtype)) for name, dtype in zip("abcd", (torch.float32, torch.int8) * 2, strict=True)
    ]
    assert [[name for name, _ in bucket] for bucket in tensor_buckets(named, 20)] == [["a", "b"], ["c", "d"]]


def test_a_bucket_that_was_let_go_is_not_held_while_the_next_is_filled():
    alive: list[weakref.ref] = []

    def made():
        for number in range(6):
            gc.collect()
            assert sum(tensor() is not None for tensor in alive) <= 2  # at the most one bucket and what comes behind it
            tensor = torch.zeros(8)
            alive.append(weakref.ref(tensor))
            yield str(number), tensor
            del tensor

    for bucket in tensor_buckets(made(), 8):
        del bucket
    assert len(alive) == 6
