"""Words of a command -> the composed tree of settings, by Hydra, and from there to the typed configuration."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from nemo_aapo.config import Config, build, check_overrides, parse
from nemo_aapo.config.cluster import check_typed
from nemo_aapo.config.command_line import CommandLine, read_command_line
from nemo_aapo.config.schema.cluster import Cluster, Servers
from nemo_aapo.errors import ConfigError, one_line

OPEN_MAPPINGS = ("cluster.env", "cluster.sbatch_args", "data.template_arguments", "sources", "template_arguments")
"""Settings that take names of the user's own."""
_CHANGING = re.compile(r"\$\{\s*now\s*:")
"""The one resolver of Hydra whose value differs each time, and so between the ranks of a job."""


def load_config(overrides: Sequence[str]) -> Config:
    """The typed configuration of ``KEY=VALUE`` words, for Python programs of one's own.

    Raises:
        ConfigError: what the command line would be refused for.
    """
    return parse(compose(read_command_line(list(overrides))))


def compose(command: CommandLine) -> dict[str, Any]:
    """The resolved tree, composed by Hydra in a third of a second.

    Raises:
        ConfigError: a mistyped key or choice, what Hydra or OmegaConf refuse, a value that each rank would see another,
            a typed setting of ``cluster`` without effect where the ranks are started.
    """
    check_overrides(command.overrides, command.groups(), command.kind.schema)
    import hydra
    import yaml
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    register_resolvers()
    try:
        with hydra.initialize_config_dir(str(command.directory), version_base=None):
            tree = resolved(hydra.compose(command.config_file, overrides=command.overrides))
    except ConfigError:
        raise
    except (yaml.YAMLError, UnicodeError) as error:
        raise ConfigError(
            f"{command.directory / command.config_file}.yaml, or one it names: {one_line(error)}"
        ) from None
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        if without_effect := re.match(r"Could not override '([^']+)'", str(error)):
            raise ConfigError(_no_effect(without_effect[1])) from None
        raise ConfigError(_in_words(error)) from None
    if "cluster" in tree:
        check_typed(build(Cluster, tree["cluster"], "cluster"), command.overrides)
    return tree


def resolved(tree: Any) -> dict[str, Any]:
    """A composed tree as plain values.

    Args:
        tree: of OmegaConf, as Hydra or NeMo's ``hydra_runner`` hands it over; or plain already.

    Raises:
        ConfigError: a value that changes each time it is composed.
    """
    from omegaconf import OmegaConf

    if not OmegaConf.is_config(tree):
        return tree
    _refuse_changing(OmegaConf.to_container(tree, resolve=False))
    plain: Any = OmegaConf.to_container(tree, resolve=True)
    return dict(plain)


def register_resolvers() -> None:
    """NeMo's own resolvers, so that a page means the same without NeMo; and the number of a job's servers."""
    from omegaconf import OmegaConf

    OmegaConf.register_new_resolver("multiply", lambda x, y: x * y, replace=True)
    OmegaConf.register_new_resolver("sum", lambda x, y: x + y, replace=True)
    OmegaConf.register_new_resolver("servers_of", lambda servers: Servers(**servers).count, replace=True)


def _refuse_changing(value: Any, path: str = "") -> None:
    items: Any = ()
    if isinstance(value, Mapping):
        items = value.items()
    elif isinstance(value, list):
        items = enumerate(value)
    elif isinstance(value, str) and _CHANGING.search(value):
        raise ConfigError(
            f"{path}={value}: ${{now:}} is another value each time it is composed, and ranks would disagree. Write "
            "the value itself"
        )
    for key, inner in items:
        _refuse_changing(inner, f"{path}.{key}" if path else str(key))


def _in_words(error: Exception) -> str:
    """Hydra's words, without its hints at options that its own programs have, with what helps here."""
    said = one_line(error)
    if sweep := re.search(r"(?:argument|parameters?) '([^']*)'", said) if "--multirun" in said else None:
        key = sweep[1].partition("=")[0]
        return (
            f"{sweep[1]}: several values at once. A list is {key}=[A,B]; text with commas is quoted twice: "
            f"'{key}=\"A,B\"'; one run for each value: scripts/launch.py sweep {sweep[1]}"
        )
    if "override_grammar" in said:
        key, _, value = getattr(error, "override", "KEY=VALUE").partition("=")
        quoted = f"""'{key}=[{{NAME: "TEXT"}}]'""" if re.match(r"\[?\{\w+:", value) else f"""'{key}="{value}"'"""
        return (
            f"{key}={value}: can't be read. Text with ~, spaces, brackets, commas, = or letters beyond ASCII is quoted "
            f"twice: {quoted}"
        )
    return f"{said} ({one_line(error.__cause__)})" if error.__cause__ else said


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
