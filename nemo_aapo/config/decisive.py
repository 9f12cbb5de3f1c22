"""What decides the result of a run: the settings whose facts say so, with model and data as what they hold."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Mapping
from typing import Any

from nemo_aapo.config.schema import Config
from nemo_aapo.config.schema.facts import Facts, settings_of

Identity = Mapping[str, Any]
"""Dotted key of a setting that names files -> a plain value in which digests of their contents stand for the paths.
``END_TOKENS`` is no setting, but decides like one."""
END_TOKENS = "model.end_tokens"


def decisive_settings(config: Config, identity: Identity | None = None) -> dict[str, Any]:
    """The settings that decide the result of a run, as a plain tree.

    Left out is what may change between the parts of one run: where it runs and is cut up, how long it goes on, how
    often it validates and saves, and where it logs.

    Args:
        identity: of model and data; None leaves their paths.
    """
    tree = _decisive(dataclasses.asdict(config), config, _facts(), "")
    for key, value in (identity or {}).items():
        *sections, name = key.split(".")
        inner = tree
        for section in sections:
            inner = inner[section]
        inner[name] = value
    return tree


def digest(config: Config, identity: Identity | None = None) -> str:
    """Digest of what decides the result of a run (``decisive_settings``): 16 hex digits."""
    text = json.dumps(decisive_settings(config, identity), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def digests_of_run(config: Config, identity: Identity) -> tuple[str, ...]:
    """The digest that a run and its checkpoints get, and those that they got before.

    That was when paths stood for what they hold, and later without what ends completions.
    """
    contents = {key: value for key, value in identity.items() if key != END_TOKENS}
    return tuple(dict.fromkeys([digest(config, identity), digest(config), digest(config, contents)]))


@functools.cache
def _facts() -> dict[str, Facts]:
    return {setting.key: setting.facts for setting in settings_of(Config)}


@functools.cache
def _below(section: str) -> tuple[str, ...]:
    """The settings below a dotted key, which ends with a dot."""
    return tuple(key for key in _facts() if key.startswith(section))


def _decisive(tree: dict[str, Any], config: Config, facts: Mapping[str, Facts], prefix: str) -> dict[str, Any]:
    """The part of a section that decides; a section of which something could decide stays, be it empty."""
    found = {}
    for name, value in tree.items():
        key = f"{prefix}{name}"
        if key in facts and (value is None or not _below(f"{key}.")):
            if _decides(facts[key], value, config):
                found[name] = value
        elif any(facts[other].decides for other in _below(f"{key}.")):
            found[name] = _decisive(value, config, facts, f"{key}.")
    return found


def _decides(facts: Facts, value: Any, config: Config) -> bool:
    if isinstance(facts.decides, bool):
        return facts.decides
    if facts.decides == "set":
        return bool(value)
    other: Any = config
    key, wanted = facts.decides
    for part in key.split("."):
        other = getattr(other, part)
    return other == wanted
