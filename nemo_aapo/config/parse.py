"""From typed arguments and trees to a typed configuration: unknown keys, missing keys, wrong types.

``check_overrides`` looks at the command line before Hydra or NeMo are imported (seconds); ``parse`` at the composed
tree. Both name the nearest known key.
"""

from __future__ import annotations

from typing import Any

from nemo_aapo.config.build import build, nearest
from nemo_aapo.config.checks import check_alone
from nemo_aapo.config.evaluation import check_evaluation
from nemo_aapo.config.schema import Config, EvaluationConfig
from nemo_aapo.config.schema.facts import settings_of
from nemo_aapo.errors import ConfigError


def check_overrides(overrides: list[str], groups: dict[str, list[str]], schema: type = Config) -> None:
    """Refuse mistyped keys and choices on the command line, naming the nearest known one.

    Args:
        overrides: ``KEY=VALUE`` arguments as typed (``+``, ``++`` and ``~`` prefixes as in Hydra).
        groups: folder of ``conf/`` -> the names that it offers.
        schema: what the config file may hold.

    Raises:
        ConfigError: unknown key or choice.
    """
    known = [setting.key for setting in settings_of(schema) if setting.section is None]
    sections = {key.rsplit(".", i)[0] for key in known for i in range(1, key.count(".") + 1)}
    for argument in overrides:
        key, equals, value = argument.partition("=")
        key = key.lstrip("+~")
        if not equals and not argument.startswith("~"):
            raise ConfigError(f"{argument!r} is not of the form KEY=VALUE")
        if key.startswith("hydra"):
            continue
        if key in groups:
            if argument.startswith("~") or value in ("", "null"):
                names = ", ".join(groups[key])
                raise ConfigError(f"{argument}: a choice can't be taken away. Leave it out, or choose one of {names}")
            if "," in value:
                raise ConfigError(f"{argument}: one at a time. One run for each: scripts/launch.py sweep {argument}")
            if value not in groups[key]:
                raise ConfigError(f"{key}={value}: there is no such choice{nearest(value, groups[key])}")
            continue
        free_form = any(key.startswith(prefix + ".") for prefix in known)  # inside a dict or list
        if key not in known and key not in sections and not free_form:
            raise ConfigError(f"unknown setting {key!r}{nearest(key, [*known, *groups])}")


def parse(tree: dict[str, Any]) -> Config:
    """A resolved plain tree -> the typed configuration, checked as far as it can be by itself.

    Raises:
        ConfigError: unknown key (naming the nearest), missing key, wrong type, or a combination that can't work.
    """
    config = build(Config, tree)
    check_alone(config)
    return config


def parse_evaluation(tree: dict[str, Any]) -> EvaluationConfig:
    """A resolved plain tree -> the typed configuration of an evaluation, checked as far as it can be by itself.

    Raises:
        ConfigError: as ``parse``.
    """
    config = build(EvaluationConfig, tree)
    check_evaluation(config)
    return config
