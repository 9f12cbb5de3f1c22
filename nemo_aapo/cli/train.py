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
    words = sys.argv[1:] if words is None else words
    return run_command(prepare, train, description=DESCRIPTION, words=_settings(list(words)))


def _settings(words: list[str]) -> list[str]:
    """``--replay RUN`` is the setting of that name.

    >>> _settings(["seed=1", "--replay", "results/mine"])
    ['seed=1', 'rollout.replay=results/mine']
    """
    if "--replay" not in words[:-1]:
        return words
    at = words.index("--replay")
    return [*words[:at], f"rollout.replay={words[at + 1]}", *words[at + 2 :]]


def train(job: Job) -> int:
    """The whole run, on this rank."""
    with importing():
        from nemo_aapo.jobs import train as training  # torch and Megatron

    return training.train(job)
