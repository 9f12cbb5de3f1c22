"""What becomes of one process of a job: the port that ranks meet at, and a server that is started again."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nemo_aapo.errors import RunError
from nemo_aapo.launch.slurm.rank import FIRST_PORT, PORT_TRIES, PORTS, free_port

ROOT = Path(__file__).resolve().parents[2]


def test_a_port_in_use_is_passed_over_on_whatever_address_somebody_listens():
    start = next(n for n in range(7000, 9000) if [free_port(n + k) - n - k for k in range(3)] == [FIRST_PORT] * 3)
    with socket.create_server(("127.0.0.1", FIRST_PORT + start)), socket.create_server(("", FIRST_PORT + start + 1)):
        assert free_port(start) == FIRST_PORT + start + 2
    assert free_port(start + 3 * PORTS) == FIRST_PORT + start


def test_the_search_for_a_port_has_an_end(monkeypatch):
    tried = []

    def refuse(address, **options):
        tried.append(address[1])
        raise OSError

    monkeypatch.setattr(socket, "create_server", refuse)
    with pytest.raises(RunError, match="no port is free from 29990 on, 100 were tried"):
        free_port(14990)
    assert len(set(tried)) == PORT_TRIES
    assert set(tried) <= set(range(FIRST_PORT, FIRST_PORT + PORTS))


KEEP_UP = """
import os, sys
from nemo_aapo.launch.slurm import rank
rank.STARTS = 3
sys.exit(rank.keep_up(["bash", "-c", sys.argv[1]], os.environ))
"""


def keep_up(server: str, folder: Path) -> subprocess.Popen:
    command = [sys.executable, "-c", KEEP_UP, server]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command, cwd=folder, env=environment, text=True, stdout=subprocess.PIPE)


@pytest.mark.slow
def test_a_server_that_dies_is_started_again_until_it_is_told_to_end(tmp_path):
    """The first one kills itself, the second one ends well, the third one stays."""
    lives = "echo >> starts; case $(wc -l < starts) in 1) kill -9 $$;; 2) exit 0;; *) exec sleep 60;; esac"
    kept = keep_up(lives, tmp_path)
    deadline = time.monotonic() + 20
    while not (tmp_path / "starts").exists() or (tmp_path / "starts").read_text().count("\n") < 3:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    time.sleep(0.1)
    kept.send_signal(signal.SIGTERM)
    said = kept.communicate(timeout=20)[0]
    assert kept.returncode == 128 + signal.SIGTERM
    assert [line.split("the server ")[1] for line in said.splitlines()] == [
        f"ended ({how}): another one is started in its place" for how in ("SIGKILL", "exit code 0")
    ]


@pytest.mark.slow
@pytest.mark.parametrize(("code", "starts"), [(2, 1), (1, 3)])
def test_a_server_that_is_refused_or_never_comes_up_is_given_up(tmp_path, code, starts):
    kept = keep_up(f"echo >> starts; exit {code}", tmp_path)
    kept.communicate(timeout=30)
    assert kept.returncode == code
    assert (tmp_path / "starts").read_text().count("\n") == starts
