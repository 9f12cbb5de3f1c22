"""Rewards by name, which judge completions; ``nemo_aapo.rewards.workers.runner.RewardRunner`` runs them."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any

from nemo_aapo.errors import ConfigError
from nemo_aapo.rewards.base import Reward
from nemo_aapo.rewards.custom import Custom
from nemo_aapo.rewards.gym import ReasoningGym
from nemo_aapo.rewards.http import Http
from nemo_aapo.rewards.matching import Exact, Integer, MultipleChoice
from nemo_aapo.rewards.math import Accuracy
from nemo_aapo.rewards.shaping import Cosine, Format, Overlong, Repetition, TagCount

_VERIFIERS = (Accuracy, Integer, Exact, MultipleChoice, ReasoningGym)
_SHAPING = (Format, TagCount, Cosine, Overlong, Repetition)
_OWN = (Custom, Http)
REWARDS: dict[str, type[Reward]] = {c.kind: c for c in (*_VERIFIERS, *_SHAPING, *_OWN)}


def build_reward(config: Mapping[str, Any]) -> Reward:
    """A reward from its configuration, such as ``{"name": "cosine", "max_tokens": 3584}``.

    Raises:
        ValueError: no name, an unknown name or parameter (the nearest is named), a missing or an impossible parameter.
    """
    parameters = dict(config)
    if "name" not in parameters:
        raise ValueError(f"a reward needs a name (known: {', '.join(REWARDS)}), got {parameters}")
    name = parameters.pop("name")
    if name not in REWARDS:
        raise ValueError(f"unknown reward {name!r}{_nearest(name, REWARDS)} (known: {', '.join(REWARDS)})")
    fields = _parameters(REWARDS[name])
    for key in parameters:
        if key not in fields:
            known = ", ".join(fields) or "none"
            raise ValueError(f"reward {name!r} has no parameter {key!r}{_nearest(key, fields)} (it has: {known})")
    missing = [k for k, f in fields.items() if f.default is dataclasses.MISSING and k not in parameters]
    if missing:
        raise ValueError(f"reward {name!r} needs {', '.join(missing)}")
    return REWARDS[name](**parameters)


def reward_of(entry: Mapping[str, Any]) -> tuple[Reward, float]:
    """Reward and weight of one entry of ``rewards`` in a configuration.

    Raises:
        ConfigError: unknown name or parameter.
    """
    try:
        reward = build_reward({key: value for key, value in entry.items() if key != "weight"})
    except ValueError as error:
        raise ConfigError(f"rewards: {error}") from error
    return reward, float(entry.get("weight", 1.0))


def reward_config(reward: Reward) -> dict[str, Any]:
    """The configuration that ``build_reward`` makes an equal reward from; plain values, fit for JSON and digests."""
    if not dataclasses.is_dataclass(reward):
        raise TypeError(
            f"reward {reward.name}: {type(reward).__name__} is not a dataclass, so that it has no parameters"
        )
    return {"name": reward.kind, **dataclasses.asdict(reward)}


def _parameters(kind: type[Reward]) -> dict[str, dataclasses.Field[Any]]:
    assert dataclasses.is_dataclass(kind)
    return {field.name: field for field in dataclasses.fields(kind)}


def _nearest(name: object, known: Mapping[str, Any]) -> str:
    near = difflib.get_close_matches(str(name), known, n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else ""
