"""Saving in the background: training goes on, the checkpoint is that of its step, and no failure is lost."""

from __future__ import annotations

import os
import resource
import threading

import numpy as np
import pytest

from tests.checkpoint_runs import error_of, make_checkpointer, make_policy, same, train, weights


@pytest.fixture(scope="module")
def model(tiny_models):
    return tiny_models["qwen2_tied"]


def _train_meanwhile(model, directory, tp):
    """Two steps while the first one's checkpoint is held up; then what that checkpoint holds."""
    from nemo_aapo.checkpoint import format as torch_dist

    policy = make_policy(model, tp)
    train(policy, 1)
    then = weights(policy)
    go_on, write = threading.Event(), torch_dist.write

    def held_up(*args):
        assert go_on.wait(60)
        write(*args)

    torch_dist.write = held_up
    checkpoints = make_checkpointer(directory, background=True)
    try:
        checkpoints.save(1, policy, {"step": 1}, {"extra.npz": b"123"})
        train(policy, 2)  # its collectives and the save's go on at the same time
        train(policy, 3)
        names = os.listdir(directory)
        go_on.set()
        train(policy, 4)
        now = weights(policy)
        checkpoints.wait()
    finally:
        torch_dist.write = write
    seconds = checkpoints.seconds
    later = make_checkpointer(directory)
    state = later.resume(policy)
    loaded = weights(policy)
    for step in (2, 3, 4):
        train(policy, step)
    extra = (later.resumed_from / "extra.npz").read_bytes()
    return names, state, extra, seconds > 0, same(then, loaded), same(now, weights(policy)), same(then, now)


@pytest.mark.parametrize("tp", [1, 2])
def test_a_checkpoint_holds_its_step_though_training_went_on_while_it_was_written(ranks, model, tmp_path, tp):
    """Weights, optimizer (or the steps after it would differ) and extra files, with two replicas and two shards."""
    for answer in ranks.run(_train_meanwhile, model, tmp_path, tp, world=2, tp=tp):
        assert answer == ([".step_000001.partial"], {"step": 1}, b"123", True, True, True, False)


def _fail_meanwhile(model, directory):
    """The disk of rank 1 is full; training goes on until it is asked how the save went."""
    from nemo_aapo.distributed import parallel

    policy = make_policy(model)
    checkpoints = make_checkpointer(directory, background=True)
    train(policy, 1)
    checkpoints.save(1, policy, {"step": 1})
    train(policy, 2)
    checkpoints.wait()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if parallel.rank() == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    checkpoints.save(2, policy, {"step": 2})
    train(policy, 3)
    error = error_of(checkpoints.wait)
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    parallel.barrier()
    names = os.listdir(directory)
    after = checkpoints.failed(), error_of(checkpoints.wait)  # said once
    checkpoints.save(3, policy, {"step": 3})
    checkpoints.wait()
    return error, names, after, sorted(os.listdir(directory)), np.isfinite(checkpoints.seconds)


def test_a_failure_in_the_background_is_raised_on_all_ranks_and_leaves_the_older_checkpoint(ranks, model, tmp_path):
    for error, names, after, later, timed in ranks.run(_fail_meanwhile, model, tmp_path / "run", world=2):
        assert f"the checkpoint of step 2 was not saved in {tmp_path / 'run'}" in error
        assert "rank 1: OSError: [Errno 27]" in error
        assert names == ["step_000001"]
        assert after == (False, None)
        assert later == ["step_000001", "step_000003"]
        assert timed
