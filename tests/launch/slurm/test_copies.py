"""A run directory that was copied or moved: every command acts on the one that it is given, and on its jobs alone."""

from __future__ import annotations

import dataclasses
import shutil

import pytest

from tests.launch.slurm.cluster import jobs_of, make_run
from tests.training_runs import metrics

pytestmark = pytest.mark.timeout(900)


def test_a_copy_and_a_moved_run_go_on_where_they_are_and_leave_the_jobs_of_others_alone(cluster, given):
    layout = ("trainer.num_nodes=1", "model.tensor_model_parallel_size=1")
    run = make_run(cluster, given, "first", *layout, "+cluster.sbatch_args.export=NONE", held=9)
    job = run.submit()[0]
    run.wait_until_held(0)

    copy = dataclasses.replace(run, directory=given / "copy")
    shutil.copytree(run.directory, copy.directory)
    (copy.directory / "slurm" / "env.sh").write_text("")  # it is not held up
    status = copy.say("status")
    assert f"copy        of {run.directory}, which job {job} belongs to" in status
    assert "RUNNING" not in status
    assert "no job of this run is left" in copy.say("logs", "--follow")
    refusal = copy.say("cancel", check=False)
    assert f"It is a copy of {run.directory}, which job {job} belongs to" in refusal
    assert "submitted" in copy.say("requeue")
    own = jobs_of(copy)[-1]["id"]
    copy.wait_until(own, "COMPLETED")
    assert (copy.directory / "finished").exists()
    assert cluster.job(job)["JobState"] == "RUNNING"
    assert not any("loss" in line for line in metrics(run.directory))

    moved = dataclasses.replace(run, directory=given / "moved")
    run.say("cancel")
    run.wait_until(job, "CANCELLED")
    run.directory.rename(moved.directory)
    (moved.directory / "slurm" / "env.sh").write_text("")
    assert "submitted" in moved.say("requeue")
    moved.wait_until(jobs_of(moved)[-1]["id"], "COMPLETED")
    assert not run.directory.exists()
    assert metrics(moved.directory) == metrics(copy.directory)
