"""Words of a command -> the composed tree of settings, by Hydra."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from typing import Any

from nemo_aapo.config import Config, check_overrides, parse
from nemo_aapo.config.command_line import CommandLine, read_command_line
from nemo_aapo.errors import ConfigError, one_line
from nemo_aapo.utils.libraries import import_nemo

OPEN_MAPPINGS = ("cluster.env", "cluster.sbatch_args", "sources")
"""Settings that take names of the user's own."""


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


def check_same(tree: dict[str, Any], through_nemo: dict[str, Any]) -> None:
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
