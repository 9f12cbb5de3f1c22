"""Becomes one rank of a trainer or of a server: ``srun ... python -m nemo_aapo.launch.slurm.rank ROLE WORDS ...``.

Translates Slurm's variables into torchrun's, fills this process's numbers into WORDS, and calls Python with them.
Only the standard library: it runs before anything else, in whatever container the rank is in.
"""

from __future__ import annotations

import datetime
import os
import signal
import socket
import sys
from collections.abc import Mapping, Sequence

from nemo_aapo.errors import RunError

ADDRESSES = "NEMO_AAPO_{role}_ADDRESSES"
"""Variable with the addresses of a step's nodes in Slurm's order, by commas; the supervisor sets it."""
PLACE = "NEMO_AAPO_PLACE"
"""Variable of a server: which of how many on its node it is, such as ``0/4``."""

FIRST_PORT, PORTS = 15000, 15000
"""Where ports for the ranks to meet at are looked for: below those that kernels hand out by themselves."""
PORT_TRIES = 100


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
    """WORDS with this process's node address and place in an array of jobs."""
    addresses = environment[ADDRESSES.format(role=role.upper())].split(",")
    numbers = {
        "{address}": addresses[int(environment["SLURM_NODEID"])],
        "{task}": environment.get("SLURM_ARRAY_TASK_ID", "0"),
        "{tasks}": environment.get("SLURM_ARRAY_TASK_COUNT", "1"),
    }
    keys = [word.rpartition("=") for word in words]
    return [key + equals + numbers.get(value, value) for key, equals, value in keys]


def own_gpus(environment: Mapping[str, str]) -> dict[str, str]:
    """A server's share of its node's GPUs, as a server takes all that it sees."""
    gpus = [gpu for gpu in environment.get("CUDA_VISIBLE_DEVICES", "").split(",") if gpu]
    place, servers = map(int, environment[PLACE].split("/"))
    share = len(gpus) // servers
    return {"CUDA_VISIBLE_DEVICES": ",".join(gpus[place * share : (place + 1) * share])} if share else {}


def main(argv: Sequence[str]) -> int:
    """Replace this process by a rank; or print a free ``port``."""
    role, *words = argv
    if role == "port":
        return _print_port(int(words[0]))
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # a warning may come before Python has a handler; exec keeps this
    environment = dict(os.environ)
    command = [sys.executable, *fill_in(words, environment, role)]
    where = f"{environment['SLURM_PROCID']} of {environment['SLURM_STEP_NUM_TASKS']}"
    job = f"job {environment['SLURM_JOB_ID']}, attempt {environment.get('SLURM_RESTART_COUNT', '0')}"
    print(f"==== {_now()} {role} {where} on {environment['SLURMD_NODENAME']}, {job}", flush=True)
    own = own_gpus(environment) if role == "servers" else {}
    os.execve(sys.executable, command, environment | own | rank_environment(environment, role))


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
