"""Servers that do not belong to a trainer, and a trainer that does not belong to a fleet: named in time."""

from __future__ import annotations

import asyncio
import threading

import pytest
from aiohttp import web

from nemo_aapo.engines.remote import wire
from nemo_aapo.engines.remote.directory import Claim, ServerRecord, open_directory, open_token, publish
from nemo_aapo.engines.remote.dispatch import Fleet
from nemo_aapo.errors import ConfigError, RunError
from tests.engines.remote.scripted_server import WEIGHTS, ScriptedServer
from tests.engines.remote.test_service import Server


class Forgetful(ScriptedServer):
    """Says that it has loaded other weights than it was told."""

    async def _update(self, request: web.Request) -> web.Response:
        return web.Response(body=wire.encode_weights_id(self.weights))


class Refusing(ScriptedServer):
    """Has a model that the weights do not fit."""

    async def _update(self, request: web.Request) -> web.Response:
        return web.json_response({"error": "hidden_size is 64 here and 96 there", "reason": "weights"}, status=422)


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (Forgetful, "was told to load policy version 5"),
        (Refusing, "HTTP 422: hidden_size is 64 here and 96 there"),
    ],
    ids=["other version", "other model"],
)
def test_a_server_with_other_weights_than_the_trainers_is_named_and_asked_for_nothing(tmp_path, kind, said):
    directory = open_directory(tmp_path / "servers")
    server = kind(0, open_token(directory))
    try:
        publish(directory, server.record)
        with pytest.raises(RunError, match=f"(?s)0 rollout servers are usable.*server 0 .*{said}"):
            Fleet(directory, servers=1, wait_s=2.0, timeout_s=5.0, retries=0, log=lambda text: None).prepare(WEIGHTS)
        assert not server.asked
    finally:
        server.close()


def test_a_server_of_another_token_is_named(tmp_path):
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, daemon=True).start()
    server, directory = Server(loop), open_directory(tmp_path / "servers")
    open_token(directory)
    publish(directory, ServerRecord(0, f"http://127.0.0.1:{server.listener.getsockname()[1]}", 1, "other"))
    try:
        with pytest.raises(RunError, match=r"server 0 .*HTTP 401: a valid bearer token is needed"):
            Fleet(directory, servers=1, wait_s=2.0, timeout_s=5.0, retries=0, log=lambda text: None).prepare(WEIGHTS)
    finally:
        assert server.harness.worker.stop(10)
        loop.call_soon_threadsafe(loop.stop)


def test_a_second_trainer_at_a_fleet_is_refused_until_the_first_has_ended(tmp_path):
    directory = open_directory(tmp_path / "servers")
    first = Claim(directory, "results/first")
    first.take()
    with pytest.raises(ConfigError, match=r"its servers are in use by process .*results/first"):
        Claim(directory, "results/second")
    first.drop()
    second = Claim(directory, "results/second")
    second.take()
    second.drop()
