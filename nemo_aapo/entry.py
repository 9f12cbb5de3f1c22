"""From the command line to a checked configuration: how every script that takes settings begins.

Refusals come cheapest first: mistyped keys before Hydra is imported, then Hydra's composition, then the schema, then
the script's own early check; only then is NeMo imported (on rank 0), whose ``hydra_runner`` composes once more.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from nemo_aapo.command_line import FROZEN, TRAINING, CommandLine, Page, read_command_line, usage
from nemo_aapo.config import Config, ConfigError, check_overrides, parse, without_secrets
from nemo_aapo.errors import RunError, one_line
from nemo_aapo.libraries import import_nemo, quiet

FAILED = 1
"""Exit code of a run that ended with a ``RunError``."""
REFUSED = 2
"""Exit code of a configuration that can't work."""
INTERRUPTED = 130
"""Exit code after Ctrl-C, as shells have it."""
OPEN_MAPPINGS = ("cluster.env", "cluster.sbatch_args", "sources")
"""Settings that take names of the user's own."""
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
            _check_same(tree, without_secrets(compose_through_nemo(command)))
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


def load_config(overrides: Sequence[str]) -> Config:
    """The typed configuration of ``KEY=VALUE`` words, for Python programs of one's own.

    Raises:
        ConfigError: what the command line would be refused for.
    """
    command = read_command_line(list(overrides))
    check_overrides(command.overrides, command.groups())
    return parse(compose(command))


def compose(command: CommandLine) -> dict[str, Any]:
    """The resolved tree, composed by Hydra without NeMo: a third of a second instead of several.

    Raises:
        ConfigError: what Hydra or OmegaConf refuse.
    """
    import hydra
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    register_resolvers()
    try:
        with hydra.initialize_config_dir(str(command.directory), version_base=None):
            return _resolve(hydra.compose(command.page, overrides=command.overrides))
    except (HydraException, OmegaConfBaseException) as error:
        if without_effect := re.match(r"Could not override '([^']+)'", str(error)):
            raise ConfigError(_no_effect(without_effect[1])) from None
        cause = f" ({one_line(error.__cause__)})" if error.__cause__ else ""
        raise ConfigError(one_line(error) + cause) from None


def register_resolvers() -> None:
    """NeMo's own resolvers, so that a page means the same on ranks that don't import NeMo."""
    from omegaconf import OmegaConf

    OmegaConf.register_new_resolver("multiply", lambda x, y: x * y, replace=True)
    OmegaConf.register_new_resolver("sum", lambda x, y: x + y, replace=True)


def _no_effect(key: str) -> str:
    """A known key (others were refused before): new in a mapping, or below one that the chosen files set to null."""
    section = next((name for name in OPEN_MAPPINGS if key.startswith(name)), None)
    if section is not None:
        return f"{key}: what is new in a mapping is given with a plus, one by one: +{section}.NAME=VALUE"
    if key.startswith("model.lora."):
        return (
            f"{key}: adapters are given as a whole: 'model.lora={{rank: 16, alpha: 32, target_modules: [linear_qkv]}}'"
        )
    return (
        f"{key} has no effect here: a chosen file (algorithm=, experiment=) sets {key.rsplit('.', 1)[0]} to null. "
        f"Leave it out, or choose another; --cfg job shows what is composed"
    )


def compose_through_nemo(command: CommandLine) -> dict[str, Any]:
    """The same tree, composed by NeMo's ``hydra_runner``, which reads ``sys.argv``. Imports NeMo."""
    import_nemo()
    from nemo.core.config import hydra_runner

    found: list[dict[str, Any]] = []

    def keep(tree: Any) -> None:
        found.append(_resolve(tree))

    quiet_logging = "hydra.job_logging.root.level=WARNING"  # hydra_runner has all information printed on stdout
    words, sys.argv = sys.argv, [sys.argv[0], *command.overrides, quiet_logging]
    try:
        hydra_runner(config_path=str(command.directory), config_name=command.page)(keep)()
    finally:
        sys.argv = words
    return found[0]


def _check_same(tree: dict[str, Any], through_nemo: dict[str, Any]) -> None:
    """Rank 0 and the others must run the same configuration."""
    for key in sorted({*tree, *through_nemo}):
        if tree.get(key) != through_nemo.get(key):
            raise ConfigError(
                f"{key} is not the same each time it is composed: {tree.get(key)!r}, then {through_nemo.get(key)!r}. "
                "Ranks would disagree: leave out resolvers whose value changes, such as ${now:}"
            )


def _resolve(tree: Any) -> dict[str, Any]:
    from omegaconf import OmegaConf

    return OmegaConf.to_container(tree, resolve=True)


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
