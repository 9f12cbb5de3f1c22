"""A run's record as it is opened on one rank, and settings that differ from it."""

from __future__ import annotations

from nemo_aapo.config import parse
from nemo_aapo.run.experiment import open_experiment


def changed(tree, **sections):
    tree = {**tree, **{name: {**tree[name], **values} for name, values in sections.items()}}
    return parse(tree), tree


def opened(settings):
    return open_experiment(*settings, rank=0, world_size=1)
