"""Whole runs whose completions come from rollout servers are the runs that draw them in process."""

from __future__ import annotations

import pytest

from nemo_aapo.checkpoint import manifest
from nemo_aapo.rollout.saved import pending
from tests.servers import Servers, wait_until_ready
from tests.training_runs import (
    IN_THE_THIRD_STEP,
    assert_same_run,
    exported,
    killed_after,
    make_input,
    metrics,
    run,
    settings,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_input(tmp_path_factory.mktemp("remote"))


@pytest.fixture(scope="module")
def servers(folder):
    """Two servers; all runs of this module share them, one after the other."""
    started = Servers(folder / "servers")
    for index in (0, 1):
        started.start(index, settings(folder, folder / "none"))
    for index in (0, 1):
        wait_until_ready(started.directory, index, timeout_s=120)
    yield started
    started.close()


def remote(folder, run_dir, servers, *more, **layout):
    words = ("rollout.engine=remote", f"rollout.remote.directory={servers.directory}", "rollout.remote.wait_s=60")
    return settings(folder, run_dir, *words, *more, **layout)


def test_a_run_on_two_servers_loses_one_and_ends_in_the_same_weights(ranks, folder, servers):
    """With tensor-parallel ranks, and reference completions afresh each step by the servers' own base weights."""
    paper = ["algorithm=aapo_paper", "trainer.max_steps=3"]
    assert ranks.run(run, settings(folder, folder / "alone", *paper), tp=None) == [0]
    run_dir = folder / "two_servers"
    words = remote(folder, run_dir, servers, *paper, "rollout.remote.servers=2", world=2, tp=2)
    with killed_after(2, run_dir, servers.processes[1].pid):
        assert ranks.run(run, words, world=2, tp=None) == [0, 0]
    assert_same_run(run_dir, folder / "alone")
    first, expected = (metrics(path)[0] for path in (run_dir, folder / "alone"))
    assert first == expected  # the validation of the same weights, to the last digit
    assert "validation/accuracy_sampled_stderr" in first
    assert all(line["parity/mult_prob_error"] < 1.0001 for line in metrics(run_dir) if "loss" in line)
    assert list((servers.directory / "weights").iterdir()) == []


def test_a_run_on_one_server_stopped_and_resumed_ends_in_the_same_bits(ranks, folder, servers):
    for record in servers.records():
        if not servers.processes[record.index].is_alive():
            (servers.directory / f"server_{record.index}.json").unlink()
    assert ranks.run(run, settings(folder, folder / "in_process"), tp=None) == [0]
    run_dir = folder / "one_server"
    for more in (["trainer.max_steps=2"], []):
        assert ranks.run(run, remote(folder, run_dir, servers, *more), tp=None) == [0]
    assert metrics(run_dir) == metrics(folder / "in_process")
    assert exported(run_dir) == exported(folder / "in_process")


def ahead(depth):
    return f"rollout.async_depth={depth}", "algorithm.importance_weight_cap=2.0"


AHEAD = ahead(1)


def test_one_step_ahead_a_checkpoint_keeps_the_rollouts_that_were_not_trained_on(ranks, folder, servers):
    """Stopped and resumed to the same bits; on tensor-parallel ranks within 1e-5. One server is left here."""
    whole, stopped, moved = (folder / f"ahead_{name}" for name in ("whole", "stopped", "moved"))
    assert ranks.run(run, remote(folder, whole, servers, *AHEAD), tp=None) == [0]
    steps = [line for line in metrics(whole) if "loss" in line]
    assert [line["rollout/lag"] for line in steps] == [0, 1, 1, 1, 1, 1]  # the first has nothing to be ahead of
    assert all(0 < line["importance_weight/mean"] < 2 for line in steps)
    for run_dir in (stopped, moved):
        assert ranks.run(run, remote(folder, run_dir, servers, *AHEAD), IN_THE_THIRD_STEP, tp=None) == [0]
        newest = max((run_dir / "checkpoints").iterdir())
        assert pending.FILE_NAME in manifest.read(newest).files
        assert not (run_dir / "finished").exists()
    assert ranks.run(run, remote(folder, stopped, servers, *AHEAD), tp=None) == [0]
    assert metrics(stopped) == metrics(whole)
    assert exported(stopped) == exported(whole)
    assert ranks.run(run, remote(folder, moved, servers, *AHEAD, world=2, tp=2), world=2, tp=None) == [0, 0]
    assert_same_run(moved, whole)


def test_two_steps_ahead_servers_and_the_engine_in_process_end_in_the_same_bits(ranks, folder, servers):
    """Step k trains on completions of the policy before step k - 2. Stopped with two rollouts in hand, and resumed."""
    served, alone, stopped = (folder / f"two_{name}" for name in ("served", "alone", "stopped"))
    assert ranks.run(run, remote(folder, served, servers, *ahead(2)), tp=None) == [0]
    steps = [line for line in metrics(served) if "loss" in line]
    assert [line["rollout/lag"] for line in steps] == [0, 1, 2, 2, 2, 2]
    assert all(0 < line["importance_weight/mean"] < 2 for line in steps)
    assert ranks.run(run, settings(folder, alone, *ahead(2)), tp=None) == [0]
    assert ranks.run(run, settings(folder, stopped, *ahead(2)), IN_THE_THIRD_STEP, tp=None) == [0]
    assert pending.count((max((stopped / "checkpoints").iterdir()) / pending.FILE_NAME).read_bytes()) == 2 * 4
    assert ranks.run(run, settings(folder, stopped, *ahead(2)), tp=None) == [0]
    for run_dir in (alone, stopped):
        assert metrics(run_dir) == metrics(served)
        assert exported(run_dir) == exported(served)
