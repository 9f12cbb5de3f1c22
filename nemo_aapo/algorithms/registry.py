"""Algorithms by name, and those of a user's own file. Imports none of them until one is asked for."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nemo_aapo.algorithms.base import Algorithm
from nemo_aapo.config.build import build
from nemo_aapo.config.schema import AlgorithmConfig
from nemo_aapo.errors import ConfigError, one_line
from nemo_aapo.utils.libraries import load_file

BUILT_IN = {
    "aapo": "AAPO",
    "gpg": "GPG",
    "grpo": "GRPO",
    "dr_grpo": "DrGRPO",
    "dapo": "DAPO",
    "gspo": "GSPO",
    "cispo": "CISPO",
    "rloo": "RLOO",
    "reinforce_pp": "ReinforcePP",
}
"""``algorithm.name`` -> its class, in the module of that name in ``algorithms/builtin``."""


def check_name(settings: AlgorithmConfig) -> None:
    """Refuse a name that no algorithm has, unless there is a class of the user's own.

    Raises:
        ConfigError: names the nearest.
    """
    if settings.custom is None and settings.name not in BUILT_IN:
        near = difflib.get_close_matches(settings.name, BUILT_IN, n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else f"; known are {', '.join(BUILT_IN)}"
        raise ConfigError(f"algorithm.name={settings.name!r}: there is no such algorithm{hint}")


def algorithm_of(settings: AlgorithmConfig) -> Algorithm:
    """The algorithm that settings name. A built-in takes its fields from the settings of the same names.

    Raises:
        ConfigError: no such algorithm, file or class; settings of the user's own class that do not fit.
    """
    check_name(settings)
    if settings.custom is not None:
        return own_algorithm(settings.custom, settings.settings)
    kind = built_in(settings.name)
    return kind(**{field.name: getattr(settings, field.name) for field in dataclasses.fields(kind)})  # type: ignore[arg-type]


def built_in(name: str) -> type[Algorithm]:
    """The class of a built-in algorithm."""
    kind: type[Algorithm] = getattr(importlib.import_module(f"nemo_aapo.algorithms.builtin.{name}"), BUILT_IN[name])
    return kind


def paper_of(name: str) -> str:
    """Name and source of an algorithm in Markdown; the name alone of one that is not built in."""
    return (name in BUILT_IN and built_in(name).paper) or name


def own_algorithm(path: str, settings: Mapping[str, Any] | None) -> Algorithm:
    """An algorithm of a user's own, with its settings checked as those of the product are.

    Args:
        path: ``path/to/file.py:MyClass`` or ``package.module:MyClass``.
        settings: values of the class's fields.

    Raises:
        ConfigError: what is wrong with file, class or settings.
    """
    kind = _own_class(path)
    try:
        return build(kind, dict(settings or {}), "algorithm.settings")
    except ConfigError:
        raise
    except Exception as error:  # of the class's own __post_init__, or of its annotations
        said = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        raise ConfigError(
            f"algorithm.settings={dict(settings or {})} of algorithm.custom={path}: {said}{one_line(error)}"
        ) from error


@functools.cache
def _own_class(path: str) -> type[Algorithm]:
    where = f"algorithm.custom={path}"
    module, _, name = path.rpartition(":")
    if not module or not name.isidentifier():
        raise ConfigError(f"{where}: 'path/to/file.py:MyClass' or 'package.module:MyClass' is needed")
    if module.endswith(".py") and not Path(module).is_file():
        raise ConfigError(f"{where}: there is no file {module} (working directory: {Path.cwd()})")
    try:
        loaded = load_file(Path(module)) if module.endswith(".py") else importlib.import_module(module)
    except (Exception, SystemExit) as error:  # whatever importing a user's file raises
        raise ConfigError(f"{where}: importing it failed with {type(error).__name__}: {one_line(error)}") from error
    kind = getattr(loaded, name, None)
    if not isinstance(kind, type):
        names = [key for key, value in vars(loaded).items() if isinstance(value, type)]
        near = difflib.get_close_matches(name, names, n=1)
        raise ConfigError(f"{where}: {module} has no class {name!r}{f'; did you mean {near[0]!r}?' if near else ''}")
    parameters = getattr(kind, "__dataclass_params__", None)  # its own, or those of what it inherits from
    if not issubclass(kind, Algorithm) or parameters is None or not parameters.frozen:
        raise ConfigError(
            f"{where}: {name} must be a frozen dataclass that inherits from nemo_aapo.Algorithm, as in "
            "@dataclass(frozen=True) class MyClass(Algorithm)"
        )
    if missing := sorted(kind.__abstractmethods__):
        raise ConfigError(f"{where}: {name} has no {' and no '.join(missing)}: an algorithm has both hooks")
    return kind
