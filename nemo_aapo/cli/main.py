"""What all commands that take settings have in common: ``--help``, ``--cfg job``, refusals, exit codes."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from nemo_aapo.config import without_secrets
from nemo_aapo.config.command_line import TRAINING, CommandLine, ConfigFile, read_command_line, usage
from nemo_aapo.config.compose import compose
from nemo_aapo.errors import INTERRUPTED, REFUSED, ConfigError, RunError
from nemo_aapo.utils.libraries import quiet

J = TypeVar("J")
RANK_0_SPEAKS_S = 3.0
"""Other ranks give rank 0 so long to say why, as torchrun ends all ranks as soon as it sees one end."""


def run_command(
    prepare: Callable[[CommandLine], J],
    task: Callable[[J], int],
    *,
    description: str,
    words: Sequence[str],
    kind: ConfigFile = TRAINING,
) -> int:
    """Prepare what the words ask for, then do it.

    Args:
        prepare: makes the job, or refuses it, the same on every rank; imports nothing slow and writes nothing.
        task: does the job; returns the exit code.
        description: what the command does, for ``--help``.
        words: what was typed after the command's name.
        kind: of config file that the words are settings of.

    Returns:
        The task's exit code, or 2 where the job is refused: one message on stderr, no traceback.
    """
    rank = int(os.environ.get("RANK", "0"))
    quiet()
    try:
        command = read_command_line(list(words), kind)
        if command.show == "help":
            return _say(usage(description, command), rank)
        if command.show == "config":
            return _say(_to_yaml(without_secrets(compose(command))), rank)
        job = prepare(command)
    except ConfigError as error:
        return said_alike(error, rank)
    except KeyboardInterrupt:
        return INTERRUPTED
    return exit_code(lambda: task(job), rank)  # an error is perhaps on this rank only


def said_alike(error: ConfigError | RunError, rank: int) -> int:
    """The exit code of an error that every rank finds: rank 0 says it, the others give it the time to."""
    if rank == 0:
        print(error, file=sys.stderr, flush=True)
    else:
        time.sleep(RANK_0_SPEAKS_S)
    return error.exit_code


def exit_code(run: Callable[[], int], rank: int = 0) -> int:
    """What ``run`` returns; or that of the error that ended it, whose message alone is printed, on stderr."""
    try:
        return run()
    except (ConfigError, RunError, argparse.ArgumentError) as error:
        who = f"rank {rank}: " if rank else ""
        print(f"{who}{error}", file=sys.stderr, flush=True)
        return REFUSED if isinstance(error, argparse.ArgumentError) else error.exit_code
    except KeyboardInterrupt:
        return INTERRUPTED


def command_of_ranks(command: str, words: Sequence[str]) -> list[str]:
    """What a rank of a command is started with, wherever the package is installed."""
    return [sys.executable, "-m", "nemo_aapo.cli", command, *words]


def _to_yaml(tree: dict[str, Any]) -> str:
    import yaml

    return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)


def _say(text: str, rank: int) -> int:
    if rank == 0:
        print(text, end="")
    return 0
