"""What is on disk for refusals, and who would notice an import of something heavy."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from nemo_aapo.models.directory import read_model_dir
from nemo_aapo.models.weights import expected_tensors
from nemo_aapo.utils.safetensors import INDEX, WEIGHTS
from tests.tiny_models import save_empty_input, save_empty_model, save_headers

HEAVY = ("torch", "transformers", "megatron", "nemo", "lightning")


@dataclass(frozen=True)
class Given:
    """What is on disk: a whole model, data, and a few broken things beside them."""

    folder: Path
    words: list[str]

    def fill_in(self, word: str) -> str:
        return word.replace("FOLDER", str(self.folder))


class Blocker:
    """Finds no heavy package, and remembers who asked for one to be imported."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        if name.partition(".")[0] in HEAVY:
            self.asked.append(name)
            raise ImportError(f"{name} was imported before everything was checked")


@pytest.fixture
def given(tmp_path, monkeypatch) -> Iterator[Given]:
    for name in ("RANK", "WORLD_SIZE", "SLURM_JOB_ID", "NEMO_AAPO_TRAIN_ADDRESSES"):
        monkeypatch.delenv(name, raising=False)
    folder = tmp_path / "given"
    folder.mkdir()
    words = save_empty_input(folder)
    (folder / "no_data").mkdir()
    (save_empty_model(folder / "bare") / "tokenizer_config.json").unlink()
    expected = expected_tensors(read_model_dir(str(folder / "model")))
    save_headers(save_empty_model(folder / "codes") / WEIGHTS, expected, "F8_E4M3")
    (save_empty_model(folder / "two_sets") / INDEX).write_text('{"weight_map": {"model.norm.weight": "a.safetensors"}}')
    (folder / "truncated").mkdir()
    (folder / "truncated" / "config.json").write_text('{"architectures"')
    (folder / "a_file").touch()
    (folder / "purged").symlink_to(folder / "scratch")
    (folder / "run_begun").mkdir()
    (folder / "run_begun" / "checkpoints").symlink_to(folder / "scratch")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    yield Given(folder, words)
    assert not list(elsewhere.iterdir())


@pytest.fixture
def blocker(monkeypatch) -> Blocker:
    """No heavy package is there, nor was: what other tests of this process have imported is put away meanwhile."""
    for name in list(sys.modules):
        if name.partition(".")[0] in HEAVY:
            monkeypatch.delitem(sys.modules, name)
    blocker = Blocker()
    monkeypatch.setattr(sys, "meta_path", [blocker, *sys.meta_path])
    return blocker


def command(name: str) -> Callable[[list[str]], int]:
    main: Callable[[list[str]], int] = importlib.import_module(f"nemo_aapo.cli.{name}").main
    return main
