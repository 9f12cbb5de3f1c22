"""TensorBoard starts in the environment that the scripts make, and finds the runs that exp_manager has written."""

from __future__ import annotations

import json
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from nemo_aapo.launch.local import free_port

WAIT_S = 100.0


def write_events(folder: Path) -> None:
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(folder)) as writer:
        writer.add_scalar("reward/mean", 0.5, 1)


@pytest.mark.slow
@pytest.mark.timeout(150)
def test_tensorboard_starts_on_a_folder_of_runs_and_lists_them(tmp_path):
    write_events(tmp_path / "results" / "mine" / "tensorboard")
    port = free_port()
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(tmp_path / "results"), "--port", str(port)]
    with (tmp_path / "log").open("wb") as log:
        server = subprocess.Popen([*command, "--host", "127.0.0.1"], stdout=log, stderr=log)
    try:
        assert asked(server, f"http://127.0.0.1:{port}/data/runs", tmp_path / "log") == ["mine/tensorboard"]
    finally:
        server.kill()
        server.wait()


def asked(server: subprocess.Popen[bytes], url: str, log: Path) -> list[str]:
    """Its answer, once it has read the files."""
    deadline, found = time.monotonic() + WAIT_S, []
    while not found and time.monotonic() < deadline:
        assert server.poll() is None, log.read_text()
        try:
            with urllib.request.urlopen(url, timeout=10) as answer:
                found = json.load(answer)
        except urllib.error.URLError:  # not yet there
            pass
        time.sleep(0.2)
    return found
