"""Shards of a store: disjoint, whole, and merged once."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from nemo_aapo.errors import ConfigError, StoreError
from nemo_aapo.reference_store.shards import Shard, merge_shards, shard_files
from nemo_aapo.types import Prompt
from tests.reference_store.stores import key, open_store, same, values


def prompts(count):
    return [Prompt(f"p{i}", np.array([5], np.int32), "", "", "") for i in range(count)]


def test_shards_are_disjoint_whole_and_named_by_their_numbers():
    shards = [Shard(i, 3) for i in range(3)]
    parts = [[prompt.id for prompt in shard.select(prompts(10))] for shard in shards]
    assert sorted(name for part in parts for name in part) == sorted(f"p{i}" for i in range(10))
    assert {len(part) for part in parts} == {3, 4}
    assert shards[2].path("a/s.sqlite") == Path("a/s.shard-0002-of-0003.sqlite")
    for index, count, message in ((3, 3, "between 0 and 2"), (-1, 3, "between 0 and 2"), (0, 0, "at least 1")):
        with pytest.raises(ConfigError, match=message):
            Shard(index, count)


def test_a_merge_takes_every_shard_once_and_refuses_one_of_another_key_before_it_copies_anything(tmp_path):
    path = tmp_path / "s.sqlite"
    with pytest.raises(StoreError, match="no shards beside it"):
        merge_shards(path, key())
    (tmp_path / "s.sqlite.shard-note").touch()  # not one of ours
    for index in range(2):
        with open_store(Shard(index, 3).path(path)) as shard:
            shard.write({prompt.id: values(10)[prompt.id] for prompt in Shard(index, 3).select(prompts(10))})
    assert list(merge_shards(path, key()).values()) == [4, 3]
    with open_store(Shard(2, 3).path(path), key("other")) as shard:
        shard.write(values(1))
    path.unlink()
    with pytest.raises(StoreError, match=r's\.shard-0002-of-0003\.sqlite: was filled for.*model: "other" there'):
        merge_shards(path, key())
    assert not path.exists()
    Shard(2, 3).path(path).unlink()
    with open_store(Shard(2, 3).path(path)) as shard:
        shard.write({prompt.id: values(10)[prompt.id] for prompt in Shard(2, 3).select(prompts(10))})
    assert len(shard_files(path)) == 3
    for _ in range(2):
        assert list(merge_shards(path, key()).values()) == [4, 3, 3]
        with open_store(path, create=False) as store:
            assert same(store.read([f"p{i}" for i in range(10)], 4), values(10))
