"""Runs a job's roles by ``srun``: the trainer, and rollout servers that live as long as it does."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

POLL_S = 0.2
ABORT_S = 10.0
"""A second Ctrl-C within a second makes srun kill its tasks; so long may it take for that."""
SHOWN_LINES = 20
TRAIN = "train"


@dataclass(frozen=True)
class Ended:
    """How the trainer ended."""

    code: int
    """The exit code of the rank that failed first. srun's own is the highest of all, those included that it ended."""
    fault: str
    """What srun says of that rank, such as ``node2: task 3: Killed``; empty if none failed."""
    lost_servers: str
    """How the rollout servers ended, if all did so before the trainer; else empty."""
    last_words: str
    """What srun itself said of the role that failed, and the end of the log of the task that it names first."""


class Signals:
    """Signals to this process, kept until they are asked for."""

    HANDLED = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)

    def __init__(self) -> None:
        self.received: list[int] = []
        for number in self.HANDLED:
            signal.signal(number, self._keep)

    def _keep(self, number: int, frame: FrameType | None) -> None:
        self.received.append(number)


class Roles:
    """The started roles. Every one writes what its ``srun`` says to ``logs/srun_ROLE.log``."""

    def __init__(
        self,
        commands: Mapping[str, Sequence[str]],
        environment: Mapping[str, str],
        logs: Path,
        *,
        fault_timeout_s: float,
    ) -> None:
        """Start them, servers first.

        Args:
            commands: role -> ``srun`` with all its words; one of them is ``train``.
            fault_timeout_s: after a fault, or after the trainer's end, processes have so long to end by themselves.
        """
        self.logs, self.fault_timeout_s = logs, fault_timeout_s
        self._offset = {name: _size(self._log(name)) for name in commands}
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        for name in sorted(commands, key=lambda name: name == TRAIN):
            self._processes[name] = self._start(name, commands[name], environment)

    def wait(self, each: Callable[[], None]) -> Ended:
        """Until the trainer has ended, and the servers after it.

        Args:
            each: called several times a second meanwhile.
        """
        lost = None
        try:
            while self._processes[TRAIN].poll() is None and lost is None:
                each()
                ended = [name for name, role in self._processes.items() if name != TRAIN and role.poll() is not None]
                lost = ended[0] if ended else None
                time.sleep(POLL_S)
            lost = lost if self._processes[TRAIN].poll() != 0 else None  # both at once: the trainer was done
        finally:
            for name in sorted(self._processes, key=lambda name: name != TRAIN):
                self._end(self._processes[name])
        code, fault = first_fault(self._said(TRAIN), self._processes[TRAIN].returncode)
        return Ended(code, fault, self._describe(lost) if lost else "", self._last_words(lost or TRAIN))

    def _start(self, name: str, command: Sequence[str], environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
        with self._log(name).open("ab") as log:
            return subprocess.Popen(
                command, env=dict(environment), stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )

    def _end(self, process: subprocess.Popen[bytes]) -> None:
        """TERM, which srun hands on to its tasks; then what makes it kill them."""
        if process.poll() is not None:
            return
        process.send_signal(signal.SIGTERM)
        if not _wait(process, self.fault_timeout_s):
            for _ in range(2):
                process.send_signal(signal.SIGINT)
                time.sleep(POLL_S)
            if not _wait(process, ABORT_S):  # its tasks end with the job, then
                process.kill()
                process.wait()

    def _describe(self, name: str) -> str:
        code, fault = first_fault(self._said(name), self._processes[name].returncode)
        return f"the rollout servers ended while the trainer ran ({fault or f'exit code {code}'})"

    def _said(self, name: str) -> str:
        with self._log(name).open("rb") as file:
            file.seek(self._offset[name])
            return file.read().decode(errors="replace").strip()

    def _last_words(self, name: str) -> str:
        """srun's own words, and the last ones of the task that it names first."""
        said = self._said(name)
        task = re.search(r"error: \S+: tasks? (\d+)", said)
        if task is None:
            return said
        log = self.logs / f"{'rank' if name == TRAIN else 'server'}_{task[1]}.log"
        lines = log.read_text(errors="replace").splitlines()[-SHOWN_LINES:] if log.exists() else []
        return "\n".join([said, f"the end of {log}:", *(f"  {line}" for line in lines)])

    def _log(self, name: str) -> Path:
        return self.logs / f"srun_{name}.log"


def first_fault(said: str, code: int) -> tuple[int, str]:
    """Exit code and description of the task that failed first, by srun's messages; its own code where they say nothing.

    srun names a task as ``srun: error: node2: tasks 2-3: Exited with exit code 1`` or ``...: task 3: Killed``.
    """
    found = re.search(r"error: (\S+: tasks? \S+: (?:Exited with exit code (\d+)|\w.*))", said)
    if found is None or code == 0:
        return code, ""
    return int(found[2] or code), found[1]


def _wait(process: subprocess.Popen[bytes], seconds: float) -> bool:
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        return False
    return True


def _size(path: Path) -> int:
    return os.path.getsize(path) if path.exists() else 0
