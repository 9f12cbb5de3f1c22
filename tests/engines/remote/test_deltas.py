"""``rollout.refit=delta``: whatever versions a server took before, it has the trainer's bytes, or says that not."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import pytest
import torch

from nemo_aapo.engines import deltas
from nemo_aapo.engines.deltas import DeltaStore, VersionReader
from nemo_aapo.engines.remote.weight_store import WeightStore
from nemo_aapo.engines.remote.wire import Weights, WeightsId
from nemo_aapo.errors import WeightsError
from nemo_aapo.models.reader import WeightFiles

DTYPES = (torch.bfloat16, torch.float32, torch.float16)


@pytest.fixture
def directory(tmp_path) -> Path:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    return tmp_path / "servers"


@pytest.fixture
def store(directory) -> DeltaStore:
    return DeltaStore(directory, str(directory.parent / "model"), bucket_bytes=3000)


class Trainer:
    """Weights that change a little at each step, and the versions that were written of them."""

    def __init__(self, store: WeightStore) -> None:
        self.store, self.versions = store, list[tuple[Weights, dict[str, torch.Tensor]]]()
        generator = torch.Generator().manual_seed(0)
        self.tensors = {
            f"layer.{n}": torch.randn(40 * n + 1, 7, generator=generator).to(DTYPES[n % 3]) for n in range(6)
        } | {"empty": torch.zeros(0, 3), "step": torch.zeros((), dtype=torch.int64)}

    def step(self) -> Weights:
        version = len(self.versions) + 1
        self.tensors = {name: tensor + 1e-3 * version * (tensor > 0) for name, tensor in self.tensors.items()}
        self.tensors = {name: tensor.to(DTYPES[int(name[-1]) % 3] if "." in name else tensor.dtype)
                        for name, tensor in self.tensors.items()}  # fmt: skip
        self.versions.append((self.store.write(self.tensors.items(), version), dict(self.tensors)))
        return self.versions[-1][0]


def assert_has(reader: VersionReader, weights: Weights, wanted: dict[str, torch.Tensor]) -> None:
    with reader.whole(weights, wanted.keys()) as folder:
        got = dict(WeightFiles(folder))
        assert (folder / "config.json").read_text() == "{}"
    assert got.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert (got[name].dtype, got[name].shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(got[name], tensor)


def test_servers_that_miss_repeat_and_reorder_versions_have_the_trainers_bytes(store, directory, monkeypatch):
    monkeypatch.setattr(deltas, "WHOLE_EVERY", 3)
    trainer, chance = Trainer(store), random.Random(0)
    readers = [VersionReader(directory, directory.parent / f"copy{n}") for n in range(3)]
    wholes = 0
    for _ in range(14):
        weights = trainer.step()
        wholes += "base" not in json.loads((directory / weights.manifest).read_text())
        if chance.random() < 0.3:  # a server is started again, and has nothing
            readers[0] = VersionReader(directory, directory.parent / "copy0")
        for reader in readers:
            if chance.random() < 0.6:
                for asked, wanted in chance.choices(trainer.versions[-4:], k=chance.randint(0, 2)):
                    assert_has(reader, asked, wanted)  # whatever it is asked for, in whatever order
                assert_has(reader, *trainer.versions[-1])
    assert 3 <= wholes <= 4


def test_only_what_versions_that_are_asked_for_need_stays_and_what_a_server_reads(store, directory, monkeypatch):
    trainer = Trainer(store)
    for _ in range(3):
        weights = trainer.step()
        store.prune(keep=[weights])
    monkeypatch.setattr(deltas, "WHOLE_EVERY", 2)
    trainer.step()
    store.prune(keep=[weights, trainer.versions[-1][0]])  # the newest is whole; the one before is still asked for
    assert_has(VersionReader(directory, directory.parent / "late"), *trainer.versions[-2])
    reader = VersionReader(directory, directory.parent / "copy")
    with reader.whole(weights, set()):
        store.prune(keep=())
        assert len(list(store.root.iterdir())) == 3
    store.prune(keep=())
    assert list(store.root.iterdir()) == []


@pytest.mark.parametrize("version", [1, 2, 3])
@pytest.mark.parametrize("damage", ["flip", "missing", "another's"])
def test_a_damaged_link_is_refused_and_the_whole_version_answers_it(store, directory, version, damage):
    trainer = Trainer(store)
    for _ in range(3):
        trainer.step()
    reader = VersionReader(directory, directory.parent / "copy")
    folder = (directory / trainer.versions[version - 1][0].manifest).parent
    if damage == "missing":
        shutil.rmtree(folder)
    elif damage == "flip":
        file = next(folder.glob("bucket*"))
        file.write_bytes(file.read_bytes()[:-1] + bytes([file.read_bytes()[-1] ^ 1]))
    else:  # the files of the version before, under this one's name
        other = (directory / trainer.versions[version % 3][0].manifest).parent
        shutil.rmtree(folder)
        shutil.copytree(other, folder)
    with pytest.raises(WeightsError):
        assert_has(reader, *trainer.versions[-1])
    whole = store.whole_of(trainer.versions[-1][0])
    assert whole.id == trainer.versions[-1][0].id
    assert_has(reader, whole, trainer.tensors)
    following = trainer.step()
    store.prune(keep=[following])  # and from there it goes on by differences
    assert_has(reader, following, trainer.tensors)
    assert "base" in json.loads((directory / following.manifest).read_text())
    assert store.whole_of(trainer.versions[0][0]) is None


def test_a_copy_that_was_changed_on_the_servers_disk_is_found_and_made_anew(store, directory):
    trainer = Trainer(store)
    reader = VersionReader(directory, directory.parent / "copy")
    for _ in range(2):
        trainer.step()
        assert_has(reader, *trainer.versions[-1])
    weights = directory.parent / "copy" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-40] ^= 1
    weights.write_bytes(content)
    trainer.step()
    assert_has(reader, *trainer.versions[-1])


def test_differences_of_a_version_with_another_base_are_never_taken_for_this_one(store, directory):
    """Two runs may have written a version of one number; the exclusive or with the wrong one would pass as well."""
    trainer = Trainer(store)
    trainer.step()
    weights = trainer.step()
    manifest = directory / weights.manifest
    forged = json.loads(manifest.read_text())
    forged["base"]["digest"] = "0" * 64
    manifest.write_text(json.dumps(forged))
    with pytest.raises(WeightsError, match="not the manifest that was announced"):
        assert_has(VersionReader(directory, directory.parent / "copy"), weights, trainer.tensors)
    with pytest.raises(WeightsError, match="policy version 2"):
        assert_has(
            VersionReader(directory, directory.parent / "c"),
            Weights(WeightsId(3, weights.id.digest), weights.manifest),
            {},
        )


def test_a_step_at_1e_6_in_bf16_takes_a_tenth_of_its_bytes(store, directory):
    weights = {"w": 0.02 * torch.randn(200_000, generator=torch.Generator().manual_seed(1))}
    sizes = []
    for version in (1, 2):
        store.write([(name, tensor.bfloat16()) for name, tensor in weights.items()], version)
        sizes.append(store.written_bytes)
        weights = {name: tensor + 1e-6 * torch.sign(torch.sin(1e6 * tensor)) for name, tensor in weights.items()}
    assert sizes[1] < 0.1 * sizes[0]
