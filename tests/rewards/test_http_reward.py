"""A reward that a server works out: retried where that helps, within its time, and never trusted."""

from __future__ import annotations

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from nemo_aapo.errors import ConfigError
from nemo_aapo.rewards import build_reward
from nemo_aapo.rewards.workers.runner import RewardRunner
from tests.rewards.judging import completion, prompt
from tests.tiny_models import make_config


class Server:
    """Answers by a script: one (status, body, seconds to wait) a request, the last one from then on."""

    def __init__(self) -> None:
        self.script: list[tuple[int, bytes, float]] = [(200, b'{"score": 0.5}', 0.0)]
        self.requests: list[tuple[dict, dict]] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = self.rfile.read(int(self.headers["Content-Length"]))
                outer.requests.append((json.loads(body), dict(self.headers)))
                status, answer, seconds = outer.script.pop(0) if len(outer.script) > 1 else outer.script[0]
                time.sleep(seconds)
                self.send_response(status)
                self.send_header("Location", "http://127.0.0.1:9/")
                self.end_headers()
                self.wfile.write(answer)

            def log_message(self, *arguments): ...

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/score?task=math"

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def server():
    made = Server()
    yield made
    made.close()


def ask(server, text="7", **options):
    return build_reward({"name": "http", "url": server.url, **options})(prompt("7"), text, completion(5))


def test_the_server_is_told_all_and_its_score_is_taken(server):
    assert ask(server, "caf\u00e9 \ud800") == 0.5
    ((item, headers),) = server.requests
    wanted = {"prompt": "How many?", "completion": "caf\u00e9 \ud800", "answer": "7"}
    assert item == {**wanted, "num_tokens": 5, "finish_reason": "stop"}
    assert "Authorization" not in headers


@pytest.mark.parametrize("status", [503, 429])
def test_a_busy_server_is_asked_again(server, status):
    server.script = [(status, b"", 0.0), (status, b"", 0.0), (200, b'{"score": 1, "why": "right"}', 0.0)]
    assert ask(server, timeout_s=60.0) == 1.0
    assert len(server.requests) == 3
    server.script = [(status, b"", 0.0)]
    with pytest.raises(TimeoutError, match=rf"status {status}, at attempt 2 of 2"):
        ask(server, timeout_s=60.0, retries=1)


@pytest.mark.parametrize(
    ("status", "body", "message"),
    [
        (200, b"high", "the answer is not JSON: b'high'"),
        (200, b"[" * 100_000, "not JSON"),
        (200, b"[1]", "no finite number"),
        (200, b'{"score": NaN}', "no finite number"),
        (200, b'{"score": 1e999}', "no finite number"),
        (200, b'{"score": true}', "no finite number"),
        (200, b'{"score": "1"}', "no finite number"),
        (200, b"{}", "no finite number"),
        (200, b"9" * (2 << 20), "more than 1048576 bytes"),
        (401, b'{"score": 1}', "status 401"),
        (302, b'{"score": 1}', "status 302"),
    ],
)
def test_a_bad_answer_is_an_error_at_once(server, status, body, message):
    server.script = [(status, body, 0.0)]
    with pytest.raises(ValueError, match=message):
        ask(server, timeout_s=60.0)
    assert len(server.requests) == 1


def test_no_server_and_a_slow_one_cost_their_time_and_no_more(server):
    with pytest.raises(TimeoutError, match="Connection refused"):
        build_reward({"name": "http", "url": "http://127.0.0.1:9/", "timeout_s": 1.0})(prompt(), "7", completion())
    server.script = [(200, b'{"score": 1}', 600.0)]  # longer than any test may take
    with pytest.raises(TimeoutError, match=r"127\.0\.0\.1.*timed out"):
        ask(server, timeout_s=0.5)


@pytest.mark.slow
def test_a_token_comes_from_a_variable_and_is_in_no_message(server, monkeypatch, caplog):
    reward = build_reward({"name": "http", "url": server.url, "token_env": "REWARD_TOKEN", "timeout_s": 20.0})
    with pytest.raises(ValueError, match="the variable REWARD_TOKEN is not set"):
        reward.load()
    monkeypatch.setenv("REWARD_TOKEN", "hush-hush")
    server.script = [(403, b"hush", 0.0), (200, b'{"score": 1}', 0.0)]
    with RewardRunner([(reward, 2.0)], workers=1, timeout_s=30.0) as runner:
        for n in range(2):
            runner.submit(n, prompt(), "7", completion())
            results = runner.collect()
            assert (results[n].failure, results[n].parts["http"] == 1.0) == (("error", False), (None, True))[n]
        assert "hush-hush" not in f"{results} {runner.definition()} {caplog.text} {reward}"
    assert {headers["Authorization"] for _, headers in server.requests} == {"Bearer hush-hush"}


def test_its_time_must_be_less_than_the_runners():
    rewards = [{"name": "http", "url": "http://x/", "timeout_s": 12.0}]
    with pytest.raises(ConfigError, match=r"rewards\[0\].timeout_s=12.0: reward_runner.timeout_s=10.0 would kill"):
        make_config("model", rewards=rewards, validation__reward="http")
