"""A plain tree as an instance of a dataclass: unknown keys, missing keys, wrong types, values out of range."""

from __future__ import annotations

import copy
import dataclasses
import difflib
import functools
import math
import operator
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

from nemo_aapo.config.schema.facts import facts_of, values_of, without_null
from nemo_aapo.errors import ConfigError
from nemo_aapo.utils.files import expanded

T = TypeVar("T")
_LONGEST_NAME = 128
"""Letters of a run's name: file systems take 255 bytes, and Slurm's logs and shards add to it."""
_LARGEST_INTEGER = 2**63 - 1
_LARGEST_NUMBER = 3e38  # what float32 holds, in which the learner computes


def build(cls: type[T], tree: Any, path: str = "") -> T:
    """A plain tree as an instance of a dataclass, field for field, by its annotations.

    Args:
        path: where the tree stands in a larger one, for messages.

    Raises:
        ConfigError: unknown key (naming the nearest), missing key, wrong type, an empty path.
    """
    if not isinstance(tree, dict):
        raise ConfigError(f"{path or 'the configuration'} must be a mapping, not {tree!r}")
    annotations, fields = typing.get_type_hints(cls), dataclasses.fields(cls)  # type: ignore[arg-type]
    hints = {field.name: annotations[field.name] for field in fields}
    paths = {field.name for field in fields if (facts := facts_of(field)) and facts.path}
    for key in tree:
        if key not in hints:
            full = f"{path}.{key}" if path else str(key)
            known = [f"{path}.{name}" if path else name for name in hints]
            raise ConfigError(f"unknown setting {full!r}{nearest(full, known)}")
    values = {}
    none = dataclasses.MISSING
    optional = {field.name for field in fields if field.default is not none or field.default_factory is not none}
    for name, annotation in hints.items():
        full = f"{path}.{name}" if path else name
        if name in optional and name not in tree:
            continue
        if name not in tree or tree[name] == "???":
            raise ConfigError(f"{full} must be set: {full}=VALUE")
        values[name] = _convert(tree[name], annotation, full)
        if name in paths:
            values[name] = _with_home(values[name], full)
    return cls(**values)


_PATHS_OF_ENTRIES = ("path", "function")
"""What is a path in the mapping of a source of prompts, and in that of a reward."""


def _with_home(value: Any, named: str) -> Any:
    """The value of a setting that is a path, several, or mappings that hold some, with the home directory for ``~``.

    Raises:
        ConfigError: a path is empty.
    """
    if isinstance(value, str):
        return expanded(value, named)
    if isinstance(value, tuple):
        return tuple(_with_home(item, f"{named}[{i}]") for i, item in enumerate(value))
    if isinstance(value, dict):
        return {
            key: _with_home(item, f"{named}.{key}") if key in _PATHS_OF_ENTRIES else item for key, item in value.items()
        }
    return value


def with_paths(tree: Mapping[str, Any], config: Any) -> dict[str, Any]:
    """The tree that a configuration was built of, with its paths as they are there: other homes change no ``~``."""
    made = copy.deepcopy(dict(tree))
    for key, facts, value in values_of(config):
        if facts.path and value is not None:
            *sections, leaf = key.split(".")
            functools.reduce(operator.getitem, sections, made)[leaf] = (
                list(value) if isinstance(value, tuple) else value
            )
    return made


LEAST_TEMPERATURE = 0.01
"""Logits divided by less overflow to no distribution at all."""


def check_limits(config: Any) -> None:
    """Refuse values outside the limits that the facts of their settings name.

    Args:
        config: an instance of a schema class.

    Raises:
        ConfigError: the key, its value, the limits.
    """
    for key, facts, value in values_of(config):
        if complaint := facts.complaint(value):
            shown = list(value) if isinstance(value, tuple) else value
            raise ConfigError(f"{key}={shown}: must be {complaint}")
        if key.endswith("temperature") and 0 < value < LEAST_TEMPERATURE:
            raise ConfigError(f"{key}={value}: must be at least {LEAST_TEMPERATURE}; 0 takes the likeliest token")


