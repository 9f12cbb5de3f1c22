"""What a command is to do, wholly resolved: nothing downstream decides or checks again. Needs no torch."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from nemo_aapo.config import Config, ModelShape, Sizes
from nemo_aapo.models.directory import check_model
from nemo_aapo.rewards import reward_of
from nemo_aapo.rewards.base import Reward


@dataclass(frozen=True)
class Job:
    """A training run, or the part of one that fills the reference store, serves rollouts or looks at a machine."""

    config: Config
    tree: Mapping[str, Any]
    """The configuration as a plain tree without secrets: what ``config.yaml`` of the run directory shows."""
    shape: ModelShape
    """Of the model at ``config.model.path``."""
    sizes: Sizes
    """Data-parallel size, sequences a step and the like, with the arithmetic that led to them."""
    rewards: tuple[tuple[Reward, float], ...]
    """What judges a completion, each with its weight."""


def resolve(config: Config, world_size: int, tree: Mapping[str, Any] | None = None, given: Collection[str] = ()) -> Job:
    """The job of a configuration.

    Args:
        world_size: ranks that run it.
        tree: the configuration as it was composed; None: made from ``config``.
        given: parts that the caller brings, by their names in ``nemo_aapo.train``, such as ``rewards``. What the
            configuration says of these is not looked at.

    Raises:
        ConfigError: what can't work, with the reason and the remedy.
    """
    shape, sizes = check_model(config, world_size)
    return Job(
        config=config,
        tree=json.loads(json.dumps(dataclasses.asdict(config))) if tree is None else tree,
        shape=shape,
        sizes=sizes,
        rewards=() if "rewards" in given else tuple(map(reward_of, config.rewards)),
    )
