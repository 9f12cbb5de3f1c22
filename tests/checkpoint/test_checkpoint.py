"""Saving and resuming: a resumed run is the uninterrupted one on any layout; a save is whole or not there."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest

from tests.checkpoint_runs import (
    DIGEST,
    error_of,
    make_checkpointer,
    make_policy,
    same,
    state_of,
    train,
    train_and_save,
    weights,
)

NOBODY = 65534
LAYOUTS = {"1x1": (1, 1, 1), "2x1": (2, 2, 1), "1x2": (2, 1, 2), "dp2": (2, 1, 1), "2x2": (4, 2, 2)}


@pytest.fixture(scope="module")
def model(tiny_models):
    return tiny_models["qwen2_tied"]


@pytest.fixture(scope="module")
def saved(ranks, model, tmp_path_factory):
    """Checkpoints by TP 2 x PP 2; the weights at the newest, step 3, and one step later."""
    directory = tmp_path_factory.mktemp("run") / "checkpoints"
    return directory, *ranks.run(train_and_save, model, directory, 2, 2, world=4, tp=2, pp=2)[0]


def _resume_and_train(model, directory, tp, pp, distributed_optimizer=False):
    policy = make_policy(model, tp, pp, distributed_optimizer)
    state = make_checkpointer(directory).resume(policy)
    resumed, version = weights(policy), policy.version
    train(policy, 4)
    return state, version, resumed, weights(policy)


@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_a_resumed_run_goes_on_as_if_it_had_not_stopped(ranks, model, saved, layout):
    directory, now, later = saved
    assert not same(now, later)
    world, tp, pp = LAYOUTS[layout]
    for answer in ranks.run(_resume_and_train, model, directory, tp, pp, world=world, tp=tp, pp=pp):
        state, version, resumed, trained = answer
        assert state == state_of(3)
        assert version == 3
        assert same(resumed, now)
        for name in later:
            np.testing.assert_allclose(trained[name], later[name], rtol=0, atol=0 if layout == "2x2" else 1e-6)


def test_so_does_one_with_the_distributed_optimizer(ranks, model, tmp_path):
    """Its moments are dealt to two ranks, and then to one, which trains on all samples."""
    now, later = ranks.run(train_and_save, model, tmp_path / "run", 1, 1, True, world=2)[0]
    for world, tolerance in ((2, 0), (1, 1e-6)):
        for _, _, resumed, trained in ranks.run(_resume_and_train, model, tmp_path / "run", 1, 1, True, world=world):
            assert same(resumed, now)
            for name in later:
                np.testing.assert_allclose(trained[name], later[name], rtol=0, atol=tolerance)


def test_the_newest_are_kept_and_their_manifest_says_what_they_are(saved):
    from nemo_aapo.checkpoint import manifest

    directory = saved[0]
    assert sorted(os.listdir(directory)) == ["step_000002", "step_000003"]
    assert make_checkpointer(directory).latest() == directory / "step_000003"
    content = manifest.read(directory / "step_000003")
    assert (content.step, content.config_digest, content.trainer_state) == (3, DIGEST, state_of(3))
    assert list(content.layout.values()) == [4, 2, 2, 1, 1, 1]
    assert {"nemo_aapo", "megatron_core", "torch", "python"} == set(content.versions)
    assert sorted([*content.files, "manifest.json"]) == sorted(os.listdir(directory / "step_000003"))
    assert sorted(name for name in content.files if name.endswith(".distcp")) == [f"__{r}_0.distcp" for r in range(4)]


def _save_on_a_full_disk(model, directory):
    """First one rank's files, then the other's, may not grow beyond 100 kB: writing ends as on a full disk."""
    from nemo_aapo.distributed import parallel

    policy = make_policy(model)
    train(policy, 1)
    checkpoints = make_checkpointer(directory, keep_last=1)
    checkpoints.save(1, policy, {"step": 1})
    train(policy, 2)
    errors = []
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    for full in (1, 0):
        if parallel.rank() == full:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
        errors.append(error_of(lambda: checkpoints.save(2, policy, {"step": 2})))
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    parallel.barrier()
    names = os.listdir(directory)
    state = make_checkpointer(directory).resume(policy)
    checkpoints.save(2, policy, {"step": 2})
    parallel.barrier()
    return errors, names, state, os.listdir(directory)


def test_a_full_disk_on_one_rank_is_an_error_on_all_and_leaves_the_older_checkpoint(ranks, model, tmp_path):
    for errors, names, state, names_later in ranks.run(_save_on_a_full_disk, model, tmp_path / "run", world=2):
        for full, error in zip((1, 0), errors, strict=True):
            assert f"step 2 was not saved in {tmp_path / 'run'}" in error
            assert f"rank {full}: OSError: [Errno 27]" in error
            assert "MiB free" in error
        assert names == ["step_000001"]
        assert state == {"step": 1}
        assert names_later == ["step_000002"]


def _save_read_only(model, directory):
    """The directory may not be written while the second checkpoint is saved; root alone could all the same."""
    from nemo_aapo.distributed import parallel

    policy = make_policy(model)
    checkpoints = make_checkpointer(directory)
    train(policy, 1)
    checkpoints.save(1, policy, {"step": 1})
    train(policy, 2)
    if parallel.rank() == 0:
        directory.chmod(0o555)
    parallel.barrier()
    user = os.geteuid()
    if user == 0:
        os.seteuid(NOBODY)
    try:
        error = error_of(lambda: checkpoints.save(2, policy, {"step": 2}))
        start = error_of(lambda: make_checkpointer(directory).resume(policy))
    finally:
        os.seteuid(user)
    parallel.barrier()
    if parallel.rank() == 0:
        directory.chmod(0o755)
    parallel.barrier()
    state = make_checkpointer(directory).resume(policy)
    return error, start, os.listdir(directory), state


def test_a_read_only_directory_is_an_error_on_all_ranks_and_leaves_the_older_checkpoint(ranks, model):
    with tempfile.TemporaryDirectory() as folder:  # pytest's own folders are closed to others
        os.chmod(folder, 0o755)
        directory = Path(folder) / "checkpoints"
        for error, start, names, state in ranks.run(_save_read_only, model, directory, world=2):
            assert f"step 2 was not saved in {directory}" in error
            assert "PermissionError: [Errno 13]" in error
            assert "PermissionError: [Errno 13]" in start  # a run that could not save does not begin
            assert names == ["step_000001"]
            assert state == {"step": 1}


def _interrupt(model, directory):
    """A save that ends in the middle, as if the process had been killed; then a start, and the save once more."""
    from nemo_aapo.checkpoint import manifest

    def killed(*args):
        raise KeyboardInterrupt

    policy = make_policy(model)
    train(policy, 1)
    checkpoints = make_checkpointer(directory)
    checkpoints.save(1, policy, {"step": 1})
    write, manifest.write = manifest.write, killed
    try:
        checkpoints.save(2, policy, {"step": 2})
    except KeyboardInterrupt:
        names = [sorted(os.listdir(directory))]
    finally:
        manifest.write = write
    (directory / ".step_000000.removing").mkdir()
    state = make_checkpointer(directory).resume(policy)
    names.append(sorted(os.listdir(directory)))
    (directory / ".step_000002.partial").mkdir()
    (directory / ".step_000002.partial" / "__0_0.distcp").write_text("half")
    checkpoints.save(2, policy, {"step": 2})
    names.append(sorted(os.listdir(directory)))
    return names, state, checkpoints.resume(policy)


def test_an_interrupted_save_leaves_the_older_checkpoint_and_is_cleaned_up(ranks, model, tmp_path):
    [(names, state, later)] = ranks.run(_interrupt, model, tmp_path / "run")
    assert names == [[".step_000002.partial", "step_000001"], ["step_000001"], ["step_000001", "step_000002"]]
    assert state == {"step": 1}
    assert later == {"step": 2}


def _disk_calls(model, directory):
    """What is brought to the disk, renamed and removed during a save, in this order, by file name."""
    calls = []

    def spy(name, real, path_of):
        def call(argument, *rest, **options):
            calls.append((name, Path(path_of(argument)).name))
            return real(argument, *rest, **options)

        return call

    policy = make_policy(model)
    train(policy, 1)
    checkpoints = make_checkpointer(directory, keep_last=1)
    checkpoints.save(1, policy, {})
    fsync, rename = os.fsync, os.rename
    os.fsync = spy("fsync", fsync, lambda descriptor: os.readlink(f"/proc/self/fd/{descriptor}"))
    os.rename = spy("rename", rename, lambda path: path)
    try:
        checkpoints.save(2, policy, {})
    finally:
        os.fsync, os.rename = fsync, rename
    return calls, os.listdir(directory / "step_000002")


def test_a_checkpoint_gets_its_name_when_all_of_it_is_on_the_disk_and_older_ones_go_after_that(ranks, model, tmp_path):
    [(calls, files)] = ranks.run(_disk_calls, model, tmp_path / "run")
    named = calls.index(("rename", ".step_000002.partial"))
    assert {name for call, name in calls[:named] if call == "fsync"} == {*files, ".step_000002.partial"}
    assert calls[named - 1] == ("fsync", ".step_000002.partial")
    assert calls[named + 1 :] == [("fsync", "run"), ("rename", "step_000001")]


def _prune_in_vain(model, directory):
    """Old checkpoints can't be removed during one save, and can during the next."""

    def refused(path):
        raise OSError(errno.ENOTEMPTY, "held open by another process", str(path))

    policy = make_policy(model)
    train(policy, 1)
    checkpoints = make_checkpointer(directory, keep_last=1)
    checkpoints.save(1, policy, {})
    remove, shutil.rmtree = shutil.rmtree, refused
    try:
        checkpoints.save(2, policy, {})
    finally:
        shutil.rmtree = remove
    names = [sorted(os.listdir(directory))]
    checkpoints.save(3, policy, {})
    return [*names, sorted(os.listdir(directory))]


def test_a_run_goes_on_if_an_old_checkpoint_can_not_be_removed_and_tries_again(ranks, model, tmp_path):
    [names] = ranks.run(_prune_in_vain, model, tmp_path / "run")
    assert names == [[".step_000001.removing", "step_000002"], ["step_000003"]]


def test_nothing_is_saved_before_the_first_step_and_one_checkpoint_has_to_stay(tmp_path):
    with pytest.raises(ValueError, match="keep_last=0"):
        make_checkpointer(tmp_path, keep_last=0)
    with pytest.raises(ValueError, match="step 0"):
        make_checkpointer(tmp_path).save(0, None, {})
    assert make_checkpointer(tmp_path / "none").latest() is None
