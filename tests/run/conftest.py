"""The settings of a run, in a directory of its own."""

from __future__ import annotations

import pytest

from nemo_aapo.config import parse
from nemo_aapo.config.command_line import read_command_line
from nemo_aapo.config.compose import compose
from nemo_aapo.run import experiment as experiment_module


@pytest.fixture(scope="module")
def page():
    return compose(read_command_line(["model.path=/m", "data.train=/t", "data.validation=/v"]))


@pytest.fixture
def settings(page, tmp_path, monkeypatch):
    """A typed configuration and its tree, in a run directory of this test; without NeMo's loggers."""
    monkeypatch.setattr(experiment_module, "nemo_loggers", lambda config, run_id: [])
    tree = {**page, "run": {"name": "test", "dir": str(tmp_path / "run")}}
    return parse(tree), tree
