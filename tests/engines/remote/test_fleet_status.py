"""How servers fare, for Prometheus, for people and for the run's metrics; and nobody waits for one that hangs."""

from __future__ import annotations

import asyncio
import math
import socket
import threading
import time

import pytest
from prometheus_client.parser import text_string_to_metric_families

from nemo_aapo.engines.remote import wire
from nemo_aapo.engines.remote.directory import ServerRecord, open_directory, publish
from nemo_aapo.engines.remote.fleet_status import (
    FleetWatch,
    ServerFigures,
    ask_all,
    fleet_lines,
    fleet_metrics,
    read_figures,
)
from nemo_aapo.errors import WireError
from nemo_aapo.report.charts import TIMES
from tests.engines.remote.test_service import BODY, TOKEN, Server
from tests.engines.remote.test_worker import V1, V2

QUIET = ServerFigures(3, 1000, 10, 0, math.nan, math.nan, math.nan, 0)


@pytest.fixture
def server():
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, daemon=True).start()
    made = Server(loop)
    yield made
    made.harness.engine.permits.release(1000)
    assert made.harness.worker.stop(10)
    loop.call_soon_threadsafe(loop.stop)


@pytest.fixture
def directory(tmp_path):
    made = open_directory(tmp_path / "servers")
    (made / "token").write_text(TOKEN)
    (made / "token").chmod(0o600)
    return made


def announce(directory, listener: socket.socket, index: int = 0) -> ServerRecord:
    host, port = listener.getsockname()
    record = ServerRecord(index, f"http://{host}:{port}", 1, f"instance{index}")
    publish(directory, record)
    return record


def test_what_a_server_says_of_itself_is_prometheus_text_and_reads_back(server, directory):
    server.harness.engine.permits.release(4)
    assert server.ask("generate", BODY)[0] == 200
    assert server.ask("generate", BODY.replace(b'"digest":"0"', b'"digest":"9"'))[0] == 409  # refused before the queue
    assert server.ask("update_weights", wire.encode_weights(wire.Weights(V2, "x")))[0] == 500  # its files are gone
    assert server.ask("update_weights", wire.encode_weights(wire.Weights(V1, "x")))[0] == 200
    record = announce(directory, server.listener)
    ((asked, figures),) = ask_all(directory).items()
    assert asked == record
    assert (figures.policy_version, figures.tokens, figures.outstanding, figures.failures) == (1, 4, 0, 1)
    assert figures.generate_seconds > 0
    assert figures.refit_seconds >= 0
    assert math.isnan(figures.kv_cache_use)  # an engine that does not tell

    text = _metrics(server)
    samples = {
        s.name: s.value for family in text_string_to_metric_families(text) for s in family.samples if not s.labels
    }
    assert samples["rollout_tokens_total"] == 4
    assert samples["rollout_policy_version"] == 1
    assert read_figures(text).tokens == 4
    documented = {family.name for family in text_string_to_metric_families(text) if family.documentation}
    assert {
        "rollout_failures",
        "rollout_kv_cache_use",
        "rollout_last_refit_bytes",
        "rollout_waiting_requests",
    } < documented


def _metrics(server: Server) -> str:
    import urllib.request

    host, port = server.listener.getsockname()
    request = urllib.request.Request(f"http://{host}:{port}/v1/metrics", headers={"Authorization": f"Bearer {TOKEN}"})
    with urllib.request.urlopen(request, timeout=10) as answer:
        assert answer.headers["Content-Type"].startswith("text/plain; version=0.0.4")
        return answer.read().decode()


def test_status_has_a_line_for_each_server_whatever_it_does(server, directory, monkeypatch):
    monkeypatch.setattr("nemo_aapo.engines.remote.fleet_status.ASK_S", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        announce(directory, server.listener)
        announce(directory, silent, 1)
        gone = socket.create_server(("127.0.0.1", 0))
        announce(directory, gone, 2)
        gone.close()
        first, second, third = fleet_lines(directory)
    assert first.startswith("server      0 http://127.0.0.1:")
    assert first.endswith("policy version 0, 0 outstanding, 0 failures")
    assert second.endswith("does not answer (timed out)")
    assert "does not answer (" in third
    assert "refused" in third
    (directory / "token").write_text("x" * 20)
    assert fleet_lines(directory)[0].endswith("answers HTTP 401")
    assert fleet_lines(directory / "none") == []


def test_a_runs_metrics_are_of_the_servers_that_answered_over_the_time_between_two_looks():
    one, two, three = (ServerRecord(k, f"http://h:{k}", 1, str(k)) for k in range(3))
    full = ServerFigures(4, 1500, 14, 7, 0.25, 2.0, 1e9, 2)
    before = {one: QUIET, two: QUIET, three: "does not answer"}
    now = {one: full, two: QUIET, three: "does not answer"}
    found = fleet_metrics(before, now, seconds=5.0)
    assert found == {
        "servers/answering": 2,
        "servers/busy_fraction": pytest.approx(0.4),
        "servers/tokens_per_second": 100,
        "servers/outstanding": 7,
        "servers/policy_version": 3,
        "servers/kv_cache_use": 0.25,
        "servers/refit_seconds": 2.0,
        "servers/failures": 2,
    }
    assert set(found) == {name for chart in TIMES for name in chart.metrics if name.startswith("servers/")}
    alone = fleet_metrics({}, {three: "does not answer"}, seconds=1.0)
    assert alone["servers/answering"] == 0
    assert math.isnan(alone["servers/busy_fraction"])


def test_nobody_waits_for_a_server_that_hangs(directory):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        announce(directory, silent)
        watch, began = FleetWatch(directory), time.monotonic()
        assert [watch.metrics() for _ in range(100)] == [{}] * 100
        assert time.monotonic() - began < 10  # where each waited for an answer, it would take minutes
        assert sum(thread.name == "fleet-watch" for thread in threading.enumerate()) == 1


@pytest.mark.parametrize("text", ["", "<html>", "rollout_tokens_total many", "rollout_tokens_total 1.0"])
def test_what_is_no_servers_metrics_is_said_to_be_none(text):
    with pytest.raises(WireError):
        read_figures(text)
