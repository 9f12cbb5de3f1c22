"""From typed words and trees to a typed configuration: unknown keys, missing keys, wrong types.

``check_overrides`` looks at the command line before Hydra or NeMo are imported (seconds); ``parse`` at the composed
tree. Both name the nearest known key.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
import typing
from typing import Any, Literal

from nemo_aapo.config.checks import check_alone
from nemo_aapo.config.evaluation import EvaluationConfig, check_evaluation
from nemo_aapo.config.schema import Config
from nemo_aapo.errors import ConfigError


def check_overrides(overrides: list[str], groups: dict[str, list[str]], schema: type = Config) -> None:
    """Refuse mistyped keys and choices on the command line, naming the nearest known one.

    Args:
        overrides: ``KEY=VALUE`` words as typed (``+``, ``++`` and ``~`` prefixes as in Hydra).
        groups: folder of ``conf/`` -> the names that it offers.
        schema: what the page may hold.

    Raises:
        ConfigError: unknown key or choice.
    """
    known = [path for path, _ in _leaves(schema)]
    sections = {path.rsplit(".", i)[0] for path in known for i in range(1, path.count(".") + 1)}
    for word in overrides:
        key, equals, value = word.partition("=")
        key = key.lstrip("+~")
        if not equals and not word.startswith("~"):
            raise ConfigError(f"{word!r} is not of the form KEY=VALUE")
        if key.startswith("hydra"):
            continue
        if key in groups:
            if value not in (*groups[key], "null"):
                raise ConfigError(f"{key}={value}: there is no such choice{_nearest(value, groups[key])}")
            continue
        free_form = any(key.startswith(prefix + ".") for prefix in known)  # inside a dict or list
        if key not in known and key not in sections and not free_form:
            raise ConfigError(f"unknown setting {key!r}{_nearest(key, [*known, *groups])}")


def _nearest(word: str, known: list[str]) -> str:
    """`` (did you mean ...?)``, by whole key first, then by its last part."""
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    if "." not in word:
        by_leaf = {path.rsplit(".", 1)[-1]: path for path in known}
        leaf = difflib.get_close_matches(word, list(by_leaf), n=1, cutoff=0.75)
        close = [by_leaf[leaf[0]]] if leaf else close
    sections = sorted({path.split(".")[0] for path in known})
    return f" (did you mean {close[0]!r}?)" if close else f"; known are {', '.join(sections)}"


def _leaves(cls: type, prefix: str = "") -> list[tuple[str, Any]]:
    """(dotted key, type) of every setting below a schema class."""
    found: list[tuple[str, Any]] = []
    for name, annotation in typing.get_type_hints(cls).items():
        inner = _unwrap_optional(annotation)
        if dataclasses.is_dataclass(inner):
            found += _leaves(inner, f"{prefix}{name}.")
        else:
            found.append((prefix + name, annotation))
    return found


def parse(tree: dict[str, Any]) -> Config:
    """A resolved plain tree -> the typed configuration, checked as far as it can be by itself.

    Raises:
        ConfigError: unknown key (naming the nearest), missing key, wrong type, or a combination that can't work.
    """
    config = build(Config, tree)
    check_alone(config)
    return config


def parse_evaluation(tree: dict[str, Any]) -> EvaluationConfig:
    """The same for an evaluation."""
    config = build(EvaluationConfig, tree)
    check_evaluation(config)
    return config


def build(cls: type, tree: Any, path: str = "") -> Any:
    """A plain tree as an instance of a dataclass, field for field, by its annotations.

    Args:
        path: where the tree stands in a larger one, for messages.

    Raises:
        ConfigError: unknown key (naming the nearest), missing key, wrong type.
    """
    if not isinstance(tree, dict):
        raise ConfigError(f"{path or 'the configuration'} must be a mapping, not {tree!r}")
    hints = typing.get_type_hints(cls)
    for key in tree:
        if key not in hints:
            full = f"{path}.{key}" if path else str(key)
            known = [f"{path}.{name}" if path else name for name in hints]
            raise ConfigError(f"unknown setting {full!r}{_nearest(full, known)}")
    values = {}
    for name, annotation in hints.items():
        full = f"{path}.{name}" if path else name
        if name not in tree or tree[name] == "???":
            raise ConfigError(f"{full} must be set: {full}=VALUE")
        values[name] = _convert(tree[name], annotation, full)
    return cls(**values)


def _unwrap_optional(annotation: Any) -> Any:
    if isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is typing.Union:
        inner = [part for part in typing.get_args(annotation) if part is not type(None)]
        return inner[0]
    return annotation


def _fitting(annotation: Any, value: Any) -> tuple[Any, bool]:
    """The member of a union that a value is meant for, and whether None is one; a mapping stands for a list of one."""
    if typing.get_origin(annotation) not in (types.UnionType, typing.Union):
        return annotation, False
    members = [part for part in typing.get_args(annotation) if part is not type(None)]
    lists = [part for part in members if typing.get_origin(part) is tuple]
    chosen = lists[0] if lists and isinstance(value, list | tuple | dict) else members[0]
    return chosen, type(None) in typing.get_args(annotation)


def _convert(value: Any, annotation: Any, path: str) -> Any:
    inner, optional = _fitting(annotation, value)
    if value is None and optional:
        return None
    if dataclasses.is_dataclass(inner):
        return build(inner, value, path)
    origin = typing.get_origin(inner)
    if origin is Literal:
        choices = typing.get_args(inner)
        if value not in choices:
            known = ", ".join(str(choice) for choice in choices)
            raise ConfigError(f"{path}={value!r}: known values are {known}")
        return value
    if origin is tuple and inner is not annotation and isinstance(value, dict):
        value = [value]
    if origin is tuple and isinstance(value, list | tuple):
        element = typing.get_args(inner)[0]
        return tuple(_convert(item, element, f"{path}[{i}]") for i, item in enumerate(value))
    if origin is dict and isinstance(value, dict):
        return dict(value)
    plain = inner if isinstance(inner, type) else None
    if plain is bool and isinstance(value, bool):
        return value
    if plain is int and isinstance(value, int) and not isinstance(value, bool):
        return value
    if plain is float and isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        return float(value)
    if plain is str and isinstance(value, str | int | float) and not isinstance(value, bool):
        return str(value)
    expected = getattr(inner, "__name__", str(inner)).replace("tuple", "list").replace("dict", "mapping")
    raise ConfigError(f"{path}={value!r}: a value of type {expected} is needed")
