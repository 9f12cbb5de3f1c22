"""A file or a directory that is written is whole or not there, whenever the writer is killed."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from nemo_aapo.utils import files
from nemo_aapo.utils.files import begin_directory, remove_directory, whole_directory, write_atomic

pytestmark = pytest.mark.slow

CALLS = ("fsync", "link", "mkdir", "open", "rename", "replace", "rmdir", "unlink")
"""System calls that make, change or remove what a file system holds, or bring it to the disk, as ``os`` names them."""
OLD = {"config.json": "old", "data/train.jsonl": "old", "tokenizer.json": "old"}
NEW = {"config.json": "new", "weights/model.safetensors": "new"}


@pytest.fixture(autouse=True)
def fast_disk(monkeypatch):
    """Kills of a process do not ask what is on the disk, so that nothing waits for it."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def write(directory: Path, content: dict[str, str]) -> None:
    with whole_directory(directory) as partial:
        for name, text in content.items():
            (partial / name).parent.mkdir(exist_ok=True)
            (partial / name).write_text(text)


def read(directory: Path) -> dict[str, str]:
    return {str(path.relative_to(directory)): path.read_text() for path in directory.rglob("*") if path.is_file()}


def count_down(calls: int) -> None:
    """Let this process end at its n-th system call, instead of making it."""

    def counted(real: Callable) -> Callable:
        def call(*arguments, **options):
            nonlocal calls
            calls -= 1
            if calls == 0:
                os._exit(1)
            return real(*arguments, **options)

        return call

    for name in CALLS:
        setattr(os, name, counted(getattr(os, name)))
    files._exchange = counted(files._exchange)


def killed_at(number: int, action: Callable[[], object]) -> bool:
    """Whether a child process that ``action`` is run in came to its n-th system call, which it was killed at."""
    child = os.fork()
    if child == 0:
        try:
            count_down(number)
            action()
        finally:
            os._exit(0)
    return os.waitpid(child, 0)[1] != 0


def two_renames(monkeypatch) -> None:
    """As on a file system that can't exchange two names."""
    monkeypatch.setattr(files, "_exchange", lambda one, other: False)


def test_a_kill_between_any_two_system_calls_leaves_the_old_directory_or_the_new_one(tmp_path):
    directory, number, found, killed = tmp_path / "hf_model", 0, [], True
    while killed:
        number += 1
        write(directory, OLD)
        killed = killed_at(number, lambda: write(directory, NEW))
        found.append(read(directory))
    assert number > 15
    assert found[0] == OLD
    assert found[-1] == NEW
    assert all(content in (OLD, NEW) for content in found)


def test_a_kill_between_any_two_system_calls_leaves_no_directory_or_the_whole_one_where_there_was_none(tmp_path):
    number, found, killed = 0, [], True
    while killed:
        number += 1
        directory = tmp_path / str(number)
        killed = killed_at(number, lambda directory=directory: write(directory, NEW))
        found.append(read(directory))
    assert number > 10
    assert all(content in ({}, NEW) for content in found)
    assert found[-1] == NEW


def test_what_a_kill_leaves_is_gone_after_the_next_write(tmp_path):
    directory, number = tmp_path / "hf_model", 1
    while killed_at(number, lambda: write(directory, NEW)):
        write(directory, OLD)
        assert os.listdir(tmp_path) == ["hf_model"]
        assert read(directory) == OLD
        number += 1


def test_two_renames_lose_nothing_and_the_next_write_gives_the_old_directory_its_name_back(tmp_path, monkeypatch):
    two_renames(monkeypatch)
    directory, number, missing, killed = tmp_path / "hf_model", 0, 0, True
    while killed:
        number += 1
        write(directory, OLD)
        killed = killed_at(number, lambda: write(directory, NEW))
        if not directory.exists():
            missing += 1
            assert [read(path) for path in sorted(tmp_path.iterdir())] == [NEW, OLD]
            begin_directory(directory)
            assert read(directory) == OLD
    assert missing == 1
    assert os.listdir(tmp_path) == ["hf_model"]
    assert read(directory) == NEW


@pytest.mark.parametrize("renames", [False, True])
def test_an_error_leaves_the_old_directory_and_nothing_else(tmp_path, monkeypatch, renames):
    directory, rename = tmp_path / "hf_model", os.rename
    write(directory, OLD)
    if renames:
        two_renames(monkeypatch)

    def refused(source: Path, target: Path) -> None:
        if Path(source).suffix == ".partial":
            raise OSError("refused")
        rename(source, target)

    with pytest.raises(RuntimeError, match="no more"), whole_directory(directory):
        raise RuntimeError("no more")
    monkeypatch.setattr(os, "rename", refused)
    if renames:
        with pytest.raises(OSError, match="refused"):
            write(directory, NEW)
    assert os.listdir(tmp_path) == ["hf_model"]
    assert read(directory) == OLD


def test_a_file_is_never_replaced_by_a_directory(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(NotADirectoryError):
        write(tmp_path / "file", NEW)
    assert (tmp_path / "file").read_text() == "mine"
    assert os.listdir(tmp_path) == ["file"]


def test_a_directory_gets_its_name_when_all_of_it_is_on_the_disk(tmp_path, monkeypatch):
    calls, fsync, rename = [], os.fsync, os.rename

    def sync(descriptor: int) -> None:
        calls.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(os, "rename", lambda *paths: calls.append("renamed") or rename(*paths))
    write(tmp_path / "hf_model", NEW)
    assert calls == ["model.safetensors", "weights", "config.json", ".hf_model.partial", "renamed", tmp_path.name]


def test_a_kill_between_any_two_system_calls_leaves_the_old_file_or_the_new_one(tmp_path):
    path, number, found, killed = tmp_path / "run.json", 0, [], True
    while killed:
        number += 1
        path.write_text("old")
        killed = killed_at(number, lambda: write_atomic(path, "new"))
        found.append(path.read_text())
    assert set(found) == {"old", "new"}


def test_a_directory_that_is_being_removed_does_not_bear_its_name(tmp_path):
    number, killed = 0, True
    while killed:
        number += 1
        directory = tmp_path / f"step_{number:06d}"
        write(directory, OLD)
        killed = killed_at(number, lambda directory=directory: remove_directory(directory))
        assert read(directory) in ({}, OLD)
        assert killed or not directory.exists()
    assert number > 3
