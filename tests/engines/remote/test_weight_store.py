"""Refit through a directory: a version is whole and unchanged, or it is refused before a weight is loaded."""

from __future__ import annotations

import json
import os
import resource
import shutil
from pathlib import Path

import pytest
import torch

from nemo_aapo.engines.deltas import VersionReader
from nemo_aapo.engines.remote.weight_store import WeightStore
from nemo_aapo.engines.remote.wire import Weights
from nemo_aapo.errors import RunError, WeightsError, WireError
from nemo_aapo.utils.safetensors import weight_files

BUCKET = 3000


def verified(directory: Path, weights: Weights, names: tuple[str, ...] = ()) -> Path:
    with VersionReader(directory, directory.parent / "copy").whole(weights, {*tensors(), *names}) as folder:
        return folder


def tensors(version: int = 1) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(version)
    made = {f"layer.{n}": torch.randn(5 * n + 1, 7, generator=generator) for n in range(12)}
    made["transposed"] = made["layer.11"].T  # views and shared memory, as tied weights have
    made["tied"] = made["layer.3"]
    made["half"] = made["layer.2"].bfloat16()
    made["large"] = torch.randn(1500, generator=generator)
    return made


@pytest.fixture
def directory(tmp_path) -> Path:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"architectures": ["Qwen2ForCausalLM"]}')
    return tmp_path / "servers"


@pytest.fixture
def store(directory) -> WeightStore:
    return WeightStore(directory, str(directory.parent / "model"), BUCKET)


def read(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return {name: tensor for file in weight_files(folder) for name, tensor in load_file(folder / file).items()}


def test_what_is_read_is_what_was_written_bit_for_bit_in_buckets_of_bounded_size(store, directory):
    weights = store.write(tensors().items(), 1)
    folder = verified(directory, weights)
    got = read(folder)
    assert got.keys() == tensors().keys()
    for name, tensor in tensors().items():
        assert got[name].dtype == tensor.dtype
        assert torch.equal(got[name], tensor)
    assert (folder / "config.json").read_bytes() == store.config.read_bytes()
    sizes = [(folder / name).stat().st_size for name in weight_files(folder)]
    assert len(sizes) > 3
    assert sorted(sizes)[-2] < BUCKET + 1000 < sorted(sizes)[-1]  # headers aside; one tensor alone is larger
    assert [path.name for path in store.root.iterdir()] == [folder.name]


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGES = {
    "flipped bit": flip,
    "cut off": lambda path: os.truncate(path, path.stat().st_size - 1),
    "empty": lambda path: os.truncate(path, 0),
    "missing": Path.unlink,
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"x"),
}


@pytest.mark.parametrize("damage", list(DAMAGES))
def test_any_damage_to_any_file_is_refused_and_named(store, directory, damage, tmp_path):
    weights = store.write(tensors().items(), 1)
    folder = verified(directory, weights)
    shutil.copytree(folder, tmp_path / "whole")
    names = sorted(path.name for path in folder.iterdir())
    assert len(names) >= 6
    for name in names:
        DAMAGES[damage](folder / name)
        with pytest.raises(WeightsError, match=name):
            verified(directory, weights)
        shutil.copyfile(tmp_path / "whole" / name, folder / name)
    verified(directory, weights)


def test_a_manifest_that_was_replaced_together_with_its_files_is_refused(store, directory):
    """Only the digest that the trainer announced counts."""
    first = store.write(tensors(1).items(), 1)
    other = store.write(tensors(2).items(), 2)
    folder = verified(directory, first)
    forged = {**json.loads((verified(directory, other) / "manifest.json").read_text()), "policy_version": 1}
    shutil.rmtree(folder)
    shutil.copytree(verified(directory, other), folder)
    (folder / "manifest.json").write_text(json.dumps(forged))
    with pytest.raises(WeightsError, match="not the manifest that was announced"):
        verified(directory, first)
    with pytest.raises(WeightsError, match=r"manifest.*policy version 2"):
        verified(directory, Weights(type(other.id)(3, other.id.digest), other.manifest))


def test_a_version_without_one_of_the_models_tensors_is_refused(store, directory):
    weights = store.write(tensors().items(), 1)
    with pytest.raises(WeightsError, match=r"1 tensors of the model are missing, lm_head\.weight first"):
        verified(directory, weights, ("lm_head.weight",))


@pytest.mark.parametrize(
    "path",
    [
        "/etc/passwd",
        "../weights/v1-00000000/manifest.json",
        "weights/../../x/manifest.json",
        "weights/v1-00000000/../v1-00000000/manifest.json",
        "weights/v1-00000000",
        "",
    ],
)
def test_a_path_out_of_the_directory_is_refused(store, directory, path):
    weights = store.write(tensors().items(), 1)
    with pytest.raises(WireError, match="manifest"):
        verified(directory, Weights(weights.id, path))


def test_a_link_out_of_the_directory_is_refused(store, directory, tmp_path):
    weights = store.write(tensors().items(), 1)
    folder = verified(directory, weights)
    folder.rename(tmp_path / "elsewhere")
    folder.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(WireError, match="leads out"):
        verified(directory, weights)


def test_a_full_disk_is_an_error_that_leaves_the_version_before_whole_and_asks_for_every_tensor(store, directory):
    """Files may not grow beyond 4 kB: writing the large tensor ends as on a full disk."""
    first = store.write(tensors(1).items(), 1)
    asked = []
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4000, limits[1]))
    try:
        with pytest.raises(RunError, match=r"policy version 2 can't be written .*MiB free"):
            store.write(((asked.append(name) or name, tensor) for name, tensor in [*tensors(2).items()][::-1]), 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert asked == [*tensors(2)][::-1]  # other ranks take part in making them
    assert [path.name for path in store.root.iterdir()] == [Path(first.manifest).parent.name]
    verified(directory, first)
    second = store.write(tensors(2).items(), 2)
    assert torch.equal(read(verified(directory, second))["large"], tensors(2)["large"])


def test_only_the_versions_that_are_kept_stay_also_of_an_earlier_start(store, directory):
    (store.root / ".v9.partial").mkdir(parents=True)
    written = [store.write(tensors(version).items(), version) for version in (1, 2, 2, 3)]
    store.prune(keep=[written[1], Weights(written[0].id, None)])
    assert [path.name for path in store.root.iterdir()] == [Path(written[2].manifest).parent.name]
    assert written[1] == written[2]  # the same weights have the same name
    verified(directory, written[2])
