"""Which checkpoints stay, as plain files."""

from __future__ import annotations

import pytest

from nemo_aapo.checkpoint.directory import CheckpointDirectory
from nemo_aapo.checkpoint.manifest import Manifest

BEST = "validation/accuracy_greedy"


@pytest.fixture
def save(tmp_path):
    """Saves a step with this value of ``BEST``, or none; returns the steps that are left."""

    def saved(directory, step, value):
        directory.begin(step, {})
        metrics = {} if value is None else {BEST: value}
        directory.commit(Manifest(step, "digest", {"metrics": metrics}, {}, {}, {}))
        directory.prune(directory.of(step))
        return [int(path.name.removeprefix("step_")) for path in directory.steps()]

    return saved


@pytest.fixture
def directory(tmp_path):
    return CheckpointDirectory(tmp_path, keep_last=1, keep_best=BEST)


def test_the_best_checkpoint_stays_beside_the_newest_whatever_comes_after_it(directory, save):
    values = {1: None, 3: 0.9, 4: None, 5: None, 6: 0.2, 7: 0.9, 8: None}
    left = {step: save(directory, step, value) for step, value in values.items()}
    assert left == {1: [1], 3: [3], 4: [3, 4], 5: [3, 5], 6: [3, 6], 7: [7], 8: [7, 8]}  # the newest of equals
