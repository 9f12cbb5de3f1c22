"""Runs a job's roles by ``srun``: the trainer, and rollout servers that live as long as it does."""

from __future__ import annotations

import contextlib
import math
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from nemo_aapo.errors import REFUSED
from nemo_aapo.launch.slurm.rank import ADDRESSES, FIRST_PORT, PLACE, PORT_TRIES, PORTS
from nemo_aapo.launch.slurm.script import SERVERS

POLL_S = 0.2
ABORT_S = 10.0
"""A second Ctrl-C within a second makes srun kill its tasks; so long may it take for that."""
SHOWN_LINES = 20
TRAIN = "train"
SETTLED_S = 60.0
"""A server that lived so long was well: what ended it is not held against the next one."""
STARTS = 10
"""A server that dies so often in a row without settling is given up."""
LONGEST_PAUSE_S = 30.0


@dataclass(frozen=True)
class Ended:
    """How the trainer ended."""

    code: int
    """The exit code of the rank that failed first. srun's own is the highest of all, those included that it ended."""
    fault: str
    """What srun says of that rank, such as ``node2: task 3: Killed``; empty if none failed."""
    lost_servers: str
    """Why the attempt can't go on, if too many rollout servers were given up; else empty."""
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

    def wait(self, seconds: float, *numbers: int) -> bool:
        """Until one of these has come, at most so long. Returns: whether one has."""
        deadline = time.monotonic() + seconds
        while not (came := any(number in self.received for number in numbers)) and time.monotonic() < deadline:
            time.sleep(POLL_S)
        return came


@dataclass(frozen=True)
class Step:
    """One ``srun``, which may be started more than once."""

    name: str
    """``train``, or ``server_<index>``."""
    words: Sequence[str]
    environment: Mapping[str, str]
    log: str
    """Name of a task's log, with ``%t`` for its number."""


