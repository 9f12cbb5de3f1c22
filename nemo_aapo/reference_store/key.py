"""What stored reference rewards belong to: a key in parts that people can read, and where two keys differ."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nemo_aapo.types import SamplingSpec


@dataclass(frozen=True)
class StoreKey:
    """Everything that reference rewards depend on besides the prompt, which has a digest of its own (``Prompt.id``).

    The number of samples K is no part of it: sample k of a prompt is the same whatever K, so that runs with different
    K have in common what both need.

    Example::

        StoreKey({"model": "1f0c...", "sampling": {...}, "rewards": [{"name": "integer", ...}], "seed": 1})
    """

    parts: dict[str, Any]
    """``model`` (digest of its weights), ``sampling``, ``rewards``, ``seed``, and where prompts have them ``date`` and
    ``template_arguments``, as plain JSON values."""

    @functools.cached_property
    def digest(self) -> str:
        """A digest of all parts: 16 hex digits."""
        return hashlib.sha256(json.dumps(self.parts, sort_keys=True).encode()).hexdigest()[:16]

    def differences(self, there: dict[str, Any]) -> list[str]:
        """Where the parts of another key differ from these, one phrase for each."""
        ours, theirs = _flat(self.parts, ""), _flat(there, "")
        different = [name for name in {**theirs, **ours} if ours.get(name, ...) != theirs.get(name, ...)]
        return [f"{name}: {_show(theirs, name)} there, {_show(ours, name)} here" for name in different]

    def nearest_differences(self, others: Sequence[dict[str, Any]]) -> list[str]:
        """The ``differences`` to that one of several keys which has the fewest.

        Args:
            others: the parts of at least one key.
        """
        return min((self.differences(parts) for parts in others), key=len)


def store_key(
    model_digest: str,
    sampling: SamplingSpec,
    rewards: Sequence[dict[str, Any]],
    seed: int,
    date: str | None = None,
    template_arguments: Mapping[str, Any] | None = None,
) -> StoreKey:
    """The key of a run.

    Args:
        model_digest: digest of the reference's weights (``utils.safetensors.model_digest``).
        sampling: how policy and reference are sampled.
        rewards: their definitions (``RewardRunner.definition``).
        seed: the run's; it names the random streams of the reference completions.
        date: the day that the prompts write, ``YYYY-MM-DD``; None where they write none.
        template_arguments: of the chat template. Like the date they are in the prompts, whose digests would differ
            without a word of why.
    """
    parts = {
        "model": model_digest,
        "sampling": dataclasses.asdict(sampling),
        "rewards": list(rewards),
        "seed": seed,
        **({"date": date} if date else {}),
        **({"template_arguments": dict(template_arguments)} if template_arguments else {}),
    }
    return StoreKey(json.loads(json.dumps(parts)))  # as it comes back from the store: lists for tuples


def _flat(value: Any, prefix: str) -> dict[str, Any]:
    """Dotted name -> plain value. A part of the list of rewards is called by the reward's name where it has one."""
    if isinstance(value, dict) and value:
        items = [(f"{prefix}.{key}" if prefix else key, item) for key, item in value.items()]
    elif isinstance(value, list) and any(isinstance(item, dict) for item in value):
        items = [(f"{prefix}[{_name(item, i)}]", item) for i, item in enumerate(value)]
    else:
        return {prefix: value}
    return {name: leaf for key, item in items for name, leaf in _flat(item, key).items()}


def _name(item: Any, number: int) -> Any:
    return item.get("function", item.get("name", number)) if isinstance(item, dict) else number


def _show(parts: dict[str, Any], name: str) -> str:
    return json.dumps(parts[name]) if name in parts else "not set"
