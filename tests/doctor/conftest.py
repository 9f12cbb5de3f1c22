"""A configuration of a run, and a search path that tests fill."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.doctor.contexts import program
from tests.tiny_models import make_config


@pytest.fixture
def config(tiny_models, tmp_path):
    return make_config(tiny_models["qwen2"], run__dir=str(tmp_path / "run"))


@pytest.fixture
def only_on_path(tmp_path, monkeypatch) -> Path:
    """A folder that is all of PATH but for the shell's own programs."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    program(folder, "sleep", f'exec {shutil.which("sleep", path="/bin:/usr/bin")} "$@"')
    return folder
