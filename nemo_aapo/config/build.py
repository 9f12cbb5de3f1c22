"""A plain tree as an instance of a dataclass: unknown keys, missing keys, wrong types, values out of range."""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Sequence
from typing import Any, Literal, TypeVar

from nemo_aapo.config.schema.facts import values_of, without_null
from nemo_aapo.errors import ConfigError

T = TypeVar("T")


def build(cls: type[T], tree: Any, path: str = "") -> T:
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
            raise ConfigError(f"unknown setting {full!r}{nearest(full, known)}")
    values = {}
    for name, annotation in hints.items():
        full = f"{path}.{name}" if path else name
        if name not in tree or tree[name] == "???":
            raise ConfigError(f"{full} must be set: {full}=VALUE")
        values[name] = _convert(tree[name], annotation, full)
    return cls(**values)


def check_limits(config: Any) -> None:
    """Refuse values outside the limits that the facts of their settings name.

    Args:
        config: an instance of a schema class.

    Raises:
        ConfigError: the key, its value, the limits.
    """
    for key, facts, value in values_of(config):
        if value is not None and facts.limits and not facts.allow(value):
            raise ConfigError(f"{key}={value}: must be {facts.limits}")


def nearest(typed: str, known: Sequence[str]) -> str:
    """The end of a message: `` (did you mean ...?)``, by whole key first, then by its last part."""
    close = difflib.get_close_matches(typed, known, n=1, cutoff=0.5)
    if "." not in typed:
        by_leaf = {path.rsplit(".", 1)[-1]: path for path in known}
        leaf = difflib.get_close_matches(typed, list(by_leaf), n=1, cutoff=0.75)
        close = [by_leaf[leaf[0]]] if leaf else close
    sections = sorted({path.split(".")[0] for path in known})
    return f" (did you mean {close[0]!r}?)" if close else f"; known are {', '.join(sections)}"


def _convert(value: Any, annotation: Any, path: str) -> Any:
    inner, optional = _fitting(annotation, value)
    if value is None and optional:
        return None
    if isinstance(inner, type) and dataclasses.is_dataclass(inner):
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
    return _convert_plain(value, inner, path)


def _convert_plain(value: Any, plain: Any, path: str) -> Any:
    """A flag, a number or a text."""
    if isinstance(value, bool):
        if plain is bool:
            return value
    elif plain is int and isinstance(value, int):
        return value
    elif plain is float and isinstance(value, int | float) and math.isfinite(value):
        return float(value)
    elif plain is str and isinstance(value, str | int | float):
        return str(value)
    expected = getattr(plain, "__name__", str(plain)).replace("tuple", "list").replace("dict", "mapping")
    raise ConfigError(f"{path}={value!r}: a value of type {expected} is needed")


def _fitting(annotation: Any, value: Any) -> tuple[Any, bool]:
    """The member of a union that a value is meant for, and whether None is one; a mapping stands for a list of one."""
    if typing.get_origin(annotation) not in (types.UnionType, typing.Union):
        return annotation, False
    members = typing.get_args(annotation)
    lists = [part for part in members if typing.get_origin(part) is tuple]
    chosen = lists[0] if lists and isinstance(value, list | tuple | dict) else without_null(annotation)
    return chosen, type(None) in members
