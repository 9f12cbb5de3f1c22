"""Whatever ends a job, the run goes on from its last checkpoint and ends in the same bits, or stays ended for good."""

from __future__ import annotations

import os
import signal
import time

import pytest

from tests.launch.slurm.cluster import assert_equal, make_run, wait_for

pytestmark = pytest.mark.timeout(900)


def test_a_rank_killed_a_node_lost_and_a_preemption_leave_no_trace(cluster, given, limited, request):
    run = make_run(cluster, given, "misfortunes", "cluster.exclusive=true", held=3)
    job = run.submit()[0]

    run.wait_until_held(0)
    os.kill(run.ranks(job)[1], signal.SIGKILL)

    run.wait_until_held(1)
    status = run.say("status")
    assert f"{job} RUNNING" in status
    assert "task 1: Killed" in status
    node = cluster.node_names(job)[1]
    os.kill(int((cluster.folder / node / "slurmd.pid").read_text()), signal.SIGKILL)

    uninterrupted = request.getfixturevalue("uninterrupted")  # meanwhile: it takes long until the node counts as lost

    run.wait_until_held(2)
    assert node not in cluster.node_names(job)
    nodes = cluster.job(job)["NodeList"]
    cluster.run(
        "sbatch", "--partition=urgent", f"--nodelist={nodes}", "--exclusive", "--wrap=sleep 1", "--output=/dev/null"
    )

    run.wait_until(job, "COMPLETED")
    assert [attempt.end for attempt in run.attempts()] == ["failed", "lost", "saved", "finished"], run.log()
    assert [attempt.made_progress for attempt in run.attempts()][::2] == [False, True]
    assert_equal(run, uninterrupted)
    cluster.manage("node", node.removeprefix("node"))


def test_a_cancelled_run_and_its_chain_stay_cancelled(cluster, given):
    run = make_run(cluster, given, "cancelled", "trainer.num_nodes=1", "model.tensor_model_parallel_size=1", held=9)
    first, second = run.submit("cluster.chain=2")
    run.wait_until_held(0)
    status = run.say("status")
    assert f"{first} RUNNING" in status
    assert f"{second} PENDING (Dependency)" in status
    assert f"cancelled {second}, {first}" in run.say("cancel")
    run.wait_until(first, "CANCELLED")
    wait_for(lambda: run.attempts()[-1].end == "cancelled", "end of the attempt", run.log)
    time.sleep(2)  # a job that is requeued is PENDING at once, though it starts again after 5 s only
    assert {cluster.job(job)["JobState"] for job in (first, second)} == {"CANCELLED"}
    assert len(run.attempts()) == 1
