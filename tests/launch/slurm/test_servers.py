"""A heterogeneous job: rollout servers on nodes of their own beside the trainer; and what the death of one leads to."""

from __future__ import annotations

import os
import signal
import stat
from pathlib import Path

import pytest

from nemo_aapo.engines.remote.directory import read_servers
from tests.launch.slurm.cluster import make_run, wait_for
from tests.training_runs import exported, metrics

pytestmark = pytest.mark.timeout(900)
ONE_RANK = ("trainer.num_nodes=1", "model.tensor_model_parallel_size=1")


TP2 = ("cluster.servers.nodes=2", "cluster.servers.nodes_per_server=2", "rollout.server.tensor_parallel_size=2")


def test_a_dead_trainer_ends_the_attempt_and_a_dead_server_is_replaced_within_it(cluster, given):
    """The server has two ranks on a node each, of which one is killed; the bits are those of a run without servers."""
    more = ("cluster=slurm_servers", "cluster.servers.gpus_per_node=1", *TP2, "checkpoint.save_interval=1")
    # the reward holds the second step up until the test has done its worst
    go_on = given / "with_servers" / "go_on"
    hold = ("+cluster.env.HELD_AFTER_STEP=1", "+cluster.env.HELD_ATTEMPTS=2", f"+cluster.env.HOLD_UNTIL={go_on}")
    run = make_run(cluster, given, "with_servers", *ONE_RANK, *more, *hold, "trainer.val_check_interval=0")
    # as from within another allocation, whose variables would end each srun of this job
    job = run.submit(inside=("salloc", "--quiet", "--nodes=1", "--ntasks=3", "--mem-per-cpu=16"))[0]
    run.wait_until_held(0)

    assert {path.name: stat.S_IMODE(path.stat().st_mode) for path in run.paths.servers.glob("[st]*.json")} == {
        "server_0.json": 0o600
    }
    token = (run.paths.servers / "token").read_text().strip()
    assert stat.S_IMODE((run.paths.servers / "token").stat().st_mode) == 0o600
    assert stat.S_IMODE(run.paths.servers.stat().st_mode) == 0o700
    assert not_shown(token)
    nodes = cluster.run("squeue", "--noheader", f"--job={job}", "--format=%N").split()
    assert set(nodes) == {"node1", "node[2-3]"}
    os.kill(run.ranks(job)[0], signal.SIGKILL)

    run.wait_until_held(1)
    (before,) = read_servers(run.paths.servers)
    assert f"server      0 {before.address} TP 2 x PP 1, policy version 1" in run.say("status")
    os.kill(run.ranks(job, "serve")[1], signal.SIGKILL)
    known = ([], [before])  # the ranks that are left withdraw their server
    wait_for(lambda: read_servers(run.paths.servers) not in known, "another server", run.log)
    go_on.touch()
    run.wait_until(job, "COMPLETED")
    assert [attempt.end for attempt in run.attempts()] == ["failed", "finished"], run.log()
    assert "task 0: Killed" in run.attempts()[0].why
    assert "task 1: Killed): it is started again in its place" in run.log()
    steps = [line["step"] for line in metrics(run.directory) if "loss" in line]
    assert steps == [1, 2, 3]
    alone = make_run(cluster, given, "without_servers", *ONE_RANK, "trainer.val_check_interval=0", "cluster=local")
    cluster.launch(*(word for word in alone.words if not word.startswith(("cluster.", "+cluster"))), timeout=600)
    assert exported(run.directory) == exported(alone.directory)


def not_shown(token: str) -> bool:
    """Whether no process shows the token in its command line or environment."""
    for process in Path("/proc").glob("[0-9]*"):
        for name in ("cmdline", "environ"):
            try:
                if token.encode() in (process / name).read_bytes():
                    return False
            except OSError:  # it has ended, or is another user's
                continue
    return True
