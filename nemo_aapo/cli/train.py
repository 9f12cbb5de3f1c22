"""Trains a policy: one rank, alone or started by torchrun, Slurm or ``launch``."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from nemo_aapo.cli.main import run_command
from nemo_aapo.prepare import Job, prepare
from nemo_aapo.utils.libraries import importing

DESCRIPTION = "Train a policy with AAPO: one rank (scripts/launch.py starts many)."


def main(words: Sequence[str] | None = None) -> int:
    """The command; its exit code."""
    return run_command(prepare, train, description=DESCRIPTION, words=sys.argv[1:] if words is None else words)


def train(job: Job) -> int:
    """The whole run, on this rank."""
    with importing():
        from nemo_aapo.jobs import train as training  # torch and Megatron

    return training.train(job)
