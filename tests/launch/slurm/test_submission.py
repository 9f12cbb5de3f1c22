"""From a command line to a finished job, and what is refused on the way, in Slurm's words where they are Slurm's."""

from __future__ import annotations

import os
import re
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from tests.launch.slurm.cluster import ROOT, Cluster, Run, jobs_of, make_run, wait_for
from tests.training_runs import exported, metrics

pytestmark = pytest.mark.timeout(900)
ONE_RANK = ("trainer.num_nodes=1", "model.tensor_model_parallel_size=1")


@pytest.fixture(scope="module")
def quickstart(cluster: Cluster, tmp_path_factory) -> Run:
    """The quickstart on a barely trained base model: two nodes with two ranks each, and the same on this machine."""
    from examples.quickstart.base_model import Recipe, make_base_model

    folder = tmp_path_factory.mktemp("quickstart")
    base = folder / "base"
    make_base_model(base, Recipe(clean_steps=20, noisy_steps=0), force=False, log=print)
    data = [f"data.{split}={base}/data/{split}.jsonl" for split in ("train", "validation")]
    layout = ["model.tensor_model_parallel_size=2", "model.pipeline_model_parallel_size=2"]
    words = ["experiment=quickstart", f"model.path={base}", *data, *layout, "trainer.max_steps=4"]
    words += ["trainer.val_check_interval=4", "validation.max_prompts=16", "validation.samples=1"]
    cluster.launch(*words, "trainer.devices=4", f"run.dir={folder}/local", timeout=600)
    slurm = ["cluster=slurm", "trainer.num_nodes=2", "trainer.devices=2", "+cluster.env.SECRET_TOKEN=s3cret"]
    return Run(cluster, folder / "run", [*words, *slurm, f"run.dir={folder}/run"])


def test_the_quickstart_on_two_nodes_under_tp2_pp2_completes_as_it_does_on_one_machine(cluster, quickstart):
    job = quickstart.submit()[0]
    follower = subprocess.Popen(
        [sys.executable, str(ROOT / "scripts" / "launch.py"), "logs", "--follow", f"run.dir={quickstart.directory}"],
        env=cluster.environment, stdout=subprocess.PIPE, text=True, cwd=cluster.folder,
    )  # fmt: skip
    try:
        quickstart.wait_until(job, "COMPLETED")
        followed = follower.communicate(timeout=300)[0]
    finally:
        follower.kill()
    local = quickstart.directory.with_name("local")
    assert metrics(quickstart.directory) == metrics(local)
    assert exported(quickstart.directory) == exported(local)
    assert quickstart.attempts()[-1].tokens > 0
    assert "finished: the run is complete" in quickstart.log()
    for rank in range(4):
        assert f"train {rank} of 4 on node" in (quickstart.paths.logs / f"rank_{rank}.log").read_text()
        assert re.search(rf"^rank_{rank} +\| ====", followed, re.MULTILINE)
    assert re.search(r"^rank_0 +\| step 4/4 ", followed, re.MULTILINE)
    assert "no job of this run is left" in followed
    assert re.search(r"^slurm_\d+ +\| .*the run is complete", quickstart.say("logs"), re.MULTILINE)


def test_a_queued_copy_of_a_finished_run_ends_at_once(cluster, quickstart):
    jobs = quickstart.submit("cluster.chain=2")
    for job in jobs:
        quickstart.wait_until(job, "COMPLETED", seconds=300)
    assert quickstart.log().count("the run is finished: nothing to do") == 2
    assert len(quickstart.attempts()) == 1
    assert [entry["id"] for entry in jobs_of(quickstart)][-2:] == jobs


def test_secrets_reach_the_ranks_and_no_other_file_than_one_that_only_the_owner_reads(quickstart):
    paths = quickstart.paths
    holding = [path for path in quickstart.directory.rglob("*") if path.is_file() and b"s3cret" in path.read_bytes()]
    assert holding == [paths.environment]
    assert stat.S_IMODE(paths.environment.stat().st_mode) == 0o600
    assert stat.S_IMODE(paths.folder.stat().st_mode) == 0o700
    shown = quickstart.cluster.launch(*quickstart.words, "--cfg", "job")
    assert "SECRET_TOKEN: <hidden>" in shown
    assert "s3cret" not in shown


