"""Becomes one rank or one rollout server: ``srun ... python -m nemo_aapo.launch.slurm.rank ROLE WORDS ...``.

Translates Slurm's variables into torchrun's, fills this process's numbers into WORDS, and calls Python with them: in
place of itself for a rank; beside itself for a server, which it starts again whenever that dies.
Only the standard library: it runs before anything else, in whatever container the rank is in.
"""

from __future__ import annotations

import datetime
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from types import FrameType

from nemo_aapo.errors import REFUSED, RunError

ADDRESSES = "NEMO_AAPO_{role}_ADDRESSES"
"""Variable with the addresses of a role's nodes in Slurm's order, by commas; the supervisor sets it."""

FIRST_PORT, PORTS = 15000, 15000
"""Where ports for the ranks to meet at are looked for: below those that kernels hand out by themselves."""
PORT_TRIES = 100
SETTLED_S = 60.0
"""A server that lived so long was well: what ended it is not held against the next one."""
STARTS = 10
"""A server that dies so often in a row without settling is given up."""
LONGEST_PAUSE_S = 30.0


def free_port(start: int) -> int:
    """The first port of ``FIRST_PORT + (start, start + 1, ...) % PORTS`` that nobody on this machine listens on.

    Raises:
        RunError: ``PORT_TRIES`` in a row are in use.
    """
    dual = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if dual else socket.AF_INET
    for number in range(start, start + PORT_TRIES):
        port = FIRST_PORT + number % PORTS
        try:  # on all addresses, as torch's store listens
            socket.create_server(("", port), family=family, dualstack_ipv6=dual).close()
        except OSError:
            continue
        return port
    raise RunError(
        f"{socket.gethostname()}: no port is free from {FIRST_PORT + start % PORTS} on, {PORT_TRIES} were tried: "
        "the ranks can't meet. Ask for another first node, or for whole nodes (cluster.exclusive=true)"
    )


def rank_environment(environment: Mapping[str, str], role: str) -> dict[str, str]:
    """What torchrun would set, by the variables of a Slurm step.

    Args:
        environment: of a process that ``srun`` started, with ``ADDRESSES`` and ``MASTER_PORT`` of the supervisor.
    """
    nodes, tasks = int(environment["SLURM_STEP_NUM_NODES"]), int(environment["SLURM_STEP_NUM_TASKS"])
    addresses = environment[ADDRESSES.format(role=role.upper())].split(",")
    return {
        "RANK": environment["SLURM_PROCID"],
        "LOCAL_RANK": environment["SLURM_LOCALID"],
        "GROUP_RANK": environment["SLURM_NODEID"],
        "WORLD_SIZE": str(tasks),
        "LOCAL_WORLD_SIZE": str(tasks // nodes),
        "GROUP_WORLD_SIZE": str(nodes),
        "MASTER_ADDR": addresses[0],
        "MASTER_PORT": environment["MASTER_PORT"],
        "OMP_NUM_THREADS": environment.get("OMP_NUM_THREADS", environment.get("SLURM_CPUS_PER_TASK", "1")),
        "PYTHONUNBUFFERED": "1",  # or the last words of a rank that is killed never reach its log
    }


def fill_in(words: Sequence[str], environment: Mapping[str, str], role: str) -> list[str]:
    """WORDS with this process's rank, node address and place in an array of jobs."""
    addresses = environment[ADDRESSES.format(role=role.upper())].split(",")
    numbers = {
        "{rank}": environment["SLURM_PROCID"],
        "{address}": addresses[int(environment["SLURM_NODEID"])],
        "{task}": environment.get("SLURM_ARRAY_TASK_ID", "0"),
        "{tasks}": environment.get("SLURM_ARRAY_TASK_COUNT", "1"),
    }
    keys = [word.rpartition("=") for word in words]
    return [key + equals + numbers.get(value, value) for key, equals, value in keys]


def own_gpus(environment: Mapping[str, str]) -> dict[str, str]:
    """A server's share of its node's GPUs, as a server takes all that it sees."""
    gpus = [gpu for gpu in environment.get("CUDA_VISIBLE_DEVICES", "").split(",") if gpu]
    servers = int(environment["SLURM_STEP_NUM_TASKS"]) // int(environment["SLURM_STEP_NUM_NODES"])
    share, first = len(gpus) // servers, int(environment["SLURM_LOCALID"])
    return {"CUDA_VISIBLE_DEVICES": ",".join(gpus[first * share : (first + 1) * share])} if share else {}


def keep_up(command: Sequence[str], environment: Mapping[str, str]) -> int:
    """Run a server, and whenever it dies another one in its place, until SIGTERM.

    Returns:
        The exit code of the last one: told to end, refused, or dead for the ``STARTS``-th time without settling.
    """
    told, server = threading.Event(), None

    def tell(number: int, frame: FrameType | None) -> None:
        told.set()
        if server is not None:
            server.send_signal(number)

    signal.signal(signal.SIGTERM, tell)
    deaths = code = 0
    while not told.is_set():
        began = time.monotonic()
        server = subprocess.Popen(command, env=dict(environment))
        if told.is_set():  # it came before there was a server to hand it on to
            server.terminate()
        code = server.wait()
        deaths = deaths + 1 if time.monotonic() - began < SETTLED_S else 1
        if told.is_set() or code == REFUSED or deaths == STARTS:
            break
        how = f"exit code {code}" if code >= 0 else signal.Signals(-code).name
        print(f"{_now()} the server ended ({how}): another one is started in its place", flush=True)
        told.wait(min(0.5 * 2 ** (deaths - 1), LONGEST_PAUSE_S))
    return code if code >= 0 else 128 - code


def main(argv: Sequence[str]) -> int:
    """Replace this process by a rank; or see to a server, and return its exit code; or print a free ``port``."""
    role, *words = argv
    if role == "port":
        return _print_port(int(words[0]))
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # a warning may come before Python has a handler; exec keeps this
    environment = dict(os.environ)
    command = [sys.executable, *fill_in(words, environment, role)]
    where = f"{environment['SLURM_PROCID']} of {environment['SLURM_STEP_NUM_TASKS']}"
    job = f"job {environment['SLURM_JOB_ID']}, attempt {environment.get('SLURM_RESTART_COUNT', '0')}"
    print(f"==== {_now()} {role} {where} on {environment['SLURMD_NODENAME']}, {job}", flush=True)
    if role == "servers":
        return keep_up(command, environment | own_gpus(environment) | {"PYTHONUNBUFFERED": "1"})
    os.execve(sys.executable, command, environment | rank_environment(environment, role))


def _print_port(start: int) -> int:
    try:
        print(free_port(start))
    except RunError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


def _now() -> str:
    return datetime.datetime.now().isoformat(sep=" ", timespec="seconds")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
