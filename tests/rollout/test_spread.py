"""Completions are spread over ranks that decode in step so that none has many more tokens than another."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from nemo_aapo.rollout.spread import Place, owner, spread


@pytest.mark.parametrize("seed", range(20))
def test_every_completion_goes_to_one_rank_and_no_rank_waits_for_more_than_one_completion(seed):
    generator = np.random.default_rng(seed)
    expected = generator.integers(1, 1000, generator.integers(1, 12)).astype(float).tolist()
    counts = generator.integers(0, 9, len(expected)).tolist()
    parts = spread(expected, counts, ranks=int(generator.integers(1, 5)))
    assert sorted(itertools.chain(*parts)) == [Place(i, j) for i, count in enumerate(counts) for j in range(count)]
    tokens = [sum(expected[place.prompt] for place in part) for part in parts]
    assert max(tokens) - min(tokens) <= max(expected)


def test_with_nothing_known_ranks_get_as_many_completions():
    assert [len(part) for part in spread([0.0, 0.0], [3, 4], 3)] == [3, 2, 2]


@pytest.mark.parametrize(("prompts", "ranks"), [(5, 2), (1, 4), (8, 4), (13, 5)])
def test_a_completion_comes_back_to_the_rank_whose_shard_has_its_prompt(prompts, ranks):
    shards = [range(rank * prompts // ranks, (rank + 1) * prompts // ranks) for rank in range(ranks)]
    assert all(i in shards[owner(i, prompts, ranks)] for i in range(prompts))
