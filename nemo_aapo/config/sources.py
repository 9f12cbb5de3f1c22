"""Where prompts come from: the sources that ``data.train`` and ``data.validation`` name, checked."""

from __future__ import annotations

import dataclasses
import math
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from nemo_aapo.config.build import build
from nemo_aapo.config.schema import Config, Data
from nemo_aapo.errors import ConfigError

AnswerForm = Literal["auto", "boxed"]
"""``"auto"``: the answer as it stands, or what is behind GSM8K's last ``####``. ``"boxed"``: a worked solution, whose
last ``\\boxed{}`` holds the answer."""

GYM = "reasoning_gym:"
"""A path that begins so names a task of reasoning-gym and no file."""
_BLIND_TO_TASKS = ("accuracy", "integer", "exact", "multiple_choice", "cosine")
"""Rewards that compare with a gold answer, where that of a task only says which item it is."""
TEXT_FORMATS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv")
"""Endings of files of text that are read, also with ``.gz`` behind."""
BINARY_FORMATS = (".parquet", ".arrow")
FILE_FORMATS = TEXT_FORMATS + BINARY_FORMATS
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


@dataclass(frozen=True)
class Source:
    """One source of prompts, and where in its rows question and answer stand."""

    path: str
    """A file, a directory, a name on the Hugging Face hub (``org/name``), or ``reasoning_gym:TASK``."""
    prompt_field: str = "question"
    """Field with the question: text, or a list of chat messages. Dots lead into nested rows: ``reward_model.x``."""
    answer_field: str = "answer"
    """Field with the gold answer."""
    answer_form: AnswerForm = "auto"
    subset: str | None = None
    """Which configuration of a hub data set that has several, such as ``main``."""
    split: str | None = None
    """Which split of a data set that has several; None: ``train``, of held-out prompts ``test`` or ``validation``."""
    weight: float = 1.0
    """Share of a step's prompts, relative to the other sources."""
    size: int | None = None
    """reasoning-gym: so many items; None: no end."""
    seed: int = 0
    """reasoning-gym: which items; training and validation need seeds of their own."""
    parameters: dict[str, Any] = field(default_factory=dict)
    """reasoning-gym: the task's own settings."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "path", os.path.expanduser(self.path))

    @property
    def task(self) -> str | None:
        """The reasoning-gym task; None for any other source."""
        return self.path.removeprefix(GYM) if self.path.startswith(GYM) else None

    @property
    def on_hub(self) -> bool:
        """Whether the path can only be a name on the hub."""
        is_file = self.path.lower().removesuffix(".gz").endswith(FILE_FORMATS)
        return not is_file and bool(_HUB_NAME.fullmatch(self.path)) and not Path(self.path).exists()

    @property
    def endless(self) -> bool:
        """Whether it makes new prompts for ever."""
        return self.task is not None and self.size is None


def sources_of(data: Data, what: Literal["train", "validation"]) -> tuple[Source, ...]:
    """The sources of ``data.train`` or ``data.validation``; what an entry doesn't say itself it takes from ``data``.

    Raises:
        ConfigError: an unknown key (the nearest is named), a wrong type, a setting without effect.
    """
    value = getattr(data, what)
    entries = ({"path": value},) if isinstance(value, str) else value
    defaults = {name: getattr(data, name) for name in ("prompt_field", "answer_field", "answer_form")}
    return tuple(_source(entry, defaults, f"data.{what}[{i}]") for i, entry in enumerate(entries))


def _source(entry: dict[str, Any], defaults: dict[str, Any], where: str) -> Source:
    filled = {f.name: _default(f) for f in dataclasses.fields(Source) if f.name != "path"}
    source = build(Source, {**filled, **defaults, **entry}, where)
    if source.task is None:
        for key in ("size", "seed", "parameters"):
            if key in entry:
                raise ConfigError(f"{where}.{key} has an effect with {GYM}TASK only, not with {source.path}")
    else:
        for key in ("prompt_field", "answer_field", "answer_form", "subset", "split"):
            if key in entry:
                raise ConfigError(f"{where}.{key} has no effect with {source.path}: a task has no fields")
    if not (source.weight > 0 and math.isfinite(source.weight)):
        raise ConfigError(f"{where}.weight={source.weight}: must be above 0")
    if source.size is not None and source.size < 1:
        raise ConfigError(f"{where}.size={source.size}: must be at least 1")
    return source


def _default(item: dataclasses.Field[Any]) -> Any:
    if item.default_factory is not dataclasses.MISSING:
        return item.default_factory()
    return item.default


def check_data(config: Config) -> None:
    """Refuse settings of ``data`` that can't work or do nothing.

    Raises:
        ConfigError: names the key, its value and the reason.
    """
    data = config.data
    train, validation = sources_of(data, "train"), sources_of(data, "validation")
    for name, sources in (("train", train), ("validation", validation)):
        if not sources:
            raise ConfigError(f"data.{name} is an empty list: name at least one source")
    if "{question}" not in data.prompt_template:
        raise ConfigError(f"data.prompt_template={data.prompt_template!r}: it must hold {{question}}")
    if len(train) == 1 and train[0].weight != 1:
        raise ConfigError(f"data.train[0].weight={train[0].weight} has no effect: there is one source")
    for i, source in enumerate(validation):
        if source.weight != 1:
            raise ConfigError(f"data.validation[{i}].weight has no effect: all held-out prompts are taken")
        if source.endless:
            raise ConfigError(
                f"data.validation[{i}].path={source.path} has no end: set its size, and a seed of its own"
            )
        if any((source.path, source.seed) == (other.path, other.seed) for other in train if source.task):
            raise ConfigError(f"data.validation[{i}] holds the items of data.train: give it another seed")
    blind = [entry["name"] for entry in config.rewards if entry.get("name") in _BLIND_TO_TASKS]
    for source in (*train, *validation):
        if source.task and blind:
            raise ConfigError(
                f"rewards: {', '.join(blind)} can't judge the answers of {source.path}, which its own verifier knows: "
                "rewards='[{name: reasoning_gym}]' validation.reward=reasoning_gym"
            )
    endless = [source.path for source in train if source.endless]
    if data.sampling != "uniform" and endless:
        raise ConfigError(
            f"data.sampling={data.sampling} goes by the accuracy at prompts that come again, and {endless[0]} makes "
            "new ones for ever: set its size, or data.sampling=uniform"
        )
    if data.sampling != "uniform" and not data.shuffle:
        raise ConfigError(f"data.shuffle=false has no effect with data.sampling={data.sampling}, which picks at random")
