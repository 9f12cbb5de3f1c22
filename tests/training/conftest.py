"""A model, its data, and one whole run of them that tests compare theirs with."""

from __future__ import annotations

import pytest

from tests.training_runs import make_input, run, settings


@pytest.fixture(scope="package")
def folder(tmp_path_factory):
    """A random two-layer model and forty prompts."""
    return make_input(tmp_path_factory.mktemp("training"))


@pytest.fixture(scope="package")
def uninterrupted(ranks, folder):
    run_dir = folder / "uninterrupted"
    logged = settings(folder, run_dir, "exp_manager.create_tensorboard_logger=true", "rollout.keep_tokens=true")
    assert ranks.run(run, logged, tp=None) == [0]
    return run_dir
