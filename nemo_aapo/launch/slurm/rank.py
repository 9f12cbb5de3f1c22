"""Becomes one rank or one rollout server: ``srun ... python -m nemo_aapo.launch.slurm.rank ROLE WORDS ...``.

Translates Slurm's variables into torchrun's, fills this process's numbers into WORDS, and calls Python with them.
Only the standard library: it runs before anything else, in whatever container the rank is in.
"""

from __future__ import annotations

import datetime
import os
import signal
import sys
from collections.abc import Mapping, Sequence

ADDRESSES = "NEMO_AAPO_{role}_ADDRESSES"
"""Variable with the addresses of a role's nodes in Slurm's order, by commas; the supervisor sets it."""


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


def main(argv: Sequence[str]) -> None:
    """Replace this process."""
    role, *words = argv
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # a warning may come before Python has a handler; exec keeps this
    environment = dict(os.environ)
    words = fill_in(words, environment, role)
    if role == "servers":
        environment |= own_gpus(environment)
        environment["PYTHONUNBUFFERED"] = "1"
    else:
        environment |= rank_environment(environment, role)
    now = datetime.datetime.now().isoformat(sep=" ", timespec="seconds")
    where = f"{environment['SLURM_PROCID']} of {environment['SLURM_STEP_NUM_TASKS']}"
    job = f"job {environment['SLURM_JOB_ID']}, attempt {environment.get('SLURM_RESTART_COUNT', '0')}"
    print(f"==== {now} {role} {where} on {environment['SLURMD_NODENAME']}, {job}", flush=True)
    os.execve(sys.executable, [sys.executable, *words], environment)


if __name__ == "__main__":
    main(sys.argv[1:])
