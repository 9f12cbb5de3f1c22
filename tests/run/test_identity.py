"""Model and data are what they hold: moved they are the same, swapped they are refused, by name and before anything."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file, save_file

from nemo_aapo.config import decisive_settings, digest
from nemo_aapo.errors import ConfigError
from nemo_aapo.run.directory import RECORD, check_run_directory, claim
from nemo_aapo.run.identity import PIECE, PLACES, identity_of
from nemo_aapo.utils.safetensors import model_digest
from tests.tiny_models import make_config

CONF = Path(__file__).parents[2] / "conf"
LARGE = PIECE * 10  # bytes of a tensor of which only the middle counts


def make_files(folder: Path) -> Path:
    """A model of two tensors, one of them large, and a line of data each."""
    folder.mkdir(parents=True)
    (folder / "model").mkdir()
    (folder / "model" / "config.json").write_text("{}")
    numbers = np.random.default_rng(0)
    tensors = {"small": numbers.random(3), "large": numbers.random(LARGE // 8)}
    save_file(tensors, folder / "model" / "model.safetensors")
    for name in ("train", "validation"):
        (folder / f"{name}.jsonl").write_text(json.dumps({"question": name, "answer": "1"}) + "\n")
    return folder


def config_of(files: Path, run_dir: Path, **changes):
    data = files / "train.jsonl", files / "validation.jsonl"
    return make_config(files / "model", *data, **{"run__dir": str(run_dir), **changes})


def begin(config) -> dict:
    """Claim the run directory, and leave a line of metrics there; returns the record."""
    claim(config, {}, 1)[0].close()
    (Path(config.run.dir) / "metrics.jsonl").write_text('{"step": 0}\n')
    return record_of(config)


def record_of(config) -> dict:
    return json.loads((Path(config.run.dir) / RECORD).read_text())


def change_tensor(files: Path, name: str, index: int) -> None:
    path = files / "model" / "model.safetensors"
    tensors = load_file(path)
    tensors[name][index] += 1
    save_file(tensors, path)


@pytest.fixture
def files(tmp_path):
    return make_files(tmp_path / "files")


def test_moved_and_renamed_model_data_and_run_directory_go_on(files, tmp_path):
    before = begin(config_of(files, tmp_path / "run"))
    moved = files.rename(tmp_path / "elsewhere")
    (moved / "train.jsonl").rename(moved / "renamed.jsonl")
    run = (tmp_path / "run").rename(tmp_path / "other_name")
    config = config_of(moved, run, data__train=str(moved / "renamed.jsonl"))
    check_run_directory(config)
    claim(config, {}, 1)[0].close()
    after = record_of(config)
    assert (after["id"], after["digest"], after["contents"]) == (before["id"], before["digest"], before["contents"])
    assert after["settings"]["data"]["train"] == str(moved / "renamed.jsonl")
    assert len(after["starts"]) == 2


@pytest.mark.parametrize(
    ("swap", "key"),
    [
        (lambda files: change_tensor(files, "small", 2), "model.path"),
        (lambda files: change_tensor(files, "large", LARGE // 16), "model.path"),
        (lambda files: (files / "model" / "config.json").write_text('{"rope_theta": 1}'), "model.path"),
        (lambda files: (files / "train.jsonl").write_text('{"question": "other", "answer": "1"}'), "data.train"),
        (lambda files: (files / "validation.jsonl").write_text("{}"), "data.validation"),
    ],
)
def test_what_was_swapped_in_its_place_is_refused_and_named(files, tmp_path, swap, key):
    config = config_of(files, tmp_path / "run")
    begin(config)
    swap(files)
    for refuse in (lambda: check_run_directory(config), lambda: claim(config, {}, 1)):
        with pytest.raises(ConfigError, match=rf'  {key}: "{files}/\S+" holds something else than it did\n') as refusal:
            refuse()
        assert str(refusal.value).count("holds something else") == 1
        assert "run.name=NAME" in str(refusal.value)


def test_another_model_elsewhere_is_refused_with_both_paths(files, tmp_path):
    begin(config_of(files, tmp_path / "run"))
    other = make_files(tmp_path / "other")
    change_tensor(other, "small", 0)
    with pytest.raises(ConfigError) as refusal:
        check_run_directory(config_of(other, tmp_path / "run"))
    assert f'model.path: "{files}/model" there, "{other}/model" now' in str(refusal.value)
    assert "data.train" not in str(refusal.value)  # another file with the same lines


def test_a_run_of_before_contents_were_recorded_goes_on_and_is_known_by_them_from_then_on(files, tmp_path):
    config = config_of(files, tmp_path / "run")
    record = begin(config)
    settings = json.loads(json.dumps(decisive_settings(config)))
    old = {"id": record["id"], "digest": digest(config), "settings": settings, "starts": record["starts"]}
    (tmp_path / "run" / RECORD).write_text(json.dumps(old))
    moved = config_of(Path(shutil.copytree(files, tmp_path / "moved")), tmp_path / "run")
    with pytest.raises(ConfigError, match=r"model\.path: .* there, .* now"):  # its record can't tell
        check_run_directory(moved)
    check_run_directory(config)
    claim(config, {}, 1)[0].close()
    assert record_of(config) == {**record, "starts": [*record["starts"], record_of(config)["starts"][-1]]}
    check_run_directory(moved)


@pytest.mark.parametrize(("algorithm", "compares"), [("grpo", True), ("aapo", True), ("gpg", False)])
def test_where_a_run_compares_with_its_base_model_every_number_of_it_counts(files, tmp_path, algorithm, compares):
    chosen = yaml.safe_load((CONF / "algorithm" / f"{algorithm}.yaml").read_text())
    changes = {f"algorithm__{key}": value for key, value in chosen.items()}
    config = config_of(files, tmp_path / "run", **changes)
    record = begin(config)
    assert record["reference"] == (model_digest(str(files / "model")) if compares else None)
    change_tensor(files, "large", 0)
    check_run_directory(config)  # by pieces of the tensors it is the same model
    if not compares:
        claim(config, {}, 1)[0].close()
        return
    with pytest.raises(ConfigError, match=r"some of its weights are others than at the last start"):
        claim(config, {}, 1)
    assert record_of(config) == record
    change_tensor(files, "small", 0)  # nothing came of the run: another model may take its place
    (tmp_path / "run" / "metrics.jsonl").unlink()
    claim(config, {}, 1)[0].close()
    assert record_of(config)["reference"] == model_digest(str(files / "model"))


def test_data_counts_by_its_files_and_what_is_no_file_by_its_name(files, tmp_path):
    folder = tmp_path / "saved"
    folder.mkdir()
    (folder / "part.arrow").write_bytes(bytes(PIECE * PLACES + 17))
    listed = [{"path": str(folder), "weight": 2.0}, {"path": "org/name"}, {"path": "reasoning_gym:chain_sum"}]
    config = config_of(
        files,
        tmp_path / "run",
        data__train=listed,
        data__validation="org/held_out",
        rewards=[{"name": "reasoning_gym", "weight": 1.0}],
        validation__reward="reasoning_gym",
    )
    before = identity_of(config)
    assert [source["path"] for source in before["data.train"][1:]] == ["org/name", "reasoning_gym:chain_sum"]
    assert before["data.train"][0]["weight"] == 2.0
    assert before["data.validation"] == "org/held_out"
    (folder / "part.arrow").write_bytes(bytes(PIECE * PLACES + 18))
    assert identity_of(config) != before


def test_weights_that_are_not_whole_are_named(files, tmp_path):
    config = config_of(files, tmp_path / "run")
    begin(config)
    (files / "model" / "model.safetensors").write_bytes(struct.pack("<Q", 99) + b"{")
    with pytest.raises(ConfigError, match=r"model\.safetensors: not a whole safetensors file"):
        check_run_directory(config)
