"""What all commands that take settings have in common: ``--help``, ``--cfg job``, refusals, exit codes."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from nemo_aapo.config import without_secrets
from nemo_aapo.config.command_line import TRAINING, CommandLine, ConfigFile, read_command_line, usage
from nemo_aapo.config.compose import compose
from nemo_aapo.errors import FAILED, INTERRUPTED, REFUSED, ConfigError, RunError
from nemo_aapo.utils import unforeseen
from nemo_aapo.utils.files import EMPTY
from nemo_aapo.utils.job import rank_of_job
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
    quiet()

    def run() -> int:
        job = _prepared(prepare, description, words, kind)
        if isinstance(job, int):
            return job
        return exit_code(lambda: task(job), run_dir=_run_dir(job))  # an error is perhaps on this rank only

    return exit_code(run, on_every_rank=True)


def _prepared(prepare: Callable[[CommandLine], J], description: str, words: Sequence[str], kind: ConfigFile) -> J | int:
    """The job; or the exit code, where the words only ask to be shown something.

    Raises:
        ConfigError: the job is refused; a path that it names can't be looked at.
    """
    rank = rank_of_job()
    with unforeseen.paths_refused():
        command = read_command_line(list(words), kind)
        if command.show == "help":
            return _say(usage(description, command), rank)
        if command.show == "config":
            return _say(_to_yaml(without_secrets(compose(command))), rank)
        return prepare(command)


def exit_code(run: Callable[[], int], *, run_dir: Path | None = None, on_every_rank: bool = False) -> int:
    """What ``run`` returns; or that of the error that ended it, whose message alone is printed, on stderr.

    This is where every command ends: no error reaches a person as a traceback.

    Args:
        run_dir: where the log of an error that nobody foresaw is kept.
        on_every_rank: all ranks find the same errors, and rank 0 alone says them.
    """
    unforeseen.forgive_console()
    try:
        return run()
    except (ConfigError, RunError) as error:
        return said(str(error), error.exit_code, on_every_rank)
    except argparse.ArgumentError as error:
        return said(str(error), REFUSED, on_every_rank)
    except KeyboardInterrupt:
        return INTERRUPTED
    except Exception as error:
        if isinstance(error, BrokenPipeError) and run_dir is None:  # who reads the output has seen enough
            sys.stdout = None  # type: ignore[assignment]  # or Python would complain at its end
            return FAILED
        return said(unforeseen.describe(error, run_dir, _rank()), FAILED, on_every_rank)


def said(message: str, code: int, on_every_rank: bool = False) -> int:
    """Say an error on stderr; its exit code. Where every rank finds it, the others give rank 0 the time to say it."""
    rank = _rank()
    if rank == 0 or not on_every_rank:
        print(f"rank {rank}: {message}" if rank else message, file=sys.stderr, flush=True)
    else:
        time.sleep(RANK_0_SPEAKS_S)
    return code


def _rank() -> int:
    try:
        return rank_of_job()
    except ConfigError:  # which is the error that is being said
        return 0


def _run_dir(job: object) -> Path | None:
    """The run directory of any kind of job that has one."""
    run = getattr(getattr(job, "config", job), "run", None)
    return None if run is None else Path(run.dir)


def command_of_ranks(command: str, words: Sequence[str]) -> list[str]:
    """What a rank of a command is started with, wherever the package is installed."""
    return [sys.executable, "-m", "nemo_aapo.cli", command, *words]


def typed_path(text: str) -> Path:
    """An option's value: a path, with the home directory for a ``~`` that it begins with; ``~nobody`` stays."""
    return Path(os.path.expanduser(not_empty(text)))


def not_empty(text: str) -> str:
    """An option's value: a path or another name of something.

    Raises:
        argparse.ArgumentTypeError: an empty text.
    """
    if not text.strip():
        raise argparse.ArgumentTypeError(EMPTY)
    return text


def _to_yaml(tree: dict[str, Any]) -> str:
    import yaml

    return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)


def _say(text: str, rank: int) -> int:
    if rank == 0:
        print(text, end="")
    return 0
