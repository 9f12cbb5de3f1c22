"""Large data on several ranks: one makes it, all map the same file, also where one does not see the cache."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from nemo_aapo.data.prepared import cache, making
from nemo_aapo.data.prepared.table import PreparedPrompts, is_whole
from nemo_aapo.data.tokenizer import load_tokenizer
from nemo_aapo.distributed import parallel
from nemo_aapo.training import read_data
from tests.tiny_models import make_config, save_character_tokenizer

pytest.importorskip("pyarrow")


def read_twice(folder: Path) -> list[tuple[Path, list[str], int]]:
    """The file of the prompts, their ids and their number; then again where rank 1 does not see the cache."""
    os.environ[cache.CACHE_VARIABLE] = str(folder / "cache")
    making.LARGE_BYTES = 10_000
    config = make_config("m", folder / "train.jsonl", folder / "held_out.jsonl", run__dir=str(folder / "run"))
    tokenizer = load_tokenizer(str(folder))
    found = []
    try:
        for sees_the_cache in (True, False):
            if not sees_the_cache and parallel.rank() == 1:
                read_data.is_whole = lambda path: is_whole(path) and not path.is_relative_to(folder / "cache")
            train, _ = read_data.read_data(config, tokenizer, None)
            assert isinstance(train.prompts, PreparedPrompts)
            found.append((train.prompts.path, [prompt.id for prompt in train.prompts], len(train.prompts)))
    finally:
        read_data.is_whole, making.LARGE_BYTES = is_whole, 8 << 20
        del os.environ[cache.CACHE_VARIABLE]
    return found


def test_all_ranks_map_the_file_that_one_has_made_or_a_copy_of_it(ranks, tmp_path):
    rows = [json.dumps({"question": f"What is {n}+{n}?", "answer": str(2 * n)}) + "\n" for n in range(400)]
    (tmp_path / "train.jsonl").write_text("".join(rows))
    (tmp_path / "held_out.jsonl").write_text(rows[0])
    save_character_tokenizer(tmp_path)
    first, second = ranks.run(read_twice, tmp_path, world=2)
    assert first == second
    (cached, ids, count), (copied, same, _) = first
    assert (cached.parent, copied.parent) == (tmp_path / "cache" / "prompts", tmp_path / "run" / "prepared")
    assert ids == same
    assert count == len(set(ids)) == 400
