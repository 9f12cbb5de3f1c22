"""A copy of the checkout whose Python only writes down what it is asked to do."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
WAIT_S = 120
"""For a machine that is busy with other things."""


FAKE_PYTHON = """#!/usr/bin/env bash
call=$(printf ' %q' "$@")
echo "${PYTHONDONTWRITEBYTECODE:+without bytecode: }${call:1}" >>"$CALLS"
[[ -n ${CHECKS_BY:-} && $1 == -c ]] && cd "$CHECKED_IN" && exec "$CHECKS_BY" "$@"
[[ -n ${REFUSE:-} && "$*" == *$REFUSE* ]] && exit 1
[[ "$1 $2" == "-m venv" ]] && mkdir -p "$3/bin" && cp "$0" "$3/bin/python"
[[ -n ${SLOW:-} && "$*" == *$SLOW* ]] && sleep "$SECONDS_SLOW"
exit 0
"""


class Checkout:
    """A copy of scripts and requirements, whose ``python`` records its arguments."""

    def __init__(self, root: Path) -> None:
        self.root = root / "checkout"
        self.bin = root / "bin"
        self.calls_file = root / "calls"
        self.bin.mkdir()
        for name in ("python3.11", "python3.12", "python3", "python"):
            (self.bin / name).write_text(FAKE_PYTHON)
            (self.bin / name).chmod(0o755)
        for name in ("scripts", "requirements"):
            shutil.copytree(ROOT / name, self.root / name)
        (self.root / "nemo_aapo").mkdir()
        for name in ("nemo_aapo/lines.py", "setup.py"):
            shutil.copy(ROOT / name, self.root / name)

    def start(self, script: str, *arguments: str, **environment: str) -> subprocess.Popen:
        path = f"{self.bin}{os.pathsep}{os.environ['PATH']}"
        return subprocess.Popen(
            ["bash", self.root / "scripts" / script, *arguments],
            cwd=self.bin,
            env={"PATH": path, "CALLS": str(self.calls_file), **environment},
            start_new_session=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # tests in the background ignore it
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self, script: str, *arguments: str, **environment: str) -> tuple[int, str, list[str]]:
        """Exit status, output, and the calls of Python that this run made."""
        before = len(self.calls())
        process = self.start(script, *arguments, **environment)
        output = process.communicate(timeout=WAIT_S)[0]
        return process.returncode, output, self.calls()[before:]

    def calls(self) -> list[str]:
        return self.calls_file.read_text().splitlines() if self.calls_file.exists() else []

    def wait_for(self, call: str) -> None:
        deadline = time.monotonic() + WAIT_S
        while not any(call in line for line in self.calls()):
            assert time.monotonic() < deadline, f"no call {call!r} within {WAIT_S} s: {self.calls()}"
            time.sleep(0.02)


@pytest.fixture
def checkout(tmp_path) -> Checkout:
    return Checkout(tmp_path)


@pytest.fixture
def tested(checkout) -> Checkout:
    """A checkout with its environment, and stand-ins of what test.sh runs in it."""
    checkout.run("environment.sh")
    for name in ("ruff", "mypy", "python"):
        path = checkout.root / ".venv" / "bin" / name
        path.write_text(FAKE_PYTHON)
        path.chmod(0o755)
    return checkout
