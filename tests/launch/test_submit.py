"""Which directory a job belongs to once directories are copied and moved, and what a submission takes along."""

from __future__ import annotations

import contextlib
import shlex
import shutil
from pathlib import Path

import pytest

from nemo_aapo.cli import launch
from nemo_aapo.cli.main import command_of_ranks
from nemo_aapo.errors import REFUSED
from nemo_aapo.launch.slurm import submit
from nemo_aapo.launch.slurm.commands import outside_of_jobs
from nemo_aapo.launch.slurm.paths import RunPaths, add_jobs, original_of, own_jobs, read_jobs
from nemo_aapo.launch.slurm.script import Site
from nemo_aapo.launch.slurm.submit import moved
from nemo_aapo.launch.sweep import quoted
from nemo_aapo.prepare import prepare, settings_of
from nemo_aapo.run.directory import claim
from tests.tiny_models import save_empty_input


@pytest.fixture
def run(tmp_path) -> RunPaths:
    """A run with one job."""
    paths = RunPaths(tmp_path / "run")
    paths.make()
    add_jobs(paths, [{"id": "41", "what": "train"}], tmp_path)
    return paths


def own(paths: RunPaths) -> list[str]:
    return [job["id"] for job in own_jobs(paths)]


def test_a_copy_has_no_job_until_it_gets_its_own_and_the_original_keeps_its(run, tmp_path):
    copy = RunPaths(shutil.copytree(run.run_dir, tmp_path / "copy"))
    assert (own(run), own(copy)) == (["41"], [])
    assert original_of(read_jobs(copy)[0], copy) == run.run_dir
    add_jobs(copy, [{"id": "42", "what": "train"}], tmp_path)
    twice = RunPaths(shutil.copytree(copy.run_dir, tmp_path / "twice"))
    assert (own(run), own(copy), own(twice)) == (["41"], ["42"], [])


def test_a_moved_run_keeps_its_jobs_also_when_another_run_takes_its_place(run, tmp_path):
    there = RunPaths(run.run_dir.rename(tmp_path / "moved"))
    assert own(there) == ["41"]
    run.make()
    assert own(there) == ["41"]
    add_jobs(run, [{"id": "50", "what": "train"}], tmp_path)
    assert (own(there), own(run)) == (["41"], ["50"])


def test_one_directory_by_two_names_is_one(run, tmp_path):
    (tmp_path / "link").symlink_to(run.run_dir)
    linked = RunPaths(tmp_path / "link")
    assert own(linked) == ["41"]
    add_jobs(linked, [{"id": "42", "what": "train"}], tmp_path)
    assert own(run) == own(linked) == ["41", "42"]


def test_paths_into_the_old_directory_lead_into_the_new_one_and_nothing_else_changes():
    tree = {
        "run": {"name": "x", "dir": "x"},
        "exp_manager": {"name": "x", "explicit_log_dir": "x"},
        "rollout": {"remote": {"directory": "x/servers", "servers": 2}},
        "rewards": [{"function": "x/reward.py:score"}, {"name": "x"}],
        "model": {"path": "xx/model", "dtype": None},
    }
    new = moved(tree, "x", "/runs/y")
    assert new == {
        "run": {"name": "x", "dir": "/runs/y"},
        "exp_manager": {"name": "x", "explicit_log_dir": "/runs/y"},
        "rollout": {"remote": {"directory": "/runs/y/servers", "servers": 2}},
        "rewards": [{"function": "/runs/y/reward.py:score"}, {"name": "x"}],
        "model": {"path": "xx/model", "dtype": None},
    }
    assert tree["run"]["dir"] == "x"


def test_in_an_allocation_too_the_checkout_stands_before_the_users_own_path(tmp_path, monkeypatch):
    words = [
        *save_empty_input(tmp_path),
        "cluster=interactive",
        "+cluster.env.PYTHONPATH=/mine",
        "+cluster.env.TOKEN=s",
    ]
    monkeypatch.setenv("PYTHONPATH", "/shell")
    started = {}
    monkeypatch.setattr(submit.os, "execve", lambda path, words, environment: started.update(environment))
    config, tree = settings_of(words)
    submit.run_interactively(config, tree, Site("python", Path("/checkout"), tmp_path))
    assert (started["PYTHONPATH"], started["TOKEN"]) == ("/checkout:/mine", "s")


def test_a_submission_from_within_a_job_takes_nothing_of_it_along():
    """What ``salloc --mem-per-cpu``, ``srun --mpi`` and torchrun set."""
    stays = {"SLURM_CONF": "/etc/slurm.conf", "SBATCH_ACCOUNT": "lab", "HOME": "/h", "RANKING": "1", "MY_SLURM_X": "1"}
    goes = [f"SLURM_{name}" for name in ("JOB_ID", "MEM_PER_CPU", "CONFIG", "NTASKS")] + ["SLURMD_NODENAME"]
    goes += ["PMI_RANK", "PMIX_ID", "OMPI_COMM_WORLD_RANK"]
    goes += ["RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"]
    assert outside_of_jobs({**stays, **dict.fromkeys(goes, "1")}) == stays


@pytest.mark.parametrize("where", ["cluster=local", "cluster=slurm"])
def test_fewer_steps_than_were_made_are_refused_before_ranks_are_started_or_a_job_is_submitted(tmp_path, capsys, where):
    words = [*save_empty_input(tmp_path), "precision=fp32", "exp_manager.create_tensorboard_logger=false"]
    job = prepare(words)
    with contextlib.closing(claim(job.config, job.tree, 1)[0]):
        (tmp_path / "run" / "checkpoints" / "step_000003").mkdir(parents=True)
    asked = [*words, where, "dry_run=true"]
    assert launch.main([*asked, "trainer.max_steps=2"]) == REFUSED
    told = capsys.readouterr()
    assert "trainer.max_steps=2" in told.err
    assert "holds a checkpoint of step 3 already" in told.err
    assert told.out == ""
    assert launch.main([*asked, "trainer.max_steps=3"]) == 0


@pytest.mark.parametrize("name", ["a b", "lr=1e-4", "it's"])
def test_what_is_printed_to_be_pasted_is_one_word_for_each_word_whatever_the_directory(tmp_path, capsys, name):
    run = tmp_path / name
    words = [*save_empty_input(tmp_path), f"run.dir={quoted(str(run))}", "exp_manager.create_tensorboard_logger=false"]
    assert launch.main([*words, "dry_run=true"]) == 0
    command = shlex.split(capsys.readouterr().out.partition(" ranks of: ")[2])
    assert command == command_of_ranks("train", words)
    run.mkdir()
    (run / "run.json").write_text("{}")
    hint = shlex.split(Site.here().launcher("status", run))
    assert hint[:2] == ["python", "scripts/launch.py"]
    assert launch.main(hint[2:]) == 0
    assert "not begun" in capsys.readouterr().out
    installed = Site("python", None, tmp_path)
    assert shlex.split(installed.launcher("status", run)) == ["nemo-aapo", "launch", "status", str(run)]