def check_name(name: str, directory: str) -> None:
    """Refuse a name that is no name of a folder below ``results/``, and a run directory that is none.

    Raises:
        ConfigError: an empty name, ``..``, one that file systems don't take.
    """
    parts = name.split("/")
    if not all(part.strip() for part in parts) or {".", ".."} & set(parts):
        raise ConfigError(f"run.name={name!r}: it names the run's own folder; letters and digits are needed")
    if longest := max(parts, key=len)[_LONGEST_NAME:]:
        raise ConfigError(f"run.name: {len(longest) + _LONGEST_NAME} letters are too many, at most {_LONGEST_NAME}")
    if Path(directory.strip()).name in ("", ".."):
        raise ConfigError(f"run.dir={directory!r}: it must name the run's own folder")


NAMES_ELSEWHERE = {
    "batch_size": "prompts_per_step",
    "beta": "algorithm.kl_coefficient",
    "bf16": "precision",
    "dataset": "data.train",
    "eval_steps": "trainer.val_check_interval",
    "kl_coef": "algorithm.kl_coefficient",
    "learning_rate": "model.optim.lr",
    "max_completion_length": "rollout.max_new_tokens",
    "max_num_steps": "trainer.max_steps",
    "max_prompt_length": "data.max_prompt_tokens",
    "max_response_length": "rollout.max_new_tokens",
    "max_tokens": "rollout.max_new_tokens",
    "model_name": "model.path",
    "model_name_or_path": "model.path",
    "num_generations": "group_size",
    "num_generations_per_prompt": "group_size",
    "num_iterations": "algorithm.updates_per_rollout",
    "num_prompts_per_step": "prompts_per_step",
    "output_dir": "run.dir",
    "per_device_train_batch_size": "prompts_per_step",
    "save_steps": "checkpoint.save_interval",
    "train_batch_size": "prompts_per_step",
    "train_file": "data.train",
    "warmup_ratio": "model.optim.sched.warmup_steps",
}
"""What other trainers (TRL, verl, NeMo-RL) call a setting -> its key here."""


def nearest(typed: str, known: Sequence[str]) -> str:
    """The end of a message: `` (did you mean ...?)``, by whole key first, then by its last part."""
    elsewhere = NAMES_ELSEWHERE.get(typed.rpartition(".")[2])
    if elsewhere in known:
        return f" (did you mean {elsewhere!r}?)"
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
    if origin is list and isinstance(value, list | tuple):
        return [_convert(item, typing.get_args(inner)[0], f"{path}[{i}]") for i, item in enumerate(value)]
    if origin is dict and isinstance(value, dict):
        return dict(value)
    if inner is Any or (inner in (list, dict) and isinstance(value, inner)):  # of a class of the user's
        return value
    return _convert_plain(value, inner, path)


def _convert_plain(value: Any, plain: Any, path: str) -> Any:
    """A flag, a number or a text."""
    if isinstance(value, bool):
        if plain is bool:
            return value
    elif plain is int and isinstance(value, int) and abs(value) <= _LARGEST_INTEGER:
        return value
    elif plain is float and isinstance(value, int | float) and abs(value) <= _LARGEST_NUMBER:  # NaN is not either
        return float(value)
    elif plain is str and isinstance(value, str | int | float) and _is_text(str(value)):
        return str(value)
    if (
        isinstance(value, int | float)
        and not isinstance(value, bool)
        and plain in (int, float)
        and _LARGEST_INTEGER < abs(value) < math.inf
    ):
        raise ConfigError(f"{path}={value!r:.30}: too large a number")
    expected = getattr(plain, "__name__", str(plain)).replace("tuple", "list").replace("dict", "mapping")
    raise ConfigError(f"{path}={value!r}: a value of type {expected} is needed")


def _is_text(value: str) -> bool:
    """Whether files and paths can hold it: no NUL, nothing that UTF-8 has no code for."""
    return "\0" not in value and not any("\ud800" <= letter <= "\udfff" for letter in value)


def _fitting(annotation: Any, value: Any) -> tuple[Any, bool]:
    """The member of a union that a value is meant for, and whether None is one; a mapping stands for a list of one."""
    if typing.get_origin(annotation) not in (types.UnionType, typing.Union):
        return annotation, False
    members = typing.get_args(annotation)
    lists = [part for part in members if typing.get_origin(part) is tuple]
    words = [part for part in members if typing.get_origin(part) is Literal]
    if lists and isinstance(value, list | tuple | dict):
        return lists[0], type(None) in members
    if words and isinstance(value, str):
        return words[0], type(None) in members
    return without_null(annotation), type(None) in members
