"""Many runs cancelled and requeued at once, as far as their files and a make-believe Slurm tell."""

from __future__ import annotations

import json

import pytest

from nemo_aapo.cli import launch
from nemo_aapo.errors import FAILED, RunError
from nemo_aapo.launch.slurm import control
from nemo_aapo.launch.slurm.commands import JobState


@pytest.fixture
def sweep(tmp_path, monkeypatch):
    """Four runs: finished, running, waiting, never submitted; and what is asked of Slurm."""
    states = {"7_0": "COMPLETED", "7_1": "RUNNING", "7_2": "PENDING"}
    for number in range(4):
        run = tmp_path / f"seed-{number}"
        (run / "slurm").mkdir(parents=True)
        (run / "run.json").write_text("{}")
        if number < 3:
            (run / "slurm" / "jobs.json").write_text(json.dumps([{"id": f"7_{number}", "what": "train"}]))
    (tmp_path / "seed-0" / "finished").write_text('{"step": 3}')
    asked = []
    monkeypatch.setattr(control, "slurm", lambda *words: asked.append(words) or "")
    monkeypatch.setattr(control, "job_states", lambda ids: [JobState(job, states[job]) for job in ids])
    return tmp_path, asked


def test_a_whole_sweep_is_cancelled_at_once_what_waits_first(sweep, capsys):
    folder, asked = sweep
    assert launch.main(["cancel", str(folder)]) == 0
    assert asked == [("scancel", "7_2", "7_1")]
    assert capsys.readouterr().out == "cancelled 7_2, 7_1\n"
    with pytest.raises(RunError, match="1 runs, and none of them was submitted to Slurm"):
        control.cancel_all([folder / "seed-3"])


@pytest.mark.parametrize("action", ["status", "logs", "cancel", "requeue"])
def test_an_action_on_a_run_that_is_not_there_fails_and_says_so(tmp_path, capsys, action):
    assert launch.main([action, f"run.dir={tmp_path}/typo"]) == FAILED
    told = capsys.readouterr()
    assert told.err.startswith(f"{tmp_path}/typo: ")
    assert "is it the run's directory?" in told.err
    assert told.out == ""


def test_a_whole_sweep_is_requeued_but_for_what_is_finished_and_one_that_cannot_be_leaves_the_others(sweep, capsys):
    folder, asked = sweep
    assert launch.main(["requeue", str(folder)]) == FAILED
    assert asked == [("scancel", "--batch", "--signal=USR1", "7_1")]
    said = capsys.readouterr().out.splitlines()
    assert said[:3] == [
        "seed-0: finished",
        "seed-1: asked job 7_1 to finish its step, save and start anew",
        "seed-2: job 7_2 waits already",
    ]
    assert "seed-3: " in said[3]
    assert "nothing was submitted to Slurm from here" in said[3]
