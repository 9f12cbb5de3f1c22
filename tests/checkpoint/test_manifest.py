"""The manifest: what it lists comes back equal, and nothing changes unnoticed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nemo_aapo.checkpoint import manifest
from nemo_aapo.checkpoint.manifest import FileRecord, Manifest
from nemo_aapo.errors import CheckpointError, DamagedCheckpointError

STATE = {"step": 7, "sampler": {"epoch": 1, "cursor": 3}, "reference": "ab12", "lr": 1e-6, "flags": [True, None]}


def make(**changes) -> Manifest:
    fields = {
        "step": 7,
        "config_digest": "0123456789abcdef",
        "trainer_state": STATE,
        "layout": {"world_size": 4},
        "versions": {"torch": "2.13"},
        "files": {"common.pt": FileRecord(12, "ff" * 32)},
    }
    return Manifest(**{**fields, **changes})


def test_what_is_written_is_read_back_equal(tmp_path):
    manifest.write(make(), tmp_path)
    assert manifest.read(tmp_path) == make()


def test_no_flipped_bit_and_no_cut_changes_what_is_read(tmp_path):
    manifest.write(make(), tmp_path)
    path = tmp_path / manifest.FILE_NAME
    whole = path.read_bytes()
    noticed = 0
    for position in range(len(whole)):
        altered = bytearray(whole)
        altered[position] ^= 1 << position % 8
        path.write_bytes(bytes(altered))
        try:
            assert manifest.read(tmp_path) == make()
        except DamagedCheckpointError:
            noticed += 1
    assert noticed > len(whole) / 2  # white space is the rest
    for length in range(0, len(whole), 16):
        path.write_bytes(whole[:length])
        with pytest.raises(DamagedCheckpointError, match=r"manifest\.json"):
            manifest.read(tmp_path)


def test_a_missing_manifest_and_another_format_are_named(tmp_path):
    with pytest.raises(DamagedCheckpointError, match=r"manifest\.json is missing"):
        manifest.read(tmp_path)
    manifest.write(make(), tmp_path)
    path = tmp_path / manifest.FILE_NAME
    tree = json.loads(path.read_text())
    del tree["sha256"]
    for changed, reason in (({**tree, "format": 2}, "another format"), ({**tree, "extra": 1}, "field")):
        path.write_text(json.dumps({**changed, "sha256": manifest._tree_digest(changed)}))
        with pytest.raises(CheckpointError, match=reason) as raised:
            manifest.read(tmp_path)
        assert not isinstance(raised.value, DamagedCheckpointError)  # it is whole: nothing to fall back from


@pytest.mark.parametrize("value", [(1, 2), {1: "a"}, float("nan"), {3}, Path("x")], ids=repr)
def test_a_trainer_state_that_json_would_change_is_refused(tmp_path, value):
    with pytest.raises(CheckpointError, match="trainer state"):
        manifest.write(make(trainer_state={"key": value}), tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_file_that_is_not_as_it_was_is_named_with_what_is_wrong(tmp_path):
    path = tmp_path / "__0_0.distcp"
    path.write_bytes(bytes(range(256)) * 8192)  # 2 MiB: more than is read at once
    record = manifest.seal(path)
    assert record.bytes == 2**21
    assert manifest.problem_with(tmp_path, path.name, record) is None

    def complaint() -> str:
        return manifest.problem_with(tmp_path, path.name, record)

    with open(path, "r+b") as file:
        file.seek(2**21 - 1)
        file.write(b"\0")
    assert complaint() == f"{path} was altered: its SHA-256 is not the manifest's"
    with open(path, "r+b") as file:
        file.truncate(100)
    assert complaint() == f"{path} has 100 bytes instead of 2097152"
    path.unlink()
    assert complaint() == f"{path} is missing"
    path.mkdir()
    assert "can't be read" in complaint()


def test_a_manifest_can_not_point_out_of_its_checkpoint(tmp_path):
    inside = tmp_path / "step"
    inside.mkdir()
    secret = tmp_path / "secret"
    secret.write_text("x")
    record = manifest.seal(secret)
    assert "not a file name" in manifest.problem_with(inside, "../secret", record)
    assert "not a file name" in manifest.problem_with(inside, str(secret), record)


def test_every_file_has_one_rank_that_looks_after_it_and_the_writer_keeps_its_own():
    names = [f"__{rank}_0.distcp" for rank in range(12)] + [".metadata", "common.pt", "metadata.json"]
    for world_size in (1, 2, 3, 8, 12, 16):
        shares = [manifest.shard_of(names, rank, world_size) for rank in range(world_size)]
        assert sorted(name for part in shares for name in part) == sorted(names)
    own = [manifest.shard_of(names, rank, 12) for rank in range(12)]
    assert own[0] == [".metadata", "__0_0.distcp", "common.pt", "metadata.json"]
    assert own[11] == ["__11_0.distcp"]
