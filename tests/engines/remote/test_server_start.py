"""``scripts/serve.py``: what it is refused for, how it announces itself, and that it ends."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from nemo_aapo.cli.serve import PARENT_POLL_S
from nemo_aapo.config.command_line import read_command_line
from nemo_aapo.config.compose import compose
from nemo_aapo.engines.remote.directory import open_directory, open_token, read_servers
from tests.tiny_models import save_empty_model

ROOT = Path(__file__).resolve().parents[3]
COMMAND = [sys.executable, str(ROOT / "scripts" / "serve.py")]


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **more}


@pytest.fixture
def words(tmp_path) -> list[str]:
    """With a model directory without tensors: no server gets as far as reading them here."""
    model = save_empty_model(tmp_path / "model")
    return [f"model.path={model}", "data.train=t", "data.validation=v", f"run.dir={tmp_path / 'run'}"]


@pytest.fixture
def loading(tmp_path) -> dict[str, str]:
    """Environment of a server whose model is being loaded for as long as a test takes: Megatron's import never ends."""
    package = tmp_path / "packages" / "megatron"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("import time\n\ntime.sleep(600)\n")
    return environment(PYTHONPATH=f"{package.parent}{os.pathsep}{ROOT}")


@pytest.fixture
def taken_port() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener.getsockname()[1]


def refused(words: list[str], **more: str) -> str:
    """What a server says that doesn't start."""
    done = subprocess.run(
        [*COMMAND, *words], cwd=ROOT, env=environment(**more), capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    assert done.stdout == ""
    return done.stderr


@pytest.mark.slow
def test_a_server_that_can_t_start_says_why_in_one_line(words, taken_port, tmp_path):
    assert "no such directory" in refused([*words, "model.path=/none"])
    assert "did you mean 'rollout.server.index'" in refused([*words, "rollout.server.indx=1"])
    assert f"rollout.server.port={taken_port}: Address already in use" in refused(
        [*words, f"rollout.server.port={taken_port}"]
    )
    ranks = {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    assert "= 1 ranks, and 2 were started" in refused(words, **ranks)
    assert "rollout.server.tensor_parallel_size=3 does not divide" in refused(
        [*words, "rollout.server.tensor_parallel_size=3"]
    )
    assert "which it does not divide" in refused([*words, "rollout.server.expert_parallel_size=2"])
    open_token(open_directory(tmp_path / "run" / "servers"))
    (tmp_path / "run" / "servers" / "token").chmod(0o644)
    assert "token: open to others" in refused(words)
    assert read_servers(tmp_path / "run" / "servers") == []


@pytest.mark.slow
@pytest.mark.parametrize("end", ["SIGTERM", "SIGINT", "parent"])
def test_it_starts_from_a_frozen_page_and_ends_with_a_signal_or_with_its_parent(words, loading, tmp_path, end):
    """While its model is still being loaded, which is when launchers lose patience."""
    page = tmp_path / "run" / "frozen.yaml"
    page.parent.mkdir()
    page.write_text(yaml.safe_dump(compose(read_command_line(words))))
    frozen = ["--config-path", str(page.parent), "--config-name", "frozen", "rollout.server.index=3"]
    parent = subprocess.Popen(
        [sys.executable, "-c", "import subprocess, sys; sys.exit(subprocess.call(sys.argv[1:]))", *COMMAND, *frozen],
        cwd=ROOT,
        env=loading,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),  # whoever runs the tests may ignore it
    )
    directory = page.parent / "servers"
    try:
        deadline = time.monotonic() + 120
        while not read_servers(directory):
            assert time.monotonic() < deadline
            assert parent.poll() is None
            time.sleep(0.05)
        (server,) = read_servers(directory)
        assert (server.index, server.address.rpartition(":")[0]) == (3, "http://127.0.0.1")
        if end == "parent":
            parent.kill()
        else:
            os.kill(server.pid, getattr(signal, end))
        said = parent.communicate(timeout=120)[1]  # until the server has closed its end as well
        assert parent.returncode == (-signal.SIGKILL if end == "parent" else 0)
        assert f"stopping: {'the process that started it is gone' if end == 'parent' else end}" in said
        assert "Traceback" not in said
        assert read_servers(directory) == []
    finally:
        if parent.poll() is None:
            os.killpg(parent.pid, signal.SIGKILL)


@pytest.mark.slow
def test_under_nohup_it_outlives_the_shell_that_started_it(words, loading, tmp_path):
    directory, log = tmp_path / "run" / "servers", tmp_path / "log"
    shell = [
        "bash",
        "-c",
        f'nohup "$@" > {log} 2>&1 & until [[ -e {directory}/server_0.json ]]; do sleep 0.1; done',
        "-",
    ]
    subprocess.run([*shell, *COMMAND, *words], cwd=ROOT, env=loading, timeout=120, check=True)
    (server,) = read_servers(directory)
    os.kill(server.pid, signal.SIGHUP)
    time.sleep(1.2 * PARENT_POLL_S)
    assert "stopping" not in log.read_text()
    os.kill(server.pid, signal.SIGTERM)
    deadline = time.monotonic() + 120
    while read_servers(directory):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert "stopping: SIGTERM" in log.read_text()
