"""A heterogeneous job: rollout servers on nodes of their own beside the trainer; and what the death of one leads to."""

from __future__ import annotations

import json
import os
import signal
import stat
from pathlib import Path

import pytest

from tests.launch.slurm.cluster import make_run
from tests.training_runs import metrics

pytestmark = pytest.mark.timeout(900)
ONE_RANK = ("trainer.num_nodes=1", "model.tensor_model_parallel_size=1")


def test_a_dead_server_ends_the_attempt_with_a_clear_message_and_the_next_one_completes(cluster, given):
    more = ("cluster=slurm_servers", "cluster.servers.gpus_per_node=0", "checkpoint.save_interval=1")
    run = make_run(cluster, given, "with_servers", *ONE_RANK, *more, held=1)
    job = run.submit()[0]
    run.wait_until_held(0)

    assert {path.name: stat.S_IMODE(path.stat().st_mode) for path in run.paths.servers.glob("[st]*.json")} == {
        "server_0.json": 0o600
    }
    token = (run.paths.servers / "token").read_text().strip()
    assert stat.S_IMODE((run.paths.servers / "token").stat().st_mode) == 0o600
    assert stat.S_IMODE(run.paths.servers.stat().st_mode) == 0o700
    assert not_shown(token)
    nodes = cluster.run("squeue", "--noheader", f"--job={job}", "--format=%N").split()
    assert len(set(nodes)) == 2

    server = json.loads((run.paths.servers / "server_0.json").read_text())
    os.kill(server["pid"], signal.SIGKILL)
    run.wait_until(job, "COMPLETED")
    assert [attempt.end for attempt in run.attempts()] == ["failed", "finished"], run.log()
    assert "a rollout server ended while the trainer ran (" in run.attempts()[0].why
    assert "Killed" in run.attempts()[0].why
    assert [line["step"] for line in metrics(run.directory) if "loss" in line] == [1, 2, 3]


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
