"""Which rollouts are kept, how much of them stays, and whose text each token is."""

from __future__ import annotations

import json

import numpy as np
import pytest
from safetensors.numpy import load_file

from nemo_aapo.rollout.saved.kept import KeptFiles, KeptGroup, chosen_groups, text_ends, thinned

pytestmark = pytest.mark.unit


def group(size: int, step: int = 1) -> KeptGroup:
    tokens = {
        "token_ids": np.arange(3, dtype=np.int32),
        "logprobs": np.zeros(3, np.float32),
        "learner_logprobs": np.zeros(3, np.float32),
        "entropy": np.ones(3, np.float32),
    }
    return KeptGroup([{"step": step, "completion": "abc" + "x" * size}] * 2, [tokens] * 2)


def decode(ids) -> str:
    return "".join("abc"[i] for i in ids)


def test_the_seed_chooses_other_groups_each_step_and_all_means_all():
    drawn = [tuple(chosen_groups(7, step, 32, 2)) for step in range(50)]
    assert len(set(drawn)) > 40
    assert len({index for pair in drawn for index in pair}) > 25
    assert all(a < b for a, b in drawn)
    assert chosen_groups(7, 3, 5, "all") == chosen_groups(7, 3, 5, 9) == [0, 1, 2, 3, 4]
    assert chosen_groups(7, 3, 5, 0) == []


def test_what_is_kept_stays_below_its_limit_and_the_past_becomes_sparser(tmp_path):
    files = KeptFiles(tmp_path, 20_000, decode)
    for step in range(1, 101):
        if step == 50:
            files = KeptFiles(tmp_path, 20_000, decode)  # a resumed run counts what is there
        files.write(step, [group(200)])
        assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 20_000
    steps = sorted(int(path.stem.removeprefix("train_")) for path in tmp_path.glob("*.jsonl"))
    assert [f"train_{step:06d}.safetensors" for step in steps] == sorted(p.name for p in tmp_path.glob("*.safetensors"))
    assert steps[-3:] == [98, 99, 100]
    assert steps[0] < 80
    assert max(np.diff(steps)) > 1


def test_a_step_that_is_too_large_keeps_the_groups_that_there_is_room_for(tmp_path):
    files = KeptFiles(tmp_path, 3_000, decode)
    files.write(1, [group(200)] * 9)
    rows = (tmp_path / "train_000001.jsonl").read_text().splitlines()
    assert 2 <= len(rows) < 18
    assert len(load_file(tmp_path / "train_000001.safetensors")["lengths"]) == len(rows)
    files.write(2, [group(9_000)])
    assert not (tmp_path / "train_000002.jsonl").exists()


def test_text_that_utf8_has_no_code_for_is_written_and_read_back(tmp_path):
    hostile = "</script>\ud800\x00\u202e\u2028"
    KeptFiles(tmp_path, 10**6, decode).write(3, [KeptGroup([{"completion": hostile}], [])])
    assert json.loads((tmp_path / "train_000003.jsonl").read_text())["completion"] == hostile
    assert not (tmp_path / "train_000003.safetensors").exists()


def test_thinning_ends_whatever_the_sizes():
    assert thinned({1: 5}, 4) == [1]
    assert thinned({}, 0) == []
    assert thinned({1: 1, 2: 1, 3: 100}, 50) == [1, 2, 3]


@pytest.mark.parametrize(
    ("pieces", "text", "parts"),
    [
        (["37", "+", "48"], "37+48", ["37", "+", "48"]),
        (["Hello", "world", "."], "Hello world.", ["Hello", " world", "."]),  # a space lost in a token alone
        (["a", "\ufffd", "\ufffd", " b"], "a\u00e9 b", ["a", "", "\u00e9", " b"]),  # a character of two tokens
        (["x", ""], "x", ["x", ""]),  # the token that ends a completion has no text
        ([], "", []),
    ],
)
def test_each_token_has_its_part_of_the_text(pieces, text, parts):
    ends = text_ends(pieces, text)
    assert [text[a:b] for a, b in zip([0, *ends], ends, strict=False)] == parts
