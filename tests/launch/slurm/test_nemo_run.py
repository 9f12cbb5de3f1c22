"""The same frozen configuration through nemo-run's SlurmExecutor, in the environment of scripts/nemo_run.sh."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
import yaml

from tests.launch.slurm.cluster import ROOT, Run, make_run

pytestmark = pytest.mark.timeout(900)
PYTHON = ROOT / ".venv-nemo-run" / "bin" / "python"


def test_nemo_run_submits_the_frozen_configuration_and_the_trainer_stops_before_the_time_limit(cluster, given):
    if not PYTHON.exists():
        pytest.skip("there is no .venv-nemo-run: bash scripts/nemo_run.sh makes it")
    layout = ("trainer.num_nodes=1", "model.tensor_model_parallel_size=1")
    through = ("cluster.launcher=nemo_run", f"cluster.python={sys.executable}", "cluster.account=lab")
    run = make_run(cluster, given, "through_nemo", *layout, *through, "+cluster.env.SECRET_TOKEN=s3cret")
    said = cluster.run(str(PYTHON), str(ROOT / "scripts" / "launch.py"), *run.words)
    job = re.search(r"^submitted (\d+): ", said, re.MULTILINE)[1]
    run.wait_until(job, "COMPLETED")
    assert (run.directory / "finished").exists()
    assert yaml.safe_load(run.paths.frozen.read_text())["checkpoint"]["max_time_s"] == 20 * 60 - 10
    assert "train 0 of 1 on node" in (run.paths.logs / "rank_0.log").read_text()
    assert f"job         {job} COMPLETED" in run.say("status")
    holding = [path for path in run.directory.rglob("*") if path.is_file() and b"s3cret" in path.read_bytes()]
    assert holding == [run.paths.environment]


def test_without_nemo_run_its_choice_is_refused_with_the_remedy(cluster, given):
    run: Run = make_run(cluster, given, "no_nemo_run", "cluster.launcher=nemo_run")
    command = [sys.executable, str(ROOT / "scripts" / "launch.py"), *run.words]
    done = subprocess.run(command, env=cluster.environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2
    assert "cluster.launcher=nemo_run: nemo-run can't be imported" in done.stderr
    assert "scripts/nemo_run.sh" in done.stderr
