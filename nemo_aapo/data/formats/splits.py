"""Which of several splits is read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from nemo_aapo.config.sources import Source
from nemo_aapo.errors import DataError


def choose_split(splits: Mapping[str, Any], source: Source, default_splits: Sequence[str]) -> Any:
    """The split that the source names, or the first of the default ones that there is, or the only one.

    Raises:
        DataError: there is none of them.
    """
    wanted = [source.split] if source.split is not None else list(default_splits)
    for split in wanted:
        if split in splits:
            return splits[split]
    if source.split is None and len(splits) == 1:
        return next(iter(splits.values()))
    there = [name[:80] for name in splits][:20]
    raise DataError(
        f"{source.path}: there is no split {' or '.join(wanted)}; there is {', '.join(there)}: name one, as in "
        f"[{{path: {source.path}, split: {there[0] if there else 'train'}}}]"
    )


def refuse_split(source: Source) -> None:
    """Refuse the choice of a split where there is nothing to choose from."""
    if source.split is not None:
        raise DataError(f"{source.path}: this is one file, split={source.split} has no effect; leave it out")
