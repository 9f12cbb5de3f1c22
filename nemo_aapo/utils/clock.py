"""The clock of a run's time limit: it starts with the first process of the run, or with Slurm's start of the job."""

from __future__ import annotations

import os
import time
from pathlib import Path

STARTED = "NEMO_AAPO_STARTED"
"""Variable with the start of the run's job in seconds since 1970; what starts ranks sets it for them."""


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