def server_steps(
    command: Sequence[str], addresses: Sequence[str], servers: int, environment: Mapping[str, str], logs: Path
) -> list[Step]:
    """The step of each rollout server, on its part of the nodes.

    Args:
        command: ``srun`` with all its words, in which ``{node}`` is the first of a server's nodes, and ``{server}``
            its index.
        addresses: of the servers' nodes; several servers share one, or one has several.
        servers: how many there are.
        environment: of ``srun``; the variables of each server are added.
    """
    spanned, shared = max(1, len(addresses) // servers), max(1, servers // len(addresses))
    tasks = next(int(word.partition("=")[2]) for word in command if word.startswith("--ntasks="))
    steps = []
    for server in range(servers):
        first = server * len(addresses) // servers
        numbers = {"{node}": str(first), "{server}": str(server)}
        keys = [word.rpartition("=") for word in command[1:]]
        log = f"server_{server}.log" if tasks == 1 else f"server_{server}_rank_%t.log"
        words = [command[0], f"--output={str(logs).replace('%', '%%')}/{log}"]
        words += [key + equals + numbers.get(value, value) for key, equals, value in keys]
        own = {
            ADDRESSES.format(role=SERVERS.upper()): ",".join(addresses[first : first + spanned]),
            PLACE: f"{server % shared}/{shared}",
            "MASTER_PORT": str(_port(environment, PORT_TRIES * (server + 1))),
        }
        steps.append(Step(f"server_{server}", words, {**environment, **own}, log))
    return steps


class Server:
    """A rollout server: when its step, which has ended, is started again.

    A pause doubles while it keeps dying soon after its start. One that is refused, or dies ``STARTS`` times in a row,
    is given up.
    """

    def __init__(self, step: Step) -> None:
        self.step = step
        self.given_up = False
        self.starts = 0
        self._deaths = 0
        self._began = self._due = -math.inf

    def begin(self, now: float) -> dict[str, str]:
        """Its step is started; the step's environment: a port that somebody took is not tried twice."""
        self.starts, self._began = self.starts + 1, now
        return {**self.step.environment, "MASTER_PORT": str(_port(self.step.environment, self.starts - 1))}

    def ended(self, now: float, code: int) -> None:
        """Its step has ended. Args: code: of the task that failed first."""
        self._deaths = self._deaths + 1 if now - self._began < SETTLED_S else 1
        self.given_up = code == REFUSED or self._deaths == STARTS
        self._due = now + min(0.5 * 2 ** (self._deaths - 1), LONGEST_PAUSE_S)

    def is_due(self, now: float) -> bool:
        """Whether it is to be started again."""
        return not self.given_up and now >= self._due


class Roles:
    """The started roles. Each step writes what its ``srun`` says to ``logs/srun_NAME.log``."""

    def __init__(
        self, train: Step, servers: Sequence[Step], logs: Path, *, min_servers: int, fault_timeout_s: float
    ) -> None:
        """Start them, servers first.

        Args:
            min_servers: the attempt ends once more servers than that leaves room for are given up.
            fault_timeout_s: after a fault, or after the trainer's end, processes have so long to end by themselves.
        """
        self.logs, self.min_servers, self.fault_timeout_s = logs, min_servers, fault_timeout_s
        self._servers = [Server(step) for step in servers]
        self._steps = {step.name: step for step in (*servers, train)}
        self._offset: dict[str, int] = {}
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._see_to_servers()
        self._start(train, train.environment)

    def wait(self, each: Callable[[], None]) -> Ended:
        """Until the trainer has ended, and the servers after it.

        Args:
            each: called several times a second meanwhile.
        """
        lost = None
        try:
            while self._processes[TRAIN].poll() is None and lost is None:
                each()
                lost = self._see_to_servers()
                time.sleep(POLL_S)
            lost = lost if self._processes[TRAIN].poll() != 0 else None  # both at once: the trainer was done
        finally:
            self._end([TRAIN])
            self._end([name for name in self._processes if name != TRAIN])
        code, fault = self._fault_of(TRAIN)
        return Ended(code, fault, self._describe(lost) if lost else "", self._last_words(lost or TRAIN))

    def _see_to_servers(self) -> str | None:
        """Start those that are due. Returns: one that was given up, if too few are left."""
        now = time.monotonic()
        for server in self._servers:
            name = server.step.name
            process = self._processes.get(name)
            if process is not None and process.poll() is not None:
                code, fault = self._fault_of(name)
                server.ended(now, code)
                how, then = (
                    fault or f"exit code {code}",
                    "given up" if server.given_up else "started again in its place",
                )
                print(f"rollout {_in_words(name)} ended ({how}): it is {then}", flush=True)
                del self._processes[name]
            if name not in self._processes and server.is_due(now):
                self._start(server.step, server.begin(now))
        given_up = [server.step.name for server in self._servers if server.given_up]
        return given_up[-1] if given_up and len(self._servers) - len(given_up) < self.min_servers else None

    def _start(self, step: Step, environment: Mapping[str, str]) -> None:
        path = self._log(step.name)
        self._offset[step.name] = _size(path)
        with path.open("ab") as log:
            self._processes[step.name] = subprocess.Popen(
                step.words,
                env=dict(environment),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def _end(self, names: Sequence[str]) -> None:
        """TERM, which srun hands on to its tasks; then what makes it kill them."""
        running = [self._processes[name] for name in names if self._processes[name].poll() is None]
        for process in running:
            process.send_signal(signal.SIGTERM)
        running = _still(running, self.fault_timeout_s)
        for _ in range(2):
            for process in running:
                process.send_signal(signal.SIGINT)
            time.sleep(POLL_S if running else 0.0)
        for process in _still(running, ABORT_S):  # their tasks end with the job, then
            process.kill()
            process.wait()

    def _fault_of(self, name: str) -> tuple[int, str]:
        return first_fault(self._said(name), self._processes[name].returncode)

    def _describe(self, name: str) -> str:
        left = sum(not server.given_up for server in self._servers)
        return (
            f"{left} rollout servers are left, rollout.remote.min_servers={self.min_servers} are needed: "
            f"{_in_words(name)} was given up"
        )

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
        log = self.logs / self._steps[name].log.replace("%t", task[1])
        lines = log.read_text(errors="replace").splitlines()[-SHOWN_LINES:] if log.exists() else []
        return "\n".join([said, f"the end of {log}:", *(f"  {line}" for line in lines)])

    def _log(self, name: str) -> Path:
        return self.logs / f"srun_{name}.log"


def _in_words(name: str) -> str:
    return name.replace("_", " ")


def first_fault(said: str, code: int) -> tuple[int, str]:
    """Exit code and description of the task that failed first, by srun's messages; its own code where they say nothing.

    srun names a task as ``srun: error: node2: tasks 2-3: Exited with exit code 1`` or ``...: task 3: Killed``.
    """
    found = re.search(r"error: (\S+: tasks? \S+: (?:Exited with exit code (\d+)|\w.*))", said)
    if found is None or code == 0:
        return code, ""
    return int(found[2] or code), found[1]


def _port(environment: Mapping[str, str], distance: int) -> int:
    """A port so far from that of the trainer's ranks, or of a server's first start."""
    return FIRST_PORT + (int(environment["MASTER_PORT"]) - FIRST_PORT + distance) % PORTS


def _still(processes: Sequence[subprocess.Popen[bytes]], seconds: float) -> list[subprocess.Popen[bytes]]:
    """Those that have not ended after so many seconds."""
    deadline = time.monotonic() + seconds
    for process in processes:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(max(0.0, deadline - time.monotonic()))
    return [process for process in processes if process.poll() is None]


def _size(path: Path) -> int:
    return os.path.getsize(path) if path.exists() else 0
