"""The job that a process is a part of: its place among the ranks, and since when it has been running."""

from __future__ import annotations

import os
import time
from pathlib import Path

from nemo_aapo.errors import ConfigError

STARTED = "NEMO_AAPO_STARTED"
"""Variable with the start of the run's job in seconds since 1970; what starts ranks sets it for them."""
_REMEDY = "torchrun, srun and scripts/launch.py set it; for one rank alone: unset RANK WORLD_SIZE LOCAL_RANK"


def rank_of_job() -> int:
    """This rank within the job; 0 for a process that nobody started as a rank.

    Raises:
        ConfigError: the variable that says so is no number.
    """
    return _number("RANK", "0")


def world_size_of_job() -> int:
    """Ranks of the job that this process is one of, before any group exists.

    Raises:
        ConfigError: the variable that says so is no number, or too small for this rank.
    """
    rank, world_size = rank_of_job(), _number("WORLD_SIZE", "1")
    if rank >= world_size:
        raise ConfigError(f"RANK={rank} with WORLD_SIZE={world_size}: ranks are counted from 0. {_REMEDY}")
    return world_size


def check_rendezvous() -> None:
    """Refuse to be a rank that can't find the others.

    Raises:
        ConfigError: the variables that say where they meet are missing, or wrong.
    """
    if "RANK" not in os.environ:
        return
    missing = [name for name in ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if missing:
        raise ConfigError(f"RANK={os.environ['RANK']} is set, but not {', '.join(missing)}: {_REMEDY}")
    if not 0 < _number("MASTER_PORT", "") < 2**16:
        raise ConfigError(f"MASTER_PORT={os.environ['MASTER_PORT']}: not a port. {_REMEDY}")
    world_size_of_job()
    _number("LOCAL_RANK", "0")


def seconds_since_start() -> float:
    """How long the job has been running that this process is a part of, imports and loading included."""
    try:
        return time.time() - float(os.environ[STARTED])
    except (KeyError, ValueError):
        return time.time() - start_of_process()


def start_of_process() -> float:
    """When this process was started, in seconds since 1970; on systems without /proc when Python's clock began."""
    try:
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        age = time.clock_gettime(time.CLOCK_BOOTTIME) - int(fields[19]) / os.sysconf("SC_CLK_TCK")
    except (OSError, AttributeError):
        age = time.process_time()
    return time.time() - age


def start_of_job() -> float:
    """When Slurm started the job that this process leads, else when this process was started.

    Slurm's time limit counts from there, so that what a node takes to boot is part of it.
    """
    try:
        return float(os.environ["SLURM_JOB_START_TIME"])
    except (KeyError, ValueError):
        return start_of_process()


def _number(name: str, default: str) -> int:
    text = os.environ.get(name, default)
    if not (text.isascii() and text.isdigit()):
        raise ConfigError(f"{name}={text!r}: a number is needed. {_REMEDY}")
    return int(text)
