"""The algorithm of a job: that it is there, and what an algorithm of one's own needs of the run."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from nemo_aapo.algorithms.base import Algorithm
from nemo_aapo.algorithms.registry import built_in, check_name, own_algorithm
from nemo_aapo.config import Config
from nemo_aapo.errors import ConfigError

NEEDS = ("reference_logprobs", "old_logprobs", "entropy_gradient")


def with_algorithm(config: Config, given: Algorithm | None = None) -> Config:
    """The configuration with what an algorithm of one's own decides: its needs, its name, and no switch of others.

    A built-in one is known by its settings alone.

    Args:
        given: an algorithm as an object, in place of the one that the configuration names.

    Raises:
        ConfigError: no such algorithm; settings of the user's class that do not fit; reference rewards are missing;
            a group of one, of which the algorithm could learn nothing.
    """
    settings = config.algorithm
    if given is None and settings.custom is None:
        check_name(settings)
        if config.group_size == 1 and settings.margin is None and not built_in(settings.name).whole_batch:
            raise ConfigError(
                f"group_size=1: algorithm={settings.name} compares completions of a group; at least 2 needed"
            )
        return config
    own = given or own_algorithm(str(settings.custom), settings.settings)
    changes: dict[str, Any] = {}
    if given is not None:
        changes |= {"custom": f"{type(own).__module__}:{type(own).__qualname__}", "settings": _fields(own) or None}
    if own.needs_reference_rewards and settings.reference is None:
        raise ConfigError(
            f"algorithm.reference=null, but {type(own).__name__} needs rewards of the frozen reference: "
            "algorithm.reference=cached with algorithm.reference_samples and algorithm.reference_store, or online"
        )
    if not own.needs_reference_rewards:
        names = ("reference", "reference_samples", "reference_store", "reference_fill_steps")
        changes |= dict.fromkeys(names)
    needs = tuple(name for name in NEEDS if getattr(own, f"needs_{name}"))
    changes |= {"name": type(own).__name__, "needs": needs or None, "kl_coefficient": 0.0, "scale_margin": False}
    changes |= dict.fromkeys(("margin", "margin_schedule", "clip", "dual_clip"))
    return dataclasses.replace(config, algorithm=dataclasses.replace(settings, **changes))


def _fields(algorithm: Algorithm) -> dict[str, Any]:
    """Its settings as plain values, which then decide the run's digest; those that are none by their ``repr``."""
    if not dataclasses.is_dataclass(algorithm):
        return {}
    plain: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(algorithm), default=repr))
    return plain
