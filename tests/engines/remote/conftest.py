"""Servers by their scripts, and the fleet that a trainer sees."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from nemo_aapo.engines.remote.directory import open_directory, open_token, publish
from nemo_aapo.engines.remote.dispatch import Fleet
from tests.engines.remote.scripted_server import TIMEOUT_S, VOCABULARY, ScriptedServer


@pytest.fixture
def start(tmp_path) -> Iterator[Callable[..., list[ScriptedServer]]]:
    """``start(script, script, ...)``: servers by their scripts, announced in ``tmp_path / "servers"``."""
    directory, started = open_directory(tmp_path / "servers"), []

    def start(*scripts: Callable[[], str]) -> list[ScriptedServer]:
        for script in scripts:
            started.append(ScriptedServer(len(started), open_token(directory), script))
            publish(directory, started[-1].record)
        return started

    yield start
    for server in started:
        server.close()


@pytest.fixture
def fleet(tmp_path) -> Callable[..., Fleet]:
    def make(servers: int = 1, **changes) -> Fleet:
        settings = {"wait_s": 2.0, "timeout_s": TIMEOUT_S, "retries": 3, "log": lambda text: None}
        settings |= {"vocab_size": VOCABULARY, **changes}
        return Fleet(tmp_path / "servers", servers=servers, **settings)

    return make
