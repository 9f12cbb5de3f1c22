"""``scripts/doctor.py`` as a user runs it: lines, JSON, exit codes, torchrun."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from nemo_aapo.doctor.catalog import CHECKS, NAMES

ROOT = Path(__file__).resolve().parents[2]
DOCTOR = [str(ROOT / "scripts" / "doctor.py")]


def doctor(*words: str, launcher: tuple[str, ...] = (), **more: str) -> subprocess.CompletedProcess[str]:
    unset = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")
    environment = {key: value for key, value in os.environ.items() if key not in unset}
    environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **more}
    command = [sys.executable, *launcher, *DOCTOR, *words]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280)


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory) -> list[str]:
    """The quickstart's settings with a tiny random model."""
    from tests.training_runs import make_input

    folder = make_input(tmp_path_factory.mktemp("doctor"))
    data = [f"data.{name}={folder}/{name}.jsonl" for name in ("train", "validation")]
    return ["experiment=quickstart", f"model.path={folder}/model", f"run.dir={folder}/run", *data]


def levels(output: str) -> dict[str, str]:
    """Name -> level of the lines for people."""
    lines = [line.split(maxsplit=1) for line in output.splitlines()[:-1]]
    return {text[:23].strip(): level for level, text in lines}


@pytest.mark.slow
def test_the_whole_examination_of_the_quickstart_as_json(quickstart):
    done = doctor("--json", "--skip", "slurm", *quickstart)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout)
    assert (found["ok"], found["ranks"]) == (True, 1)
    names = {entry["name"].partition(" ")[0] for entry in found["findings"]}
    several = {"memory": "host_memory", "kernels": "kernel"}  # checks with a line for each thing
    assert names == {several.get(name, name) for name in NAMES} - {"slurm"}
    assert {entry["level"] for entry in found["findings"]} <= {"ok", "warning"}
    assert len(done.stderr.splitlines()) == len(found["findings"])  # the lines as they came
    assert not Path(quickstart[2].partition("=")[2]).exists()


@pytest.mark.slow
def test_a_configuration_that_cannot_run_here_says_why_line_by_line(quickstart):
    only = ("--only", "gpu,model,tokenizer,disk,ports")
    done = doctor(*only, *quickstart, "model.path=/none", "run.dir=/proc/run", "precision=bf16")
    assert done.returncode == 1
    assert done.stderr == ""
    expected = {"ports": "ok", "gpu": "failure", "model": "failure", "tokenizer": "failure", "disk": "skipped"}
    assert levels(done.stdout) == expected
    assert "precision=bf16 needs one. Remedy: " in done.stdout
    assert done.stdout.splitlines()[-1].startswith("1 ok, 0 warning, 3 failure, 1 skipped; ")


@pytest.mark.slow
def test_without_settings_the_machine_is_looked_at_and_the_rest_is_named_as_skipped():
    done = doctor("--skip", "slurm,all_reduce,gpu,fp8,transformer_engine")
    assert done.returncode == 0, done.stdout
    found = levels(done.stdout)
    assert {name for name in found if found[name] == "skipped"} == {c.name for c in CHECKS if c.needs_config}
    assert "pass KEY=VALUE as to train.py" in done.stdout


@pytest.mark.slow
def test_ranks_under_torchrun_report_once_and_reach_each_other(quickstart):
    launcher = ("-m", "torch.distributed.run", "--nproc-per-node", "2")
    words = ("--only", "ports,all_reduce,shared_files", *quickstart)
    done = doctor(*words, launcher=launcher)
    assert done.returncode == 0, done.stdout + done.stderr
    assert levels(done.stdout) == {"ranks": "ok", "ports": "ok", "all_reduce": "ok", "shared_files": "ok"}
    assert "the sums of 2 ranks are right" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--only", "gpus"], "there is no check 'gpus'; there are versions, gpu"),
        (["--only"], "expected one argument"),
        (["--jsn"], "--jsn"),
        (["modl.path=x"], "did you mean 'model.path'?"),
        (["seed=x", "model.path=m", "data.train=t", "data.validation=v"], "seed"),
    ],
)
def test_what_it_cannot_make_sense_of_is_one_line_and_exit_code_2(words, message):
    done = doctor(*words)
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    assert done.stdout == ""


@pytest.mark.slow
def test_help_names_options_and_checks():
    done = doctor("--help")
    assert done.returncode == 0
    for word in ("--json", "--only", "--skip", "--quick", *NAMES):
        assert word in done.stdout