def test_dry_run_prints_the_script_and_leaves_nothing(cluster, given):
    run = make_run(cluster, given, "dry")
    script = cluster.launch(*run.words, "dry_run=true")
    assert script.startswith("#!/bin/bash\n#SBATCH --job-name=")
    assert not run.directory.exists()
    assert not cluster.run("squeue", "--noheader", "--name=" + script.split("job-name=")[1].split()[0])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["cluster.partition=nope"],
            ["invalid partition specified: nope", "batch*: 6 nodes, 8 cores, 4096 MiB, gpu:8"],
        ),
        (["cluster.gpus_per_node=9"], ["Requested node configuration is not available", "gpu:8"]),
        (["+cluster.sbatch_args.nope=1"], ["unrecognized option '--nope=1'"]),
        (["cluster.time=14400"], ["cluster.time=14400: write HH:MM:SS"]),
        (["cluster=interactive", 'cluster.time="04:00:00"', "cluster.signal_s=300"], ["this is no allocation"]),
    ],
)
def test_what_slurm_refuses_is_said_in_its_words_without_a_traceback(cluster, given, words, said):
    run = make_run(cluster, given, "refused")
    command = [sys.executable, str(ROOT / "scripts" / "launch.py"), *run.words, *words]
    done = subprocess.run(command, env=cluster.environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    for text in said:
        assert text in done.stderr


def test_a_machine_without_slurm_says_so(cluster, given):
    run = make_run(cluster, given, "no_slurm")
    command = [sys.executable, str(ROOT / "scripts" / "launch.py"), *run.words]
    bare = {**cluster.environment, "PATH": "/nowhere"}
    done = subprocess.run(command, env=bare, capture_output=True, text=True, timeout=300)
    assert (done.returncode, "no `sbatch` here" in done.stderr) == (2, True), done.stderr


def test_other_settings_for_a_run_whose_jobs_still_wait_are_refused(cluster, given):
    run = make_run(cluster, given, "waiting", "+cluster.sbatch_args.hold=true")
    job = run.submit()[0]
    said = cluster.launch(*run.words, "trainer.max_steps=7", check=False)
    assert f"job {job} of this run waits or runs with other settings" in said
    assert len(run.submit()) == 1
    assert "waits already" in run.say("requeue")
    run.say("cancel")
    assert "no job of this run waits or runs" in run.say("cancel")
    assert "nothing was submitted" in cluster.launch("status", "run.name=other", check=False)


def test_a_run_directory_that_a_node_does_not_see_is_refused_before_any_rank_starts_whatever_its_name(cluster, given):
    name = 'it\'s a "50%" run'
    folder = given / "local disk"
    folder.mkdir()
    run = make_run(cluster, given, "unseen", '+cluster.sbatch_args.nodelist="node[5-6]"')
    quoted = f"{folder / name}".replace('"', '\\"')
    run = Run(cluster, folder / name, [*run.words, f'run.dir="{quoted}"', 'run.name="a b"'])
    hide_from_node(cluster, 6, folder)
    try:
        job = run.submit()[0]
        run.wait_until(job, "FAILED", seconds=300)
    finally:
        show_to_node(cluster, 6)
    assert "node6 can't see it. Put it on a file system that all nodes share" in run.log()
    assert "the run stops: it would be refused again" in run.log()
    assert not list(run.paths.logs.glob("rank_*"))


def hide_from_node(cluster: Cluster, node: int, directory: Path) -> None:
    """Start the node's daemon again, in a mount namespace where the directory is empty, as on a disk of its own."""
    if subprocess.run(["unshare", "--mount", "true"], capture_output=True, timeout=10).returncode:
        pytest.skip("mount namespaces are not allowed here: no directory can be hidden from a node")
    end_daemon(cluster, node)
    cluster.run(
        "unshare", "--mount", "bash", "-c", f'mount -t tmpfs none "$1" && slurmd -N node{node}', "-", str(directory)
    )


def show_to_node(cluster: Cluster, node: int) -> None:
    """Start its daemon again as it was."""
    end_daemon(cluster, node)
    cluster.manage("node", str(node))


def end_daemon(cluster: Cluster, node: int) -> None:
    pid = int((cluster.folder / f"node{node}" / "slurmd.pid").read_text())
    os.kill(pid, signal.SIGTERM)
    wait_for(lambda: not Path(f"/proc/{pid}").exists(), f"end of node{node}", str, 20)


OCCUPY = """
import os, socket, subprocess, sys
taken = socket.create_server(("", 15000 + int(os.environ["SLURM_JOB_ID"]) * 7 % 15000))
sys.exit(subprocess.call(sys.argv[1:]))
"""


def test_an_allocation_runs_the_ranks_at_once_and_shows_their_logs_whatever_else_runs_there(cluster, given):
    """More tasks than ranks are allocated, and somebody listens where the ranks would meet."""
    run = make_run(cluster, given, "interactive", *ONE_RANK)
    words = [word for word in run.words if not word.startswith("cluster")]
    inside = ("salloc", "--nodes=1", "--ntasks=4", sys.executable, "-c", OCCUPY)
    more = ("cluster=interactive", "cluster.gpus_per_node=0")
    shown = cluster.launch(*words, *more, inside=inside, timeout=600)
    assert re.search(r"^rank_0 +\| step 3/3 ", shown, re.MULTILINE), shown
    assert (run.directory / "finished").exists()
    assert not run.attempts()


def test_an_array_job_fills_the_reference_store_and_another_joins_it(cluster, given):
    run = make_run(cluster, given, "filled", *ONE_RANK, "cluster.fill_jobs=2")
    said = cluster.launch("fill", *run.words)
    array, merge = re.search(r"submitted (\d+) \(array of 2\), then (\d+)", said).groups()
    run.wait_until(merge, "COMPLETED")
    assert {cluster.job(f"{array}_{task}")["JobState"] for task in range(2)} == {"COMPLETED"}
    assert (run.directory / "reference_rewards.sqlite").exists()
    assert "10 of 10 prompts have their 4 reference rewards" in "".join(
        path.read_text() for path in run.paths.logs.rglob("*") if path.is_file()
    )


def test_a_failed_array_takes_the_job_that_waits_for_it_along(cluster, given):
    run = make_run(cluster, given, "not_filled", *ONE_RANK, "cluster.fill_jobs=2", "cluster.python=/bin/false")
    said = cluster.launch("fill", *run.words)
    merge = re.search(r"then (\d+)", said)[1]
    wait_for(
        lambda: cluster.job(merge)["JobState"] == "CANCELLED", "end of the merge", lambda: str(cluster.job(merge)), 60
    )
