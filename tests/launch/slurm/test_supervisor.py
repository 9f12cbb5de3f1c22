"""The supervisor alone, with a shell script for a trainer: what Slurm's signals stand for."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

import pytest

from nemo_aapo.launch.slurm.attempts import read_history
from nemo_aapo.launch.slurm.paths import RunPaths
from tests.launch.slurm.cluster import ROOT, Cluster, missing, wait_for

pytestmark = pytest.mark.timeout(300)
# Stops when it is asked to on its first attempt, and is done on its second
SAVED = "saved: the trainer was asked to stop, or checkpoint.max_time_s was reached"
TRAINER = """
if [[ ${SLURM_RESTART_COUNT:-0} == 0 ]]; then
    touch "$1/up"
    trap 'touch "$1/told"' TERM USR1
    until [[ -e $1/stop || -e $1/told ]]; do sleep 0.2; done
    mkdir -p "$1/checkpoints/step_000001"
else
    touch "$1/finished"
fi
"""


def submit(cluster: Cluster, run_dir: Path, *flags: str, trainer: str = TRAINER) -> str:
    """A job whose script is the supervisor."""
    RunPaths(run_dir).make()
    words = [sys.executable, "-m", "nemo_aapo.launch.slurm.supervisor", "job", "--fault-timeout=2", "--max-requeues=2"]
    words += [str(run_dir), "::", "train", "srun", "--nodes=1", "bash", "-c", trainer, "bash", str(run_dir)]
    script = run_dir / "job.sbatch"
    script.write_text(f"#!/bin/bash\ntrap '' USR1\nexport PYTHONPATH={ROOT}\nexec {shlex.join(words)}\n")
    return cluster.run("sbatch", "--parsable", "--requeue", f"--output={run_dir}/log", *flags, str(script)).strip()


def see_through(cluster: Cluster, job: str, run_dir: Path, state: str = "COMPLETED") -> list[str]:
    """How its attempts ended, once the job is over."""

    def story() -> str:
        return (run_dir / "log").read_text()

    wait_for(lambda: cluster.job(job)["JobState"] == state, f"end of job {job}", story, 120)
    return [f"{attempt.end}: {attempt.why}" for attempt in read_history(RunPaths(run_dir).history).attempts]


def test_a_preemption_that_only_the_ranks_are_told_of_by_sigterm_is_not_taken_for_a_cancellation(tmp_path):
    if reason := missing():
        pytest.skip(reason)
    cluster = Cluster(tmp_path / "slurm", nodes=1, warn_preempted=False)
    try:
        job = submit(cluster, tmp_path / "run", "--exclusive")
        wait_for((tmp_path / "run" / "up").exists, "start", str, 60)
        cluster.run("sbatch", "--partition=urgent", "--exclusive", "--wrap=sleep 1", "--output=/dev/null")
        ends = see_through(cluster, job, tmp_path / "run")
    finally:
        cluster.manage("stop")
    assert ends == [SAVED, "finished: the run is complete"]


@pytest.fixture(scope="module")
def jobs(cluster, tmp_path_factory) -> dict[str, tuple[Path, list[str]]]:
    """Run directory and jobs by name; all at once, as most of their time is waiting."""

    def start(name: str, *flags: str, count: int = 1, trainer: str = TRAINER) -> None:
        folder = tmp_path_factory.mktemp(name)
        started[name] = folder, [submit(cluster, folder, *flags, trainer=trainer) for _ in range(count)]

    started: dict[str, tuple[Path, list[str]]] = {}
    chain = ("--dependency=singleton", "--job-name=hopeless")
    start("hopeless", *chain, count=2, trainer="echo last words; kill -KILL $$")
    start("refused", trainer="exit 2")
    start("to_ranks")
    start("to_script")
    for name, flags in (("to_ranks", ()), ("to_script", ("--batch",))):
        folder, (job,) = started[name]
        wait_for((folder / "up").exists, "start", str, 60)
        cluster.run("scancel", *flags, "--signal=USR1", job)
    return started


@pytest.mark.parametrize(("name", "end"), [("to_script", "saved: SIGUSR1"), ("to_ranks", SAVED)])
def test_a_users_signal_to_the_script_or_to_the_ranks_saves_and_requeues(cluster, jobs, name, end):
    folder, (job,) = jobs[name]
    assert see_through(cluster, job, folder) == [end, "finished: the run is complete"]


def test_a_step_that_fails_twice_ends_the_run_and_its_chain_and_says_so(cluster, jobs):
    run_dir, (first, second) = jobs["hopeless"]
    ends = see_through(cluster, first, run_dir, "FAILED")
    assert [end.split(": ")[0] for end in ends] == ["failed", "failed"]
    assert all(end.endswith("task 0: Killed") for end in ends)
    assert see_through(cluster, second, run_dir, "FAILED") == ends
    said = (run_dir / "log").read_text()
    assert f"the run stops: step 1 failed twice (before: job {first}, " in said
    assert "nothing is started: the run stops: step 1 failed twice" in said


def test_a_refused_configuration_is_not_tried_again(cluster, jobs):
    folder, (job,) = jobs["refused"]
    ends = see_through(cluster, job, folder, "FAILED")
    assert len(ends) == 1
    assert ends[0].startswith("refused: the trainer refused its configuration")
