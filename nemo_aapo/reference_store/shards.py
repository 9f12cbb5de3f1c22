"""A store filled in shards: each task of an array job writes a file of its own beside the store; one merge joins them.

reference_rewards.sqlite
reference_rewards.shard-0003-of-0016.sqlite
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from nemo_aapo.errors import ConfigError, StoreError
from nemo_aapo.reference_store.key import StoreKey
from nemo_aapo.reference_store.store import RewardStore
from nemo_aapo.types import Prompt


@dataclass(frozen=True)
class Shard:
    """One of ``count`` equal parts of the prompts.

    Example: ``Shard(3, 16).path("reference_rewards.sqlite")`` is ``reference_rewards.shard-0003-of-0016.sqlite``.
    """

    index: int
    """Number of the shard, counted from 0."""
    count: int

    def __post_init__(self) -> None:
        if self.count < 1 or not 0 <= self.index < self.count:
            raise ConfigError(
                f"--shard {self.index} --shards {self.count}: shards are counted from 0, so that --shard must lie "
                f"between 0 and {self.count - 1}"
                if self.count > 0
                else f"--shards {self.count}: at least 1 is needed"
            )

    def path(self, store: str | Path) -> Path:
        """The shard's own file."""
        store = Path(store)
        return store.with_name(f"{store.stem}.shard-{self.index:04d}-of-{self.count:04d}{store.suffix}")

    def select(self, prompts: Sequence[Prompt]) -> list[Prompt]:
        """The prompts of this shard: every ``count``-th."""
        return list(prompts[self.index :: self.count])


def shard_files(store: str | Path) -> list[Path]:
    """The files of shards that lie beside a store."""
    store = Path(store)
    form = re.compile(rf"{re.escape(store.stem)}\.shard-\d{{4,}}-of-\d{{4,}}{re.escape(store.suffix)}")
    return sorted(path for path in store.parent.glob("*") if form.fullmatch(path.name))


def merge_shards(path: str | Path, key: StoreKey) -> dict[Path, int]:
    """Copy what the shards hold into the store. They stay where they are; merging twice changes nothing.

    Returns:
        Prompts that each shard's file holds.

    Raises:
        StoreError: no shards, one that can't be read, or one that was filled for another key; nothing is copied then.
    """
    files = shard_files(path)
    if not files:
        raise StoreError(
            f"{path}: no shards beside it. Fill them first: --shard I --shards N, with the same settings, for each I"
        )
    shards = []
    counts: dict[Path, int] = {}
    try:
        for file in files:
            shards.append(RewardStore(file, key, create=False))
            if others := shards[-1].other_keys():
                differences = "; ".join(key.nearest_differences(others))
                raise StoreError(
                    f"{file}: was filled for other settings: {differences}. Give --merge the settings that the shards "
                    "were filled with, or remove this file and fill that shard again"
                )
        store = RewardStore(path, key)
        shards.append(store)
        for file, shard in zip(files, shards, strict=False):
            counts[file] = sum(len(store.write(batch)) for batch in shard.items())
    finally:
        for shard in shards:
            shard.close()
    return counts
