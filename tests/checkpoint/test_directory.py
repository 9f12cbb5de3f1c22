"""Which checkpoints stay, as plain files."""

from __future__ import annotations

import pytest

from nemo_aapo.checkpoint.directory import CheckpointDirectory
from nemo_aapo.checkpoint.manifest import FILE_NAME, Manifest
from nemo_aapo.run.names import step_of

BEST = "validation/accuracy_greedy"


def steps(directory):
    return [step_of(path.name) for path in directory.steps()]


@pytest.fixture
def save():
    """Saves a step with this value of ``BEST``, or none; returns the steps that are left."""

    def saved(directory, step, value):
        directory.begin(step, {})
        metrics = {} if value is None else {BEST: value}
        directory.commit(Manifest(step, "digest", {"metrics": metrics}, {}, {}, {}))
        directory.prune(directory.of(step))
        return steps(directory)

    return saved


@pytest.fixture
def directory(tmp_path):
    return CheckpointDirectory(tmp_path, keep_last=1, keep_best=BEST)


def test_the_best_checkpoint_stays_beside_the_newest_whatever_comes_after_it(directory, save):
    values = {1: None, 3: 0.9, 4: None, 5: None, 6: 0.2, 7: 0.9, 8: None}
    left = {step: save(directory, step, value) for step, value in values.items()}
    assert left == {1: [1], 3: [3], 4: [3, 4], 5: [3, 5], 6: [3, 6], 7: [7], 8: [7, 8]}  # the newest of equals


@pytest.mark.parametrize(("damaged", "left"), [(1, [1, 3]), (2, [2, 3])])
def test_an_older_manifest_that_can_not_be_read_is_in_the_way_of_no_save_and_no_resume(
    directory, save, caplog, damaged, left
):
    for step, value in ((1, 0.9), (2, 0.8)):
        save(directory, step, value)
    (directory.of(damaged) / FILE_NAME).write_text("{")
    assert save(directory, 3, 0.95) == left  # the better one, and what may be better still
    assert f"step_00000{damaged} stays" in caplog.text
    directory.loaded(directory.of(3), {})
    assert steps(directory) == left


def test_a_step_that_is_damaged_again_leaves_what_was_put_aside_before(directory, save):
    save(directory, 1, 0.9)
    for evidence in ("first", "second", "third"):
        directory.of(2).mkdir()
        (directory.of(2) / evidence).touch()
        directory.loaded(directory.of(1), {directory.of(2): "it is damaged"})
    aside = {path.name: [file.name for file in path.iterdir()] for path in directory.path.glob("step_000002*")}
    names = [f"step_000002.damaged{end}" for end in ("", ".2", ".3")]
    assert aside == {name: [evidence] for name, evidence in zip(names, ("first", "second", "third"), strict=True)}
    assert steps(directory) == [1]
