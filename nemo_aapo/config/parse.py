"""From typed arguments and trees to a typed configuration: unknown keys, missing keys, wrong types.

``check_overrides`` looks at the command line before Hydra or NeMo are imported (seconds); ``parse`` at the composed
tree. Both name the nearest known key.
"""

from __future__ import annotations

from typing import Any

from nemo_aapo.config.build import build, check_limits, check_name, nearest
from nemo_aapo.config.checks import check_alone, check_date
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
    may_be_null = {setting.key for setting in settings_of(schema) if setting.section is not None}
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
            if argument.startswith("+"):
                raise ConfigError(f"{argument}: a choice is made without the +: {key}={value}")
            if "," in value:
                raise ConfigError(f"{argument}: one at a time. One run for each: scripts/launch.py sweep {argument}")
            if value not in groups[key]:
                raise ConfigError(f"{key}={value}: there is no such choice{nearest(value, groups[key])}")
            continue
        free_form = any(key.startswith(prefix + ".") for prefix in known)  # inside a dict or list
        if key not in known and key not in sections and not free_form:
            raise ConfigError(f"unknown setting {key!r}{nearest(key, [*known, *groups])}")
        if key in sections - may_be_null and not value.startswith(("{", "${")):
            raise ConfigError(f"{argument}: {key} is a section, whose settings are given one by one: {key}.NAME=VALUE")


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
    _check_evaluation(config)
    return config


def _check_evaluation(config: EvaluationConfig) -> None:
    """What an evaluation can be refused for by itself, before model and ranks are known."""
    check_limits(config)
    check_name(config.run.name, config.run.dir)
    check_date("date", config.date)
    sampling = config.sampling
    if sampling.temperature == 0 and config.samples > 1:
        raise ConfigError(f"samples={config.samples} with sampling.temperature=0: all of a problem would be the same")
    if "" in sampling.stop_strings:
        raise ConfigError("sampling.stop_strings holds an empty string, which would end every completion at once")
    longest = config.max_prompt_tokens + sampling.max_new_tokens
    if config.max_concurrent_tokens < longest:
        raise ConfigError(
            f"max_concurrent_tokens={config.max_concurrent_tokens} can't hold one sequence: max_prompt_tokens="
            f"{config.max_prompt_tokens} + sampling.max_new_tokens={sampling.max_new_tokens} = {longest}"
        )
    if len(config.rewards) != 1 or not config.rewards[0].get("name"):
        raise ConfigError(f"rewards={list(config.rewards)}: one that says right or wrong, as in [{{name: accuracy}}]")
    _check_benchmarks(config)


def _check_benchmarks(config: EvaluationConfig) -> None:
    if not config.benchmarks or len(set(config.benchmarks)) != len(config.benchmarks):
        raise ConfigError(f"benchmarks={list(config.benchmarks)}: at least one, and each only once")
    for name in config.benchmarks:
        if not config.sources.get(name):
            known = ", ".join(config.sources)
            raise ConfigError(f"benchmarks: {name!r} has no source; known are {known}. +sources.{name}=FILE names one")
