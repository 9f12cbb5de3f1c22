"""The HTTP side over an engine that is none: bodies that can't be read, clients that go away."""

from __future__ import annotations

import asyncio
import gzip
import json
import socket
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import closing

import numpy as np
import pytest
from aiohttp import web

from nemo_aapo.engines.remote import wire
from nemo_aapo.engines.remote.service import Service
from tests.engines.remote.test_worker import V0, V1, WARM, Harness

TOKEN = "t" * 20
BODY = wire.encode_request(wire.GenerateRequest(V0, WARM, [np.array([5], np.int32)], [[1, 2, 3, 4]]))


class Server:
    """One on a port of its own, in a thread."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.harness, self.listener = Harness(), socket.create_server(("127.0.0.1", 0))
        asyncio.run_coroutine_threadsafe(self._start(), loop).result(10)

    async def _start(self) -> None:
        runner = Service(self.harness.worker, TOKEN, wire.Limits(100, 1000), 1 << 16).runner()
        await runner.setup()
        await web.SockSite(runner, self.listener).start()

    def send(self, path: str, body: bytes, length: int | None = None, **headers: str) -> socket.socket:
        """The connection, on which a request was sent."""
        fields = {"Host": "x", "Authorization": f"Bearer {TOKEN}", "Content-Length": length or len(body), **headers}
        if "Transfer_Encoding" in headers:
            del fields["Content-Length"]
        head = "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in fields.items())
        connection = socket.create_connection(self.listener.getsockname(), timeout=10)
        connection.sendall(f"POST /v1/{path} HTTP/1.1\r\nConnection: close\r\n{head}\r\n".encode() + body)
        return connection

    def ask(self, path: str, body: bytes, **headers: str) -> tuple[int, bytes]:
        """Status and body of the answer."""
        with closing(self.send(path, body, **headers)) as connection:
            answer = b"".join(iter(lambda: connection.recv(65536), b""))
        return int(answer.split()[1]), answer.partition(b"\r\n\r\n")[2]


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, daemon=True).start()
    made = Server(loop)
    yield made
    made.harness.engine.permits.release(1000)
    assert made.harness.worker.stop(10)
    loop.call_soon_threadsafe(loop.stop)


@pytest.fixture(autouse=True)
def no_traceback(capfd) -> Iterator[None]:
    """Nothing that these clients do is worth more than a line."""
    yield
    said = "".join(capfd.readouterr())
    assert "Traceback" not in said


@pytest.mark.parametrize("path", ["generate", "update_weights"])
@pytest.mark.parametrize(("encoding", "body"), [
    ("gzip", b"garbage"),
    ("gzip", b"\x1f\x8b" + b"\0" * 20),
    ("gzip", gzip.compress(bytes(range(256)) * 9)[:60]),
    ("deflate", b"\xff\xfe\xfd"),
], ids=["garbage", "only a head", "cut off", "deflate"])  # fmt: skip
def test_a_body_that_is_not_what_its_encoding_says_is_400_with_a_reason(server, path, encoding, body):
    status, answer = server.ask(path, body, Content_Encoding=encoding)
    assert (status, json.loads(answer)["reason"]) == (400, "request")


def test_a_compressed_body_is_read_and_one_that_swells_is_too_large(server):
    status, answer = server.ask("generate", gzip.compress(b"{}"), Content_Encoding="gzip")
    assert (status, "prompts" in json.loads(answer)["error"]) == (400, True)
    assert server.ask("generate", gzip.compress(b" " * (1 << 20)), Content_Encoding="gzip")[0] == 413


@pytest.mark.parametrize("headers", [
    {"Content_Encoding": "br"}, {"Content_Encoding": "zstd"}, {"Transfer_Encoding": "chunked"}, {"X": "a" * 20_000},
])  # fmt: skip
def test_what_http_itself_does_not_allow_is_400(server, headers):
    assert server.ask("generate", b"garbage", **headers)[0] == 400


@pytest.mark.parametrize("how", ["half-closed", "reset"])
def test_clients_that_go_away_leave_nothing_behind(server, how):
    """In the middle of the body, while they wait, while the answer comes, and during a refit."""
    harness = server.harness
    for part in ("body", "wait", "answer", "refit"):
        if part == "refit":
            connection = server.send("update_weights", wire.encode_weights(wire.Weights(V1, "x")))
        else:
            connection = server.send("generate", BODY, length=len(BODY) + 9 * (part == "body"))
        if part in ("wait", "answer"):
            assert harness.engine.begun.acquire(timeout=10)
        if part == "answer":
            harness.engine.permits.release()
            assert b"200 OK" in connection.recv(1000)
        _leave(connection, how)
        time.sleep(0.05)
        harness.engine.permits.release(9)
    status, answer = server.ask("generate", b"{}")
    assert (status, json.loads(answer)["reason"]) == (400, "request")


def _leave(connection: socket.socket, how: str) -> None:
    if how == "reset":
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    else:
        connection.shutdown(socket.SHUT_WR)
    connection.close()
