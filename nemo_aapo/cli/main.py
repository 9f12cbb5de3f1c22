"""From the command line to a checked configuration: how every script that takes settings begins.

Refusals come cheapest first: mistyped keys before Hydra is imported, then Hydra's composition, then the schema, then
the script's own early check; only then is NeMo imported (on rank 0), whose ``hydra_runner`` composes once more.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from typing import Any

from nemo_aapo.config import check_overrides, without_secrets
from nemo_aapo.config.command_line import FROZEN, TRAINING, Page, read_command_line, usage
from nemo_aapo.config.compose import check_same, compose, compose_through_nemo
from nemo_aapo.errors import FAILED, INTERRUPTED, REFUSED, ConfigError, RunError
from nemo_aapo.utils.libraries import quiet

RANK_0_SPEAKS_S = 3.0
"""Other ranks give rank 0 so long to say why, as torchrun ends all ranks as soon as it sees one end."""


def config_main(
    task: Callable[[Any, dict[str, Any]], int],
    *,
    description: str,
    argv: list[str] | None = None,
    check: Callable[[Any], object] | None = None,
    through_nemo: bool = True,
    page: Page = TRAINING,
) -> int:
    """Run a task with the configuration that the command line asks for.

    Args:
        task: called with the typed configuration and the resolved plain tree; returns the exit code.
        description: what the script does, for ``--help``.
        argv: the words after the script's name; None: those of this process.
        check: further refusals, on every rank, before anything slow is imported.
        through_nemo: compose by NeMo's ``hydra_runner`` on rank 0, as NeMo's scripts do. Launchers do without, and so
            do the ranks of a job, whose page the launcher has frozen.
        page: what kind of settings the words are; decides what the task and the check are called with.

    Returns:
        The task's exit code, or 2 where the configuration is refused: one message on stderr, no traceback.
    """
    rank = int(os.environ.get("RANK", "0"))
    quiet()
    try:
        command = read_command_line(sys.argv[1:] if argv is None else argv, page)
        if command.show == "help":
            return _say(usage(description, command), rank)
        check_overrides(command.overrides, command.groups(), page.schema)
        tree = compose(command)
        if command.show == "config":
            return _say(_to_yaml(without_secrets(tree)), rank)
        config, tree = page.parse(tree), without_secrets(tree)  # the tree is what is logged and written
        if check is not None:
            check(config)
    except ConfigError as error:  # every rank finds the same: one says it
        if rank > 0:
            time.sleep(RANK_0_SPEAKS_S)
            return REFUSED
        return _refuse(error, rank)
    except KeyboardInterrupt:
        return INTERRUPTED

    def run() -> int:
        if through_nemo and rank == 0 and command.page != FROZEN:  # in that one nothing is left to compose
            check_same(tree, without_secrets(compose_through_nemo(command)))
        return task(config, tree)

    return exit_code(run, rank)  # an error is perhaps on this rank only


def exit_code(run: Callable[[], int], rank: int = 0) -> int:
    """What ``run`` returns; or that of the error that ended it, whose message alone is printed, on stderr."""
    try:
        return run()
    except (ConfigError, argparse.ArgumentError) as error:
        return _refuse(error, rank)
    except RunError as error:
        _refuse(error, rank)
        return FAILED
    except KeyboardInterrupt:
        return INTERRUPTED


def _to_yaml(tree: dict[str, Any]) -> str:
    import yaml

    return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)


def _say(text: str, rank: int) -> int:
    if rank == 0:
        print(text, end="")
    return 0


def _refuse(error: Exception, rank: int) -> int:
    who = f"rank {rank}: " if rank else ""
    print(f"{who}{error}", file=sys.stderr, flush=True)
    return REFUSED
