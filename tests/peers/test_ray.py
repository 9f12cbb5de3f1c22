"""The TensorRT-LLM adapter over a real Ray: its whole life, two engines on a machine, an owner that is killed."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time

import psutil
import pytest
import torch

from tests.engines.trtllm.conftest import PROMPTS, SAMPLING, SEEDS, tokens
from tests.peers.peers import PEERS, ROOT, needs

DEADLINE_S = 500.0
"""A cluster starts in 25 s on one core that nobody else uses, and in minutes on two that ten processes want."""
pytestmark = [needs("ray"), pytest.mark.timeout(DEADLINE_S + 100)]


@contextlib.contextmanager
def running(*words):
    """A process of ``tests.peers.ray_run``."""
    folder = tempfile.mkdtemp(prefix="ray-")  # of Ray's sockets, whose paths must be short, and logs
    environment = {
        **os.environ,
        "PYTHONPATH": f"{PEERS}:{ROOT}",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_TMPDIR": folder,
        "RAY_gcs_rpc_server_reconnect_timeout_s": str(int(DEADLINE_S)),
    }
    command = [sys.executable, "-W", "ignore", "-m", "tests.peers.ray_run", *words]
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, bufsize=1)
    try:
        yield process
    finally:
        family = [*psutil.Process(process.pid).children(recursive=True)] if process.poll() is None else []
        process.kill()
        process.wait(30)
        for child in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def engines():
    """What one engine saw of its life, and whether the other's workers outlived that and their killed owner."""
    with running("owner") as owner, running() as alone:
        workers = json.loads(next(line for line in owner.stdout if line.startswith("[")))
        assert all(psutil.pid_exists(pid) for pid in workers)
        agents = psutil.Process(owner.pid).children(recursive=True)
        output, _ = alone.communicate(timeout=DEADLINE_S)
        assert alone.returncode == 0, output
        still = [psutil.pid_exists(pid) for pid in workers]  # the other's end was none of theirs
        os.kill(owner.pid, signal.SIGKILL)
        owner.wait(30)
        end = time.monotonic() + 60
        while any(psutil.pid_exists(pid) for pid in workers) and time.monotonic() < end:
            time.sleep(0.2)
        gone = [not psutil.pid_exists(pid) for pid in workers]
        for agent in agents:
            with contextlib.suppress(psutil.NoSuchProcess):
                agent.kill()
    return json.loads(output.splitlines()[-1]), still, gone


def test_the_adapter_lives_its_life_over_rayexecutors_calls(engines, engine, fake):
    found, _, _ = engines
    assert found["columns"] == [12, 12]  # of 24: two ranks
    assert found["visible"] == ["2,3", "2,3"]
    assert found["foreign"] == []
    assert found["environment_back"]
    assert "wake() comes first" in found["asleep"]
    assert (found["buckets"], found["versions"], found["left"]) == (2, [1], [])
    assert "no such tag" in found["error"]
    engine.wake()  # the stand-in without Ray draws the same
    assert found["before"] == tokens(engine.generate(PROMPTS, SAMPLING, SEEDS))
    fake.engines[0].workers[0].engine.weights["model.table.weight"] = torch.randn(
        24, 24, generator=torch.Generator().manual_seed(1)
    )
    assert found["after"] == tokens(engine.generate(PROMPTS, SAMPLING, SEEDS))


def test_two_engines_on_a_machine_do_not_meet_and_a_killed_owners_workers_end(engines):
    _, still, gone = engines
    assert still == [True]
    assert gone == [True]


@pytest.fixture
def fake(monkeypatch):
    from tests import fake_trtllm

    return fake_trtllm.install(monkeypatch)


@pytest.fixture
def engine(fake):
    from tests.engines.trtllm.conftest import start

    made = start()
    yield made
    made.close()
