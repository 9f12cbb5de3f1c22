"""The bank of finished groups: torn records, other runs, a full disk, what is taken up and what is not."""

from __future__ import annotations

import errno
import os

import numpy as np
import pytest

from nemo_aapo.errors import RunError
from nemo_aapo.rollout.saved.bank import RolloutBank, completions_of
from nemo_aapo.types import Completion, Prompt, Routes

PROMPTS = [Prompt(f"p{i}", np.array([5, i], np.int32), "", "", "") for i in range(3)]


def completions(number: int, version: int = 4, routes: bool = False) -> list[Completion]:
    rng = np.random.default_rng(number)
    prompt = rng.integers(0, 4, (2, 3, 2)).astype(np.uint8)
    return [
        Completion(
            rng.integers(0, 99, size).astype(np.int32),
            rng.normal(size=size).astype(np.float32),
            "stop" if size else "length",
            version,
            Routes(prompt, rng.integers(0, 4, (max(size - 1, 0), 3, 2)).astype(np.uint8)) if routes else None,
        )
        for size in (3, 0)
    ]


def bank(tmp_path, rank=0, run=("mine", "as before"), note=print) -> RolloutBank:
    return RolloutBank(tmp_path / "bank", run, rank, note)


def plain(row):
    return [
        (c.token_ids.tolist(), c.logprobs.tobytes(), c.finish_reason, c.policy_version)
        + (() if c.routes is None else (c.routes.prompt.tobytes(), c.routes.completion.tobytes()))
        for c in row
    ]


@pytest.mark.parametrize("routes", [False, True])
def test_what_several_ranks_kept_comes_back_to_the_bit_and_only_for_its_step_and_version(tmp_path, routes):
    first, second = bank(tmp_path), bank(tmp_path, rank=1)
    assert first.recover() == {}
    first.add(7, PROMPTS[0], completions(0, routes=routes))
    second.add(7, PROMPTS[2], completions(2, routes=routes))
    second.add(8, PROMPTS[1], completions(1, version=5, routes=routes))
    second.sync()
    records = bank(tmp_path, run=("now", "mine")).recover()  # a digest as it was before is known too
    assert sorted(records) == [7, 8]
    found = completions_of(records[7], PROMPTS, version=4, count=2)
    assert sorted(found) == [0, 2]
    for place, row in found.items():
        assert plain(row) == plain(completions(place, routes=routes))
    assert completions_of(records[8], PROMPTS, version=4, count=2) == {}
    assert completions_of(records[7], PROMPTS[1:2], version=4, count=2) == {}
    assert completions_of(records[7], PROMPTS, version=4, count=3) == {}


def test_a_record_torn_at_any_byte_is_cut_off_and_what_comes_next_stands_behind_the_whole_ones(tmp_path):
    written = bank(tmp_path)
    written.recover()
    path = tmp_path / "bank" / "step_000000_0.bank"
    written.add(0, PROMPTS[0], completions(0))
    whole = path.stat().st_size
    written.add(0, PROMPTS[1], completions(1))
    content = path.read_bytes()
    for end in range(whole, len(content)):
        path.write_bytes(content[:end])
        assert len(bank(tmp_path).recover()[0]) == 1
        assert path.read_bytes() == content[:whole]
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))  # whole, and damaged
    assert len(bank(tmp_path).recover()[0]) == 1
    later = bank(tmp_path)
    later.add(0, PROMPTS[2], completions(2))
    assert sorted(completions_of(bank(tmp_path).recover()[0], PROMPTS, 4, 2)) == [0, 2]


def test_the_bank_of_another_run_is_refused_with_a_remedy(tmp_path):
    bank(tmp_path).recover()
    with pytest.raises(RunError, match=r"manifest\.json: these are the rollouts of another run.*rollout\.bank=off"):
        bank(tmp_path, run=("theirs",)).recover()
    (tmp_path / "bank" / "manifest.json").write_text("{")
    with pytest.raises(RunError, match="another run, or of another version"):
        bank(tmp_path).recover()


def test_a_full_disk_is_said_once_and_ends_no_run(tmp_path, monkeypatch):
    said = []
    full = bank(tmp_path, note=said.append)
    full.recover()
    full.add(0, PROMPTS[0], completions(0))
    write = os.write

    def no_space(descriptor, content):
        if len(content) < 100:
            return write(descriptor, content)
        write(descriptor, content[:50])  # what there was room for
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "write", no_space)
    full.add(0, PROMPTS[1], completions(1))
    full.add(0, PROMPTS[2], completions(2))
    assert len(said) == 1
    assert "No space left on device" in said[0]
    assert "the run goes on" in said[0]
    monkeypatch.undo()
    assert sorted(completions_of(bank(tmp_path).recover()[0], PROMPTS, 4, 2)) == [0]


def test_records_go_with_the_checkpoint_that_covers_them(tmp_path):
    banks = [bank(tmp_path), bank(tmp_path, rank=1)]
    banks[0].recover()
    for step in range(4):
        for kept in banks:
            kept.add(step, PROMPTS[0], completions(step))
    for kept in banks:
        kept.forget(before=3)
    assert sorted(path.name for path in (tmp_path / "bank").glob("*.bank")) == [
        "step_000003_0.bank",
        "step_000003_1.bank",
    ]


def test_a_folder_that_nothing_can_be_removed_from_refuses_a_start_by_name_and_ends_no_run(tmp_path, monkeypatch):
    said = []
    kept = bank(tmp_path, note=said.append)
    kept.recover()
    kept.add(2, PROMPTS[0], completions(0))

    def refused(path, missing_ok=False):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr("pathlib.Path.unlink", refused)
    with pytest.raises(RunError, match=r"bank: outdated rollouts can't be removed.*denied.*rollout\.bank=off"):
        kept.keep_only({}, 3)
    kept.forget(before=3)
    assert len(said) == 1
    assert "Permission denied" in said[0]


@pytest.mark.parametrize("fault", ["killed", "full"])
def test_what_is_left_of_a_bank_is_written_before_the_rest_goes(tmp_path, monkeypatch, fault):
    said = []
    banks = [bank(tmp_path, note=said.append), bank(tmp_path, rank=1)]
    banks[0].recover()
    for number, kept in enumerate(banks):
        kept.add(2, PROMPTS[number], completions(number))
        kept.took(number, [(2, 0)])
    records = banks[0].recover()

    def killed(path, *args, **kwargs):
        raise KeyboardInterrupt

    def full(path, content):
        raise OSError(errno.ENOSPC, "No space left on device")

    if fault == "killed":
        monkeypatch.setattr("pathlib.Path.unlink", killed)
        with pytest.raises(KeyboardInterrupt):
            banks[0].keep_only(records, 1)
    else:
        monkeypatch.setattr("nemo_aapo.rollout.saved.bank.write_atomic", full)
        banks[0].keep_only(records, 1)
        banks[0].add(2, PROMPTS[2], completions(2))
        assert len(said) == 1
        assert "No space left on device" in said[0]
    monkeypatch.undo()
    left = completions_of(bank(tmp_path).recover().get(2, []), PROMPTS, 4, 2)
    assert sorted(left) == ([0, 1] if fault == "killed" else [])
    assert sorted(banks[0].taken()) == ([0, 1] if fault == "killed" else [0])
