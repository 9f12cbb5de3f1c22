"""What a reward's values depend on, as plain values: part of the key that reference rewards are stored under."""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
from typing import Any

from nemo_aapo.rewards import REWARDS, reward_config
from nemo_aapo.rewards.base import Reward


def reward_definition(reward: Reward) -> dict[str, Any]:
    """Name, parameters, and what else decides its values: versions of libraries, a digest of a user's code.

    A reward of one's own class is defined by its class's source, where Python can find that, and by its fields.
    """
    if type(reward) in REWARDS.values():
        return {**reward_config(reward), **reward.depends_on()}
    definition: dict[str, Any] = {"name": reward.name}
    if dataclasses.is_dataclass(reward):
        definition |= dataclasses.asdict(reward)
    digest = source_digest(type(reward))
    return {**definition, "source": digest} if digest else definition


def source_digest(kind: type) -> str | None:
    """A digest of a class's source; None where Python can't find it, as of one typed at a prompt."""
    try:
        return hashlib.sha256(inspect.getsource(kind).encode()).hexdigest()[:16]
    except (OSError, TypeError):
        return None
