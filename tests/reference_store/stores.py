"""Stores of reference rewards and values to put in them."""

from __future__ import annotations

import contextlib
import multiprocessing

import numpy as np

from nemo_aapo.reference_store.key import store_key
from nemo_aapo.reference_store.store import RewardStore
from nemo_aapo.types import SamplingSpec

SAMPLING = SamplingSpec(1.0, 8, (1,))
REWARDS = [{"name": "integer", "weight": 1.0}]
FORK = multiprocessing.get_context("fork")


def key(model="m", sampling=SAMPLING, rewards=REWARDS, seed=1):
    return store_key(model, sampling, rewards, seed)


def open_store(path, the_key=None, **more):
    return contextlib.closing(RewardStore(path, the_key or key(), **more))


def values(count, start=0.0):
    """Rewards [4] of some prompts, all different and none of them a short binary fraction."""
    return {f"p{i}": (np.arange(4) + i) / 7 + start for i in range(count)}


def same(found, expected):
    return found.keys() == expected.keys() and all(
        np.array_equal(found[p], expected[p], equal_nan=True) for p in expected
    )
