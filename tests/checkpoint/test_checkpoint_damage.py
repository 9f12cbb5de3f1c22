"""What is not whole, or not this run's, is never loaded; going back is asked for, and said."""

from __future__ import annotations

import logging
import os
import shutil

import pytest

from tests.checkpoint_runs import (
    DAMAGES,
    DIGEST,
    changed_copy,
    error_of,
    make_checkpointer,
    make_policy,
    same,
    state_of,
    train,
    train_and_save,
    weights,
)


@pytest.fixture(scope="module")
def model(tiny_models):
    return tiny_models["llama"]


@pytest.fixture(scope="module")
def saved(ranks, model, tmp_path_factory):
    """Checkpoints of steps 2 and 3, written by two ranks."""
    directory = tmp_path_factory.mktemp("run") / "checkpoints"
    ranks.run(train_and_save, model, directory, 1, 1, world=2)
    return directory


def _resume_from_damaged(model, source, scratch):
    """The error for each file of the newest checkpoint and each kind of damage to it."""
    policy = make_policy(model)
    before = weights(policy)
    errors = {}
    for name in sorted(os.listdir(source / "step_000003")):
        for kind, damage in DAMAGES.items():
            with changed_copy(source, scratch / f"{name}.{kind}") as copy:
                if copy:
                    damage(copy / "step_000003" / name)
            checkpoints = make_checkpointer(scratch / f"{name}.{kind}")
            errors[name, kind] = error_of(lambda: checkpoints.resume(policy))  # noqa: B023
    return errors, same(weights(policy), before)


@pytest.fixture(scope="module")
def damaged(ranks, model, saved, tmp_path_factory):
    return ranks.run(_resume_from_damaged, model, saved, tmp_path_factory.mktemp("damaged"), world=2)


@pytest.mark.parametrize("damage", list(DAMAGES))
@pytest.mark.parametrize("name", ["manifest.json", ".metadata", "common.pt", "metadata.json", "__1_0.distcp"])
def test_a_damaged_part_is_an_error_on_all_ranks_that_names_it(damaged, name, damage):
    (errors, _), (errors_of_other_rank, _) = damaged
    assert f"step_000003/{name}" in errors[name, damage]
    assert "checkpoint.resume=latest_good" in errors[name, damage]
    assert errors == errors_of_other_rank


def test_no_kind_of_file_is_left_out_and_a_damaged_checkpoint_touches_no_weight(damaged):
    for errors, untouched in damaged:
        assert len(errors) == 6 * len(DAMAGES)
        assert all(errors.values())
        assert untouched


def _fall_back(model, source, scratch):
    """Resume with the newest checkpoint damaged, save again, resume again; then with all of them damaged."""
    from nemo_aapo.checkpoint import directory as checkpoint_directory
    from nemo_aapo.distributed import parallel

    said = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    checkpoint_directory.logger.addHandler(handler)
    policy = make_policy(model)
    with changed_copy(source, scratch) as copy:
        if copy:
            (copy / "step_000003" / "common.pt").unlink()
    checkpoints = make_checkpointer(scratch)
    auto = error_of(lambda: checkpoints.resume(policy))
    state = checkpoints.resume(policy, mode="latest_good")
    checkpoint_directory.logger.removeHandler(handler)
    names = sorted(os.listdir(scratch))
    train(policy, 3)
    checkpoints.save(3, policy, {"step": 3})
    again = make_checkpointer(scratch).resume(policy)
    if parallel.rank() == 0:
        for step in (2, 3):
            (scratch / f"step_{step:06d}" / ".metadata").unlink()
    parallel.barrier()
    return auto, state, names, again, error_of(lambda: checkpoints.resume(policy, mode="latest_good")), said


def test_latest_good_goes_back_and_says_so_and_the_run_goes_on_from_there(ranks, model, saved, tmp_path):
    answers = ranks.run(_fall_back, model, saved, tmp_path / "copy", world=2)
    for auto, state, names, again, none_whole, _ in answers:
        assert "common.pt is missing" in auto
        assert state == state_of(2)
        assert names == ["step_000002", "step_000003.damaged"]
        assert again == {"step": 3}
        assert "no checkpoint" in none_whole
        for step in (2, 3):
            assert f"step_{step:06d}/.metadata is missing" in none_whole
    [text] = answers[0][-1]
    assert f"went back to {tmp_path}/copy/step_000002" in text
    assert "step_000003/common.pt is missing" in text
    assert answers[1][-1] == []


def _refuse(model, source, scratch):
    """Errors that have nothing to do with damage, by what is wrong."""
    policy = make_policy(model)
    in_the_way = scratch / "file"
    in_the_way.write_text("")
    strange = scratch / "strange"
    (strange / "step_000009.damaged").mkdir(parents=True)
    shutil.copytree(source / "step_000002", scratch / "renamed" / "step_000008")
    return {
        "digest": error_of(lambda: make_checkpointer(source, digest="f" * 16).resume(policy, mode="latest_good")),
        "strange": error_of(lambda: make_checkpointer(strange).resume(policy)),
        "renamed": error_of(lambda: make_checkpointer(scratch / "renamed").resume(policy)),
        "start": error_of(lambda: make_checkpointer(in_the_way / "checkpoints").resume(policy)),
        "save": error_of(lambda: make_checkpointer(in_the_way / "checkpoints").save(4, policy, {})),
        "exists": error_of(lambda: make_checkpointer(source).save(3, policy, {})),
        "state": error_of(lambda: make_checkpointer(scratch / "state").save(4, policy, {"key": (1, 2)})),
        "left by that": os.listdir(scratch / "state"),
        "nothing there": make_checkpointer(scratch / "new").resume(policy),
    }


def test_what_can_not_be_resumed_or_saved_is_refused_with_the_reason(ranks, model, saved, tmp_path):
    [answers] = ranks.run(_refuse, model, saved, tmp_path)
    assert DIGEST in answers["digest"]
    assert "f" * 16 in answers["digest"]
    assert "step_000009.damaged" in answers["strange"]
    assert "manifest says step 2" in answers["renamed"]
    for name in ("start", "save"):
        assert f"NotADirectoryError: [Errno 20] Not a directory: '{tmp_path}/file/checkpoints'" in answers[name]
    assert "step_000003 exists already" in answers["exists"]
    assert "trainer state" in answers["state"]
    assert answers["left by that"] == []
    assert answers["nothing there"] is None
