"""Rollout servers for tests: real ones, forked from a process that has done the imports."""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from nemo_aapo.engines.remote.directory import ServerRecord, read_servers
from nemo_aapo.launch.local import free_port, rank_environments
from tests.forked import forking

ROOT = Path(__file__).resolve().parents[1]


class Servers:
    """The servers of one directory."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        directory.parent.mkdir(parents=True, exist_ok=True)
        self._context = forking()
        self.processes: dict[int, multiprocessing.Process] = {}
        self.others: list[multiprocessing.Process] = []

    def start(self, index: int, words: Sequence[str], timeout_s: float = 150.0, ranks: int = 1) -> ServerRecord:
        """Start a server and wait until it has announced itself; it may still be loading its model.

        Args:
            ranks: processes that it consists of; all but rank 0 are in ``others``.
        """
        before = {record.instance for record in self.records()}
        words = [*words, f"rollout.server.index={index}", f"rollout.server.directory={self.directory}"]
        environments = rank_environments({}, ranks, free_port()) if ranks > 1 else [{}]
        process, *self.others = [
            self._context.Process(target=_serve, args=(words, str(self.log(index)), environment), daemon=True)
            for environment in environments
        ]
        self.processes[index] = process
        for started in (process, *self.others):
            started.start()
        end = time.monotonic() + timeout_s
        while time.monotonic() < end:
            for record in self.records():
                if record.index == index and record.instance not in before:
                    return record
            assert process.is_alive(), self.log(index).read_text()
            time.sleep(0.02)
        raise AssertionError(f"server {index} did not announce itself: {self.log(index).read_text()}")

    def records(self) -> list[ServerRecord]:
        return read_servers(self.directory) if self.directory.exists() else []

    def log(self, index: int) -> Path:
        return self.directory.parent / f"server_{index}.log"

    def close(self) -> None:
        for process in (*self.processes.values(), *self.others):
            process.kill()
            process.join(10)


def _serve(words: Sequence[str], log: str, environment: Mapping[str, str]) -> None:
    os.environ.update(environment)
    with open(log, "ab", buffering=0) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    import torch

    torch.set_num_threads(1)
    from nemo_aapo.cli.serve import main

    sys.exit(main(list(words)))


def ask(directory: Path, index: int, path: str, body: bytes | None = None, token: str | None = None, **headers: str):
    """(status, JSON or text) of a request to a server; by default with the right token."""
    import urllib.error
    import urllib.request

    (record,) = [record for record in read_servers(directory) if record.index == index]
    token = (directory / "token").read_text().strip() if token is None else token
    request = urllib.request.Request(
        record.address + path, data=body, headers={"Authorization": f"Bearer {token}", **headers}
    )
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            status, text = response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        status, text = error.code, error.read().decode()
    return status, json.loads(text) if text.startswith("{") and "\n{" not in text else text


def wait_until_ready(directory: Path, index: int, timeout_s: float = 150.0) -> None:
    end = time.monotonic() + timeout_s
    while ask(directory, index, "/v1/ready")[0] != 200:
        assert time.monotonic() < end, f"server {index} is not ready"
        time.sleep(0.05)
