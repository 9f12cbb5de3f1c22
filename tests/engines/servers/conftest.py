"""Two servers for all tests of this folder that ask for ``two``; tests may kill them."""

from __future__ import annotations

from pathlib import Path

import pytest

from nemo_aapo.config.compose import load_config
from tests.servers import Servers, wait_until_ready
from tests.training_runs import make_input, settings


@pytest.fixture(scope="package")
def words(tmp_path_factory):
    folder = make_input(tmp_path_factory.mktemp("servers"))
    return settings(
        folder,
        folder / "run",
        "rollout.engine=remote",
        "rollout.remote.wait_s=30",
        "rollout.max_concurrent_tokens=2200",
    )


@pytest.fixture(scope="package")
def directory(words):
    return Path(load_config(words).rollout.remote.directory)


@pytest.fixture(scope="package")
def servers(words, directory):
    """Servers 0 and 1 of the folder; tests may kill them and start them anew."""
    started = Servers(directory)
    for index in (0, 1):
        started.start(index, words)
    yield started
    started.close()


@pytest.fixture
def two(servers, words, directory):
    """Both running and ready."""
    for index in (0, 1):
        if not servers.processes[index].is_alive():
            servers.start(index, words)
        wait_until_ready(directory, index)
    return servers
